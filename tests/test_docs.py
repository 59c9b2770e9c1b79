"""Every command that README.md and docs/ show exists, and every file that they name does too; their Python runs."""

import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from lwm_data.format.dataset import open_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLIS = {"lwm-data": "lwm_data.cli", "lwm-train": "lwm_train.cli"}
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def fenced(markdown: str, language: str) -> list[str]:
    """The blocks of `markdown` that are fenced as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)


def shell_lines(markdown: str) -> list[str]:
    """Command lines of the fenced `sh` blocks; lines that end in a backslash are joined, comments dropped."""
    lines = "".join(fenced(markdown, "sh")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def words(line: str) -> list[str]:
    """A command line's words, without leading `NAME=value`; a command's folder (`.venv/bin/`) is dropped."""
    split = shlex.split(line, comments=True)
    while split and ASSIGNMENT.match(split[0]):
        split = split[1:]
    return [Path(split[0]).name, *split[1:]]


COMMANDS = sorted(
    {(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in shell_lines(page.read_text())}
)
OURS = [(page, line) for page, line in COMMANDS if words(line)[0] in CLIS]
VERBS = sorted({(words(line)[0], words(line)[1]) for _, line in OURS})
MAKE = [(page, line) for page, line in COMMANDS if words(line)[0] == "make"]
PATHS = sorted({(page, word) for page, line in COMMANDS for word in words(line) if word.startswith("manifests/")})


def test_a_fenced_block_is_read_as_a_person_reads_it() -> None:
    page = "a\n```sh\n# note\nA=1 .venv/bin/lwm-data show \\\n  runs/x 0  # row\n```\n```python\nmake no\n```\n"
    assert [words(line) for line in shell_lines(page)] == [["lwm-data", "show", "runs/x", "0"]]


def test_the_pages_show_commands() -> None:
    assert {name for name, _ in VERBS} == set(CLIS)
    assert {"make demo", "make test"} <= {line for _, line in MAKE}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_page_shows_only_our_commands(page: str, line: str) -> None:
    assert words(line)[0] in {"make", *CLIS}, f"{page}: {line}"


@pytest.mark.parametrize(("cli", "verb"), VERBS)
def test_every_verb_shown_has_help(cli: str, verb: str) -> None:
    app = import_module(CLIS[cli]).app
    assert isinstance(app, typer.Typer)
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("page", "line"), MAKE)
def test_every_make_target_shown_exists(page: str, line: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {word for word in words(line)[1:] if "=" not in word}
    assert shown <= targets, f"{page}: {line}"


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_every_manifest_shown_exists(page: str, path: str) -> None:
    assert any(ROOT.glob(path)), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_pages_python_reads_the_rows_of_a_dataset(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that need webdataset or datasets are left to tests/lwm_data/test_shards.py."""
    from lwm_data.build import build

    manifest = project(out="runs/demo/dataset")
    build(manifest)
    monkeypatch.chdir(manifest.parent)
    for page in PAGES:
        found: dict[str, Any] = {}
        for code in fenced(page.read_text(), "python"):
            if "import webdataset" not in code and "import datasets" not in code:
                exec(code, found)
        if page.name == "format.md":
            arrays = open_dataset("runs/demo/dataset")[5]
            assert arrays["segment_ids"].max() > 0
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)
            np.testing.assert_array_equal(found["tokens_100_to_164"], arrays["tokens"][100:164])
