"""A run whose data hang ends itself, tells where, and goes on when it is started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.training import losses, start, steps_logged, write_train_manifest

SCRIPT = Path(__file__).with_name("hanging_run.py")


def test_a_hang_ends_the_run_with_all_stacks_and_the_next_start_goes_on(
    project: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_train_manifest(project, watchdog=4)
    folder, run = manifest.parent, manifest.parent / "run"
    data = f"data=[{{dataset: 'hang://{folder / 'out'}'}}]"
    for requests, code in ((20, 1), (10**9, 0)):
        process = start(SCRIPT, requests, "run", manifest, "--set", data, "--set", "checkpoint.every=1", cache=tmp_path)
        _, errors = process.communicate(timeout=250)
        assert process.returncode == code, errors
        if code:
            assert "error: no step ended for 4 s (watchdog); all stacks are in" in errors
            (stacks,) = run.glob("stacks-*.txt")
            for text in (errors, stacks.read_text()):
                assert "hanging_run.py" in text
            assert 0 < steps_logged(run)[-1] < 12
    assert steps_logged(run) == list(range(1, 13))
    assert len(losses(run)) == 12
