"""Checkpoints of a run, by Orbax: asynchronous, atomic, the last `keep` kept.

RUN/run.json             what the run is: manifest, model, datasets and tokenizer by fingerprint, versions
RUN/checkpoints/STEP/    the train state after STEP steps
RUN/metrics.jsonl        one line per step
RUN/text_tokenizer.*     the tokenizer of the run's text
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lwm_data.format.atomic import write_whole
from lwm_train.config import CheckpointSpec, ModelConfig
from lwm_train.mesh import tree_shardings
from lwm_train.model import LOGICAL_AXES, Params, init_params
from lwm_train.step import TrainState

RUN_FILE = "run.json"


class Checkpoints:
    """The checkpoints of one run folder. Saving returns at once; the block waits for what is under way."""

    def __init__(self, run: Path, spec: CheckpointSpec) -> None:
        self._folder = run / "checkpoints"
        self._manager = _manager(run, max_to_keep=spec.keep, cleanup_tmp_directories=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Steps done at the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Save `state` as the checkpoint after `step` steps, unless it is there."""
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` steps, laid out as `like` (arrays or jax.ShapeDtypeStruct with shardings)."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            state: TrainState = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._folder}/{step}: its parameters or optimizer state have another shape than the manifest "
                "asks for; start a new run from this one's parameters with `init: {run: FOLDER}` "
                f"({str(error).splitlines()[0][:200]})"
            ) from error
        return state


def write_run_file(run: Path, content: dict[str, Any]) -> None:
    """Write run.json atomically."""
    write_whole(run / RUN_FILE, json.dumps(content, indent=1) + "\n")


def read_run_file(run: str | Path) -> dict[str, Any]:
    """run.json of the run; ValueError where there is none."""
    path = Path(run) / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run}: no {RUN_FILE}: not a run, or it has not begun") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    wanted = {
        "name": str,
        "manifest": dict,
        "model": dict,
        "datasets": list,
        "tokenizer_fingerprint": str,
        "mesh": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: {key}: missing or no {kind.__name__}; not what lwm-train run writes")
    return content


def run_model_config(run: str | Path) -> ModelConfig:
    """The model that the run trains."""
    try:
        return ModelConfig(**read_run_file(run)["model"])
    except TypeError as error:
        raise ValueError(f"{run}/{RUN_FILE}: model: {error}") from error


def latest_step(run: str | Path) -> int:
    """Steps done at the run's newest whole checkpoint. ValueError where it has none."""
    folder = (Path(run) / "checkpoints").absolute()
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise ValueError(f"{run}: no checkpoint yet; run its manifest first")
    return int(max(steps))


def restore_params(run: str | Path, mesh: Mesh) -> tuple[Params, int]:
    """The parameters of the run's newest checkpoint, on `mesh`, and its step. ValueError where it has none."""
    step = latest_step(run)
    config = run_model_config(run)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    where = tree_shardings(mesh, LOGICAL_AXES, shapes)
    abstract = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    with _manager(run, read_only=True) as manager:
        args = ocp.args.PyTreeRestore(
            {"params": abstract},
            restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
            partial_restore=True,
        )
        params: Params = manager.restore(step, args=args)["params"]
    return params, step


def _manager(run: str | Path, **options: Any) -> ocp.CheckpointManager:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every save and restore as a warning
    return ocp.CheckpointManager(
        (Path(run) / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(**options)
    )
