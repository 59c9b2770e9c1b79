"""Units run in order, in one process or several, and files stand whole or not at all."""

from __future__ import annotations

import multiprocessing
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lwm_data.engine import run_units
from lwm_data.sources.files import InputFile, hash_file
from lwm_data.whole_file import remove_leftovers, whole_file


def _files(folder: Path, num: int) -> list[InputFile]:
    for i in range(num):
        (folder / f"{i:02d}").write_bytes(bytes([i]) * ((37 * i) % 11 * 200_000))
    return [InputFile(str(folder / f"{i:02d}"), f"{i:02d}") for i in range(num)]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_units_order(tmp_path: Path, workers: int) -> None:
    files = _files(tmp_path, 23)
    found = list(run_units(hash_file, None, files, workers))
    assert [file.key for file in found] == [file.key for file in files]
    assert [file.num_bytes for file in found] == [(37 * i) % 11 * 200_000 for i in range(23)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_reaches_the_caller_as_it_is(tmp_path: Path, workers: int) -> None:
    units = [*_files(tmp_path, 3), InputFile(str(tmp_path / "missing"), "missing")]
    with pytest.raises(FileNotFoundError) as error:
        list(run_units(hash_file, None, units, workers))
    assert error.value.filename == str(tmp_path / "missing")


def test_a_worker_that_is_killed_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="fewer --workers"):
        list(run_units(operator.call, os._exit, [9], 2))


def test_a_worker_that_died_idle_ends_the_run_with_a_remedy() -> None:
    def units() -> Iterator[int]:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        yield 1

    with pytest.raises(OSError, match=r"exit code -9.*fewer --workers"):
        list(run_units(operator.add, 1, units(), 2))


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (9,)


def test_a_worker_that_dies_before_it_takes_its_unit_ends_the_run_with_a_remedy() -> None:
    with pytest.raises(OSError, match=r"exit code 9.*fewer --workers"):
        list(run_units(operator.is_, _Deadly(), [1], 2))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "a") as file:
        file.write(b"all")
        assert not (tmp_path / "a").exists()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"all")]


def test_two_writers_of_one_file_have_a_temporary_each(tmp_path: Path) -> None:
    """Process numbers do not tell builds in two containers apart; here both are this process."""
    names = []
    for _ in range(2):
        with whole_file(tmp_path / "a"):
            names += [path.name for path in tmp_path.glob(".a.*.tmp")]
    assert len(set(names)) == 2
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        first.write(b"all of it")
        first.flush()
        second.write(b"all of it")
        remove_leftovers(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"all of it")]


def test_only_the_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".dead.123.tmp").write_bytes(b"x")
    with whole_file(tmp_path / "alive") as file:
        file.write(b"x")
        remove_leftovers(tmp_path)
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".alive.") and left.suffix == ".tmp"
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]
