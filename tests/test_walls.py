"""The walls that import-linter's contracts cannot state.

    lwm_train  -- imports -->  lwm_data.format | lwm_data.vision | lwm_data.terminal     and nothing else of lwm_data
    lwm_data   -- imports -->  neither lwm_train nor jax

Two looks: at the source (every import statement, those inside functions too), and at a fresh interpreter (what
third parties pull in; webdataset, for one, imports torch).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("lwm_data.format", "lwm_data.vision", "lwm_data.terminal")


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules(package: str) -> list[str]:
    return sorted(_module_name(path, ROOT) for path in (ROOT / package).rglob("*.py"))


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full dotted names that the source of `module` imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join(parents[:kept] + ([base] if base else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def trespasses(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the source of a module of lwm_train imports from lwm_data by another way than the doors."""
    names = imported_names(source, module, is_package)
    ours = [name for name in names if name == "lwm_data" or name.startswith("lwm_data.")]
    return [name for name in ours if not any(name == door or name.startswith(door + ".") for door in DOORS)]


@pytest.mark.parametrize(
    "source",
    [
        "import lwm_data",
        "import lwm_data.build",
        "from lwm_data import pack",
        "from lwm_data import *",
        "from lwm_data.formats import x",
        "def f():\n    from lwm_data.sources.books import read",
        "import numpy, lwm_data.cli as c",
    ],
)
def test_a_way_past_the_doors_is_seen(source: str) -> None:
    assert len(trespasses(source, "lwm_train.train")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from lwm_data.format import dataset",
        "from lwm_data import format",
        "import lwm_data.format.shard",
        "from lwm_data.vision.vqgan import decode",
        "from . import step\nfrom .attention import ring",
        "import lwm_database",
    ],
)
def test_the_doors_are_open(source: str) -> None:
    assert trespasses(source, "lwm_train.train") == []


@pytest.mark.parametrize("path", sorted((ROOT / "lwm_train").rglob("*.py")), ids=lambda path: _module_name(path, ROOT))
def test_lwm_train_enters_lwm_data_by_the_doors_alone(path: Path) -> None:
    found = trespasses(path.read_text(encoding="utf-8"), _module_name(path, ROOT), path.name == "__init__.py")
    assert found == [], f"allowed: {', '.join(DOORS)}"


def _loaded_after_importing(modules: list[str]) -> set[str]:
    """Names of all modules in a fresh interpreter after these imports."""
    code = f"import {', '.join(modules)}, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_lwm_data_brings_neither_jax_nor_torch_nor_lwm_train() -> None:
    """`build` imports `encode` only where a source has pictures or videos."""
    with_torch = ("lwm_data.vision", "lwm_data.encode")
    modules = [name for name in _modules("lwm_data") if not name.startswith(with_torch)]
    assert _loaded_after_importing(modules) & {"jax", "torch", "taming", "lwm_train"} == set()


def test_importing_lwm_train_brings_no_torch_and_only_the_doors_of_lwm_data() -> None:
    modules = [name for name in _modules("lwm_train") if not name.endswith("__main__")]
    loaded = _loaded_after_importing(modules)
    assert loaded & {"torch", "taming"} == set()
    inside = {name for name in loaded if name.startswith("lwm_data.")}
    assert {name for name in inside if not name.startswith(DOORS)} == set()
