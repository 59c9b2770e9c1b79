"""Run one step of a run again, on the same rows: the same bits come out, unless the hardware or the data changed.

checkpoint at or before N - 1  -->  steps up to N  -->  its loss beside the logged one, and the rows that it held
(none: the run's first state)       same rows, by (seed, step)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lwm_data.format.dataset import Dataset
from lwm_data.terminal import Progress
from lwm_train.checkpoint import Checkpoints
from lwm_train.config import TrainManifest
from lwm_train.mesh import request_devices
from lwm_train.metrics import finite, logged_steps
from lwm_train.row_reader import RowAddress
from lwm_train.row_sources import places_of
from lwm_train.run_file import read_run_file
from lwm_train.stage import open_stage


def replay_step(run: Path, step: int) -> dict[str, Any]:
    """What the step gives now and what it gave then. Nothing of the run's folder is changed.

    {"step", "loss", "logged_loss", "grad_norm", "logged_grad_norm", "equal", "from_checkpoint",
     "rows": [{"dataset", "row", "shard", "row_in_shard", "examples": [...]}]}

    logged_*: None where metrics.jsonl has no such line. loss, grad_norm: None where not finite. equal: bit for bit.
    ValueError where there is no such run or step, or its datasets changed.
    """
    content = read_run_file(run)
    manifest = TrainManifest.model_validate(content["manifest"]).model_copy(update={"out": str(run)})
    if not 1 <= step <= manifest.steps:
        raise ValueError(f"--step: got {step}; {run} has steps 1 to {manifest.steps}")
    request_devices([manifest.mesh])
    stage = open_stage(manifest)
    for was, dataset in zip(content["datasets"], stage.datasets, strict=True):
        if was["fingerprint"] != dataset.info.fingerprint:
            raise ValueError(f"{dataset.url}: not the rows that {run} was trained on: built anew since")
    state = None
    if (run / "checkpoints").is_dir():
        with Checkpoints(run, manifest.checkpoint, read_only=True) as checkpoints:
            state = checkpoints.restore_newest(stage.layout(), most=step - 1)
    state = stage.first_state() if state is None else state
    begin = int(state.step)
    loader = stage.loader()
    report = None
    with Progress(f"replay {manifest.name}", step - begin, "steps") as progress:
        for batch in loader.batches(begin, step):
            state, report = stage.train_step(state, batch)
            report.loss.block_until_ready()
            progress.advance(1)
    assert report is not None
    logged = {line["step"]: line for line in logged_steps(run)}.get(step, {})
    now = {"loss": finite(float(report.loss)), "grad_norm": finite(float(report.grad_norm))}
    then = {f"logged_{key}": logged.get(key) for key in now}
    return {
        "step": step,
        **now,
        **then,
        "equal": bool(logged) and all(value == then[f"logged_{key}"] for key, value in now.items()),
        "from_checkpoint": begin,
        "rows": _rows(stage.datasets, loader.rows(step - 1)),
    }


def _rows(datasets: Sequence[Dataset], addresses: Sequence[RowAddress]) -> list[dict[str, Any]]:
    rows = []
    for number, dataset in enumerate(datasets):
        wanted = [address.row for address in addresses if address.dataset == number]
        places = places_of(dataset, wanted)
        rows += [{"dataset": dataset.url, "row": row, **asdict(places[row])} for row in wanted]
    return rows


def summary(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    told = "equal to the log" if result["equal"] else f"DIFFERENT, or not in the log: {result['logged_loss']!r}"
    lines = [f"step {result['step']}: loss {result['loss']!r}, {told} (from checkpoint {result['from_checkpoint']})"]
    for row in result["rows"]:
        lines.append(f"  {row['dataset']} row {row['row']}: {row['shard']} row {row['row_in_shard']}")
        for e in row["examples"]:
            lines.append(
                f"    {e['segment']:>4}  {e['source']}  {e['key']}  part {e['part']}  {e['num_tokens']:,} tokens"
            )
    return "\n".join(lines)
