"""Checkpoints of a run, by Orbax: asynchronous, atomic, sharded; the last `keep` and every `keep_every` are kept.

RUN/checkpoints/STEP/    the train state after STEP steps, and the check sum of each array (state_sums.py)
RUN/damaged/STEP/        a checkpoint that could not be read, or whose sums differ; the one before it was taken

    save    -> a copy on the host, then the step goes on   -> files, in a folder with another name  -> renamed: whole
    restore -> newest, else the one before, else ...       -> laid out on this run's mesh, whatever mesh saved it
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lwm_data.terminal import RunFailed
from lwm_train.config import CheckpointSpec
from lwm_train.mesh import tree_shardings
from lwm_train.model import LOGICAL_AXES, Params, init_params
from lwm_train.processes import all_of, is_first, meet
from lwm_train.run_file import run_model_config
from lwm_train.state_sums import state_sums
from lwm_train.step import TrainState


class Checkpoints:
    """The checkpoints of one run folder. Saving returns at once; the block waits for what is under way.

    A save that fails (a full disk) is told on stderr and the run goes on: what was saved before is untouched.
    RunFailed at the end of the block where the last one failed. read_only: nothing in the folder is changed.
    """

    def __init__(self, run: Path, spec: CheckpointSpec, read_only: bool = False) -> None:
        self._run, self._folder, self._read_only = run, run / "checkpoints", read_only
        self._options: dict[str, Any] = {"read_only": True}
        if not read_only:
            self._options = {"max_to_keep": spec.keep, "keep_period": spec.keep_every, "cleanup_tmp_directories": True}
        self._manager = _manager(run, **self._options)
        self._under_way: int | None = None
        self._failed: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self.wait()
        self._manager.close()
        if self._failed is not None and kind is None:
            whole = self.latest_step()
            raise RunFailed(
                f"{self._folder}: step {self._failed} is not saved, "
                + (f"step {whole} is: make room, run it again and it goes on from there" if whole else "no step is")
            )

    def latest_step(self) -> int | None:
        """Steps done at the newest whole checkpoint."""
        return self._manager.latest_step()

    def steps_at(self, most: int) -> list[int]:
        """Steps of the checkpoints of `most` steps or fewer, newest first."""
        return sorted((step for step in self._manager.all_steps() if step <= most), reverse=True)

    def save(self, step: int, state: TrainState) -> None:
        """Save `state` as the checkpoint after `step` steps, unless it is there."""
        self.wait()
        if self._manager.latest_step() == step:
            return
        self._under_way = step
        sums = state_sums(state)
        with _quiet_futures():
            try:
                self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata={"sums": sums})
            except Exception as error:
                self._fail(error)

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._under_way is None:
            return
        with _quiet_futures():
            try:
                self._manager.wait_until_finished()
                self._under_way = self._failed = None
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed, self._under_way = self._under_way, None
        self._manager.close()
        for left in self._folder.glob(f"{self._failed}.orbax-checkpoint-tmp*"):  # it takes the room that is wanted
            shutil.rmtree(left, ignore_errors=True)
        self._manager = _manager(self._run, **self._options)
        whole = self.latest_step()
        print(
            f"warning: the checkpoint of step {self._failed} could not be written ({_first_line(error)}); training "
            f"goes on, the newest that is whole is {'step ' + str(whole) if whole else 'none'}; make room",
            file=sys.stderr,
            flush=True,
        )

    def restore_newest(self, like: TrainState, most: int | None = None) -> TrainState | None:
        """The state of the newest checkpoint that is whole, laid out as `like` (jax.ShapeDtypeStruct with shardings).

        None where there is no checkpoint. Newer ones that are damaged are told on stderr and moved to RUN/damaged.
        `most`: of so many steps or fewer.
        ValueError where none can be read, or the manifest asks for other arrays than the newest holds.
        """
        steps = self.steps_at(sys.maxsize if most is None else most)
        damaged: dict[int, str] = {}
        for step in steps:
            state = self._restore(step, like, damaged)
            if state is not None:
                if damaged and not self._read_only:
                    self._set_aside(damaged, step)
                return state
        if damaged:
            told = "\n  ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise ValueError(
                f"{self._folder}: no checkpoint can be read:\n  {told}\nremove the folder to begin anew, or start a "
                "new run from another's parameters with `init: {run: FOLDER}`"
            )
        return None

    def _restore(self, step: int, like: TrainState, damaged: dict[int, str]) -> TrainState | None:
        state: TrainState | None = None
        why = ""
        with _quiet_futures():
            try:
                self._check_shapes(step, like)
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
                saved = (self._manager.metadata(step).custom_metadata or {}).get("sums")
                if saved is not None and (bad := _differing(saved, state_sums(state))):
                    state, why = None, f"{bad[0]}{' and others' * (len(bad) > 1)}: not the numbers that were saved"
            except _OtherShape:
                raise
            except Exception as error:  # Orbax and TensorStore tell of damaged files by every kind of it
                why = _first_line(error)
        if all_of(state is not None):
            return state
        damaged[step] = why or "another process could not read it"
        print(f"warning: {self._folder}/{step}: a damaged checkpoint ({damaged[step]})", file=sys.stderr, flush=True)
        return None

    def _check_shapes(self, step: int, like: TrainState) -> None:
        there = ocp.StandardCheckpointHandler().metadata((self._folder / str(step) / "default").absolute()).tree
        held, wanted = (sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (there, like))
        if held != wanted:
            raise _OtherShape(
                f"{self._folder}/{step}: its parameters or optimizer state have another shape than the manifest "
                "asks for; start a new run from this one's parameters with `init: {run: FOLDER}` "
                f"({len(held)} arrays, wanted {len(wanted)})"
            )

    def _set_aside(self, damaged: dict[int, str], taken: int) -> None:
        aside = self._run / "damaged"
        if is_first():
            aside.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                os.replace(self._folder / str(step), aside / str(step))
        meet("damaged checkpoints are set aside")
        self._manager.reload()
        print(
            f"warning: {self._folder}: going on from step {taken}, the steps after it are done again; "
            f"{', '.join(map(str, damaged))} is now in {aside}",
            file=sys.stderr,
            flush=True,
        )


class _OtherShape(ValueError):
    """The files are whole, but of another model or optimizer."""


def latest_step(run: str | Path) -> int:
    """Steps done at the run's newest whole checkpoint. ValueError where it has none."""
    return _steps(run)[-1]


