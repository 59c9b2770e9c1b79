"""Every manifest that ships is valid, and says what a person may rely on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from lwm_data.format.manifest import read_manifest
from lwm_data.manifest import DatasetManifest
from lwm_data.manifest_qa import QaManifest, QaPrompt
from lwm_train.config import KINDS, InitFromRun, read_train_manifests

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "manifests").rglob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_that_ships_is_valid(path: Path) -> None:
    kinds = {**KINDS, "dataset": DatasetManifest, "qa": QaManifest, "qa_prompt": QaPrompt}
    assert read_manifest(path, kinds).kind == yaml.safe_load(path.read_text())["kind"]  # type: ignore[attr-defined]


def test_there_are_manifests_to_check() -> None:
    assert {path.name for path in MANIFESTS} >= {"short.yaml", "train-long.yaml", "train.yaml", "eval.yaml"}


def test_each_stage_of_a_curriculum_starts_from_the_one_before() -> None:
    stages = read_train_manifests(ROOT / "manifests/demo/train.yaml")
    assert stages[0].init == "random"
    for before, stage in itertools.pairwise(stages):
        assert stage.init == InitFromRun(run=before.out)
    assert [stage.model.rope_theta for stage in stages] == sorted(stage.model.rope_theta for stage in stages)
    assert stages[-1].mesh.sp == 4
