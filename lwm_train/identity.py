"""What makes a run the run it is: its content in run.json, and what a resumed run may not change.

run.json   name, manifest, model, tokenizer and datasets by fingerprint, what it starts from, versions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from lwm_data.format.dataset import Dataset
from lwm_train.config import InitFromRun, ModelConfig, TrainManifest
from lwm_train.run_file import RUN_FILE, read_run_file

# What a resumed run may not change: with another value it would be another run.
FIXED = ("seed", "init", "model", "precision", "data", "batch_rows", "steps", "optimizer", "loss")


def run_content(manifest: TrainManifest, datasets: Sequence[Dataset], config: ModelConfig) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "name": manifest.name,
        "manifest": json.loads(manifest.model_dump_json()),
        "starts_from": _identity(manifest.init),
        "model": asdict(config),
        "tokenizer_fingerprint": datasets[0].info.tokenizer_fingerprint,
        "datasets": [{"path": d.url, "name": d.info.name, "fingerprint": d.info.fingerprint} for d in datasets],
        "versions": {"jax": jax.__version__},
    }


def _identity(init: object) -> str | None:
    """A hash of all that decides the parameters of the run that `init` names; None of a random start, or where that
    run is gone."""
    if not isinstance(init, InitFromRun) or not (Path(init.run) / RUN_FILE).is_file():
        return None
    before = read_run_file(init.run)
    parts = [before.get("starts_from"), _fixed(before), [dataset["fingerprint"] for dataset in before["datasets"]]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _fixed(content: dict[str, Any]) -> dict[str, Any]:
    """The fixed keys without the paths in them: rows and the run before are known by fingerprint, wherever they lie."""
    fixed = {key: content["manifest"].get(key) for key in FIXED}
    fixed["init"] = "random" if fixed["init"] == "random" else "from a run"
    fixed["data"] = [spec["share"] for spec in fixed["data"]]
    return fixed


def check_unchanged(run: Path, content: dict[str, Any], allow: Sequence[str]) -> None:
    """ValueError with every difference where the folder holds another run's checkpoints.

    `content` keeps what the folder knows of a run before this one that is no longer there.
    """
    for key in allow:
        if key not in (*FIXED, "datasets"):
            raise ValueError(f"--allow {key}: wanted one of {', '.join((*FIXED, 'datasets'))}")
    if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
        return
    before = read_run_file(run)
    was, now = _fixed(before), _fixed(content)
    changes = [
        f"{key}: was {was[key]!r}, is {now[key]!r}" for key in FIXED if was[key] != now[key] and key not in allow
    ]
    fingerprints = [[d["fingerprint"] for d in c["datasets"]] for c in (before, content)]
    if fingerprints[0] != fingerprints[1] and "datasets" not in allow:
        changes.append(f"datasets: their rows changed ({fingerprints[0]} -> {fingerprints[1]})")
    starts = [before.get("starts_from"), content["starts_from"]]
    if content["starts_from"] is None:  # the run before is gone; what is known of it stays known
        content["starts_from"] = before.get("starts_from")
    elif None not in starts and starts[0] != starts[1] and "init" not in allow:
        changes.append("init: the run that this one started from was trained anew, with another result")
    if changes:
        raise ValueError(
            "\n  ".join([f"{run}: its checkpoints are of another run:", *changes])
            + "\nset another `out`, remove the folder, or say --allow KEY to go on with the change"
        )