def restore_params(run: str | Path, mesh: Mesh) -> tuple[Params, int]:
    """The parameters of the run's newest whole checkpoint, on `mesh`, and its step. ValueError where it has none.

    A damaged one is told on stderr, and the one before it is taken.
    """
    config = run_model_config(run)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    where = tree_shardings(mesh, LOGICAL_AXES, shapes)
    abstract = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    steps = _steps(run)
    with _manager(run, read_only=True) as manager:
        args = ocp.args.PyTreeRestore(
            {"params": abstract},
            restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
            partial_restore=True,
        )
        for step in reversed(steps):
            with _quiet_futures():
                try:
                    params: Params = manager.restore(step, args=args)["params"]
                    saved = (manager.metadata(step).custom_metadata or {}).get("sums")
                    bad = _differing(saved, state_sums(params, ".params")) if saved is not None else []
                    if not bad:
                        return params, step
                    why = f"{bad[0]}: not the numbers that were saved"
                except Exception as error:
                    why = _first_line(error)
            print(
                f"warning: {run}/checkpoints/{step}: a damaged checkpoint ({why}); move it away and run the "
                "manifest again to have it anew",
                file=sys.stderr,
                flush=True,
            )
    raise ValueError(f"{run}: no checkpoint of it can be read; run its manifest again")


def _steps(run: str | Path) -> list[int]:
    folder = (Path(run) / "checkpoints").absolute()
    steps = sorted(map(int, ocp.utils.checkpoint_steps(folder))) if folder.is_dir() else []
    if not steps:
        raise ValueError(f"{run}: no checkpoint yet; run its manifest first")
    return steps


def _differing(saved: dict[str, int], found: dict[str, int]) -> list[str]:
    """Paths of the arrays whose sums differ; those that were not read are left out."""
    return [path for path, value in found.items() if path in saved and saved[path] != value]


@contextmanager
def _quiet_futures() -> Iterator[None]:
    """When one of many reads or writes fails, Orbax forgets the others, and Python would tell of each on stderr."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = before


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # what Orbax says of it is less telling
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) < 240 else f"{line[:80]} ... {line[-140:]}"


def _manager(run: str | Path, **options: Any) -> ocp.CheckpointManager:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every save and restore; we tell of errors
    return ocp.CheckpointManager(
        (Path(run) / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(**options)
    )
