"""What is in the journal is there for good, and what a kill tore is not."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lwm_data.qa.journal import Journal


def entry(number: int, kind: str = "answer", raw: str = "é\n\u2028") -> dict[str, Any]:
    said = {"raw": f"{number} {raw}", "reason": "5xx", "detail": "", "time": "", "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return {"key": hashlib.sha256(str(number).encode()).hexdigest()[:32], "kind": kind, "usage": usage} | said


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    async def all_of_them() -> None:
        journal = Journal(path)
        for one in entries:
            await journal.add(one)
            found = journal.get(one["key"])
            assert found is not None
            assert found["raw"] == one["raw"]
        await journal.close()

    asyncio.run(all_of_them())


def reads(path: Path, numbers: list[int]) -> None:
    journal = Journal(path)
    assert len(journal) == len(numbers)
    for number in numbers:
        found = journal.get(entry(number)["key"])
        assert found is not None
        assert found["raw"].startswith(f"{number} ")


def test_entries_are_read_again(tmp_path: Path) -> None:
    write(tmp_path / "j", [entry(i) for i in range(3000)])
    write(tmp_path / "j", [entry(i) for i in range(3000, 3100)])
    reads(tmp_path / "j", list(range(3100)))


def test_a_line_torn_anywhere_is_cut_off_and_written_again(tmp_path: Path) -> None:
    write(tmp_path / "j", [entry(i) for i in range(3)])
    whole = (tmp_path / "j").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        (tmp_path / "j").write_bytes(whole[:end])
        reads(tmp_path / "j", [0, 1])
        write(tmp_path / "j", [entry(2)])
        assert (tmp_path / "j").read_bytes() == whole


def test_the_later_line_of_a_key_holds(tmp_path: Path) -> None:
    write(tmp_path / "j", [entry(1, "failed")])
    assert Journal(tmp_path / "j").has_failed(entry(1)["key"])
    write(tmp_path / "j", [entry(1, raw="now")])
    journal = Journal(tmp_path / "j")
    found = journal.get(entry(1)["key"])
    assert not journal.has_failed(entry(1)["key"])
    assert found is not None
    assert found["raw"] == "1 now"


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", "[]", '{"key": "zz", "kind": "answer"}', '{"key": "00", "kind": "x"}']
)
def test_a_line_that_no_run_wrote_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "j").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"j:1: not a line of a journal"):
        Journal(tmp_path / "j")


def test_a_line_that_lacks_what_a_run_needs_is_named(tmp_path: Path) -> None:
    line = entry(0)
    for name in ("usage", "raw"):
        (tmp_path / "j").write_text(json.dumps({key: of for key, of in line.items() if key != name}) + "\n")
        with pytest.raises(ValueError, match=rf"j:1: not a line of a journal \(no {name}\); remove this line"):
            Journal(tmp_path / "j")
