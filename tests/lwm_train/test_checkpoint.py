"""A checkpoint is whole or it is not taken: what a bad disk, a full one and another mesh do to it."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.terminal import RunFailed
from lwm_train.checkpoint import Checkpoints, latest_step
from lwm_train.config import CheckpointSpec, MeshSpec, ModelConfig, OptimizerSpec
from lwm_train.mesh import make_mesh
from lwm_train.optimizer import make_optimizer
from lwm_train.state_sums import state_sums
from lwm_train.step import TrainState, init_state, state_layout

# Orbax leaves a failed save or restore while TensorStore still works on it; what ends later finds its event loop
# closed, and says so to nobody in particular, in whichever test is at it then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = ModelConfig(16, 24, 2, 4, 2, text_vocab_size=64, vision_vocab_size=128)
OPTIMIZER = make_optimizer(OptimizerSpec(), 10)
ONE = MeshSpec()


def layout(mesh: MeshSpec = ONE) -> TrainState:
    return state_layout(CONFIG, OPTIMIZER, make_mesh(mesh))


@pytest.fixture(scope="module")
def states() -> dict[int, TrainState]:
    """Train states of 1 to 6 steps, each of other numbers."""
    first = init_state(CONFIG, OPTIMIZER, make_mesh(ONE), 0)

    def scaled(step: int) -> TrainState:
        params = jax.tree.map(lambda x: x * step, first.params)
        return TrainState(jnp.full((), step, jnp.int32), params, first.opt_state)

    return {step: scaled(step) for step in range(1, 7)}


def save(run: Path, states: dict[int, TrainState], spec: CheckpointSpec, steps: int) -> None:
    with Checkpoints(run, spec) as checkpoints:
        for step in range(1, steps + 1):
            checkpoints.save(step, states[step])


@pytest.fixture(scope="module")
def saved(states: dict[int, TrainState], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of 1 and 2 steps."""
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, states, CheckpointSpec(), 2)
    return run


def same(a: TrainState, b: TrainState) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(folder: Path) -> None:
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def lose_the_index(folder: Path) -> None:
    (folder / "default" / "manifest.ocdbt").unlink()


def lose_everything(folder: Path) -> None:
    shutil.rmtree(folder / "default")


DAMAGES = [truncate, flip_one_bit, lose_the_index, lose_everything]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    damage: object, saved: Path, states: dict[int, TrainState], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    damage(run / "checkpoints" / "2")
    with Checkpoints(run, CheckpointSpec()) as checkpoints:
        state = checkpoints.restore_newest(layout())
        assert state is not None
        assert same(state, states[1])
        told = capsys.readouterr().err
        assert f"{run}/checkpoints/2: a damaged checkpoint" in told
        assert "going on from step 1, the steps after it are done again" in told
        assert (run / "damaged" / "2").is_dir()
        checkpoints.save(2, states[2])  # done again
        checkpoints.wait()
        again = checkpoints.restore_newest(layout())
        assert again is not None
        assert same(again, states[2])
    assert latest_step(run) == 2


def test_where_no_checkpoint_can_be_read_all_are_named_and_none_is_moved(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    truncate(run / "checkpoints" / "1")
    flip_one_bit(run / "checkpoints" / "2")
    with (
        pytest.raises(ValueError, match=r"no checkpoint can be read:\n  step 2: .*\n  step 1: "),
        Checkpoints(run, CheckpointSpec()) as checkpoints,
    ):
        checkpoints.restore_newest(layout())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_the_last_ones_and_every_so_many_are_kept(states: dict[int, TrainState], tmp_path: Path) -> None:
    save(tmp_path, states, CheckpointSpec(keep=2, keep_every=3), 6)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "6"]


@contextmanager
def full_disk() -> Iterator[None]:
    """While the block lasts, the kernel refuses every byte of a file beyond its first 4,096."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoint_of_that_while(
    states: dict[int, TrainState], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Checkpoints(tmp_path, CheckpointSpec()) as checkpoints:
        checkpoints.save(1, states[1])
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, states[2])
            checkpoints.wait()
        told = capsys.readouterr().err
        assert "the checkpoint of step 2 could not be written" in told
        assert "the newest that is whole is step 1" in told
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, states[3])
    with Checkpoints(tmp_path, CheckpointSpec()):  # removes what the failed save left
        pass
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


def test_a_run_whose_last_checkpoint_is_not_written_fails_and_says_which_step_is_saved(
    states: dict[int, TrainState], tmp_path: Path
) -> None:
    with (
        pytest.raises(RunFailed, match=r"step 2 is not saved, step 1 is: make room"),
        Checkpoints(tmp_path, CheckpointSpec()) as checkpoints,
    ):
        checkpoints.save(1, states[1])
        checkpoints.wait()
        with full_disk():
            checkpoints.save(2, states[2])
            checkpoints.wait()
    with Checkpoints(tmp_path, CheckpointSpec()) as checkpoints:
        state = checkpoints.restore_newest(layout())
    assert state is not None
    assert same(state, states[1])


@pytest.mark.parametrize("mesh", [MeshSpec(fsdp=2), MeshSpec(sp=4), MeshSpec(fsdp=2, tp=2)])
def test_any_mesh_restores_the_same_numbers(mesh: MeshSpec, saved: Path, states: dict[int, TrainState]) -> None:
    with Checkpoints(saved, CheckpointSpec(), read_only=True) as checkpoints:
        state = checkpoints.restore_newest(layout(mesh))
    assert state is not None
    assert same(state, states[2])
    assert state_sums(state) == state_sums(states[2])


@given(st.integers(0, 23), st.integers(0, 31))
def test_one_bit_changes_an_arrays_sum(place: int, bit: int) -> None:
    array = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    changed = array.copy()
    changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    sums = [state_sums({"x": jnp.asarray(x)}) for x in (array, changed)]  # type: ignore[arg-type]
    assert sums[0] != sums[1]
    assert sums[0]["['x']"] == int(sum(int(b) * (2 * i + 1) for i, b in enumerate(array.view(np.uint32).flat)) % 2**32)
