"""What a run was made from, gathered for its report.

    RUN/run.json  -- init: {run: ...} -->  the run before  -->  ...  -->  init: random       stages, oldest first
         | datasets: path, fingerprint     --> opened where they still are and still hold the rows that were trained on
         | RUN/metrics.jsonl               --> steps, tokens and time of each stage
    RUN/eval.json                          --> held-out loss, n-grams, needles, samples; left out where there is none

A dataset or an earlier run that is no longer there does not stop the report: the page names it under `not found`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_train.evaluate.heldout import HeldoutLoss
from lwm_train.evaluate.needle import NeedleAnswer, NeedleResult
from lwm_train.evaluate.run import EVAL_FILE, run_key
from lwm_train.goodput import goodput_share, read_sessions
from lwm_train.metrics import METRICS
from lwm_train.model import param_shapes
from lwm_train.report import HeldoutPoint, ReportContent, Sample, StageFacts
from lwm_train.report_lines import read_metrics
from lwm_train.run_file import read_run_file, run_model_config


def report_content(run: Path) -> ReportContent:
    """All that the report of `run` shows. ValueError where there is no run, or a file of it cannot be read."""
    missing: list[str] = []
    runs = _lineage(run, missing)
    contents = [read_run_file(folder) for folder in runs]
    metrics = tuple(path for folder in runs if (path := folder / METRICS).is_file())
    stages = tuple(_stage(folder, content) for folder, content in zip(runs, contents, strict=True))
    result = _evaluation(run)
    if result and result.get("measured") != run_key(run):
        missing.append("an evaluation of the newest checkpoint (the one that is there is of another: evaluate again)")
        result = {}
    datasets = {"trained on": _datasets([of for content in contents for of in content["datasets"]], missing)}
    if result and result.get("heldout_dataset"):
        datasets["held out"] = _datasets([{"path": result["heldout_dataset"]}], missing)
    facts = {"run": str(run), "device": contents[-1].get("device", "unknown")}
    facts |= contents[-1].get("versions", {})
    if sessions := read_sessions(run):
        starts = f" over {len(sessions)} starts" if len(sessions) > 1 else ""
        facts |= {"goodput": f"{goodput_share(sessions):.0%} of the wall time{starts} was training"}
    if result:
        facts |= {"evaluated": f"{result['name']}, after step {result['step']:,}"}
    if missing:
        facts |= {"not found": "; ".join(missing)}
    ngram = result.get("ngram", {})
    try:
        return ReportContent(
            title=contents[-1]["name"],
            facts=facts,
            stages=stages,
            metrics=metrics,
            datasets=datasets,
            heldout_points=_heldout_points(runs, stages, result.get("heldout_dataset")),
            heldout=HeldoutLoss(**result["heldout"]) if "heldout" in result else None,
            unigram_loss=ngram.get("unigram"),
            bigram_loss=ngram.get("bigram"),
            needle=_needle(result["needle"]) if "needle" in result else None,
            samples=tuple(Sample(**sample) for sample in result.get("samples", [])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run / EVAL_FILE}: not what lwm-train eval writes ({error!r}); remove it, evaluate"
        ) from error


def _lineage(run: Path, missing: list[str]) -> list[Path]:
    """The runs that `run` came from, oldest first, itself last; `missing` gets one that is not there."""
    runs = [run]
    read_run_file(run)
    while (init := read_run_file(runs[0])["manifest"]["init"]) != "random":
        before = Path(init["run"])
        if before in runs:
            raise ValueError(f"{run}: its stages start from each other in a circle, at {before}")
        try:
            read_run_file(before)
        except ValueError as error:
            missing.append(f"the stage before {runs[0].name} ({error})")
            break
        runs.insert(0, before)
    return runs


def _stage(run: Path, content: dict[str, Any]) -> StageFacts:
    steps = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    mesh = content["mesh"]
    manifest = content["manifest"]
    total = math.fsum(of["share"] for of in manifest["data"])
    names = [of["name"] for of in content["datasets"]]
    shares = [f"{of['share'] / total:.0%} {name}" for of, name in zip(manifest["data"], names, strict=True)]
    shapes = jax.tree.leaves(param_shapes(run_model_config(run)), is_leaf=lambda x: isinstance(x, tuple))
    return StageFacts(
        name=content["name"],
        steps=steps[-1]["step"] if steps else 0,
        tokens=steps[-1]["tokens"] if steps else 0,
        num_params=sum(map(math.prod, shapes)),
        num_devices=math.prod(mesh.values()),
        mesh=", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device",
        wall_s=_seconds([step["time"] for step in steps]),
        data=", ".join(shares if len(shares) > 1 else names),
        manifest=yaml.safe_dump(manifest, sort_keys=False),
    )


def _seconds(times: Sequence[float]) -> float:
    """Seconds of training, from each step's seconds since its process began; a resumed run counts from 0 again."""
    before = [0.0, *times[:-1]]
    return math.fsum(now - last if now >= last else now for last, now in zip(before, times, strict=True))


def _datasets(described: list[dict[str, Any]], missing: list[str]) -> tuple[Dataset, ...]:
    """The datasets that are there and unchanged, each once; `missing` gets the others."""
    found = []
    for path, wanted in dict.fromkeys((of["path"], of.get("fingerprint")) for of in described):
        try:
            if "://" in path:
                raise ValueError(f"{path}: not on this machine, and a report opens no address")
            dataset = open_dataset(path)
            dataset.packed(0), dataset.text_tokenizer  # what the page shows can be read
        except (ValueError, OSError, ImportError) as error:
            missing.append(f"a dataset ({error})")
            continue
        if wanted in (None, dataset.info.fingerprint):
            found.append(dataset)
        else:
            missing.append(f"the rows trained on in {path}: built anew since")
    return tuple(found)


def _evaluation(run: Path) -> dict[str, Any]:
    """RUN/eval.json; empty where nothing was measured."""
    path = run / EVAL_FILE
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; remove it and evaluate again") from error
    if not isinstance(result, dict) or not {"name", "step"} <= set(result):
        raise ValueError(f"{path}: not what lwm-train eval writes; remove it and evaluate again")
    return result


def _heldout_points(
    runs: Sequence[Path], stages: Sequence[StageFacts], dataset: str | None
) -> tuple[HeldoutPoint, ...]:
    """The held-out losses of all stages that were measured on `dataset`."""
    results = [(stage.name, _evaluation(run)) for run, stage in zip(runs, stages, strict=True)]
    return tuple(
        HeldoutPoint(name, result["step"], result["heldout"]["text_loss"])
        for name, result in results
        if dataset is not None and "heldout" in result and result.get("heldout_dataset") == dataset
    )


def _needle(result: dict[str, Any]) -> NeedleResult:
    return NeedleResult(
        lengths=tuple(result["lengths"]),
        depths=tuple(result["depths"]),
        rounds=result["rounds"],
        accuracy=tuple(tuple(row) for row in result["accuracy"]),
        answers=tuple(NeedleAnswer(**answer) for answer in result["answers"]),
    )
