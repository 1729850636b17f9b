"""Imports only go downward: the table in docs/architecture.md, held against the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "freehold"
LAYERS = [
    {"errors", "config", "paths", "log", "machine", "disk", "sampling", "airgap", "seccomp"},
    {"weights"},
    {"kernels"},
    {"model"},
    {"formats", "engine"},
    {"hub", "tools"},
    {"session"},
    {"serve", "train", "evals"},
    {"cluster"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PUBLIC_FACE = {"__init__", "_native"}  # the package's own attributes, and the extension module


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module="freehold", names=names):
                yield from (f"freehold.{alias.name}" for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.ImportFrom(level=level) if level > 0:
                pytest.fail("relative imports hide which layer they reach")


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_reach_down(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in LEVEL, f"{here} has no layer: add it to the table here and in docs/architecture.md"
    for name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if package != "freehold" or there in PUBLIC_FACE or (not (ROOT / there).exists() and there not in LEVEL):
            continue
        assert there == here or LEVEL[there] < LEVEL[here] or LEVEL[there] == 0 == LEVEL[here], (
            f"{path.relative_to(ROOT)} (layer {LEVEL[here]}) imports freehold.{there} (layer {LEVEL[there]})"
        )


def test_formats_know_no_tensors() -> None:
    for path in (ROOT / "formats").rglob("*.py"):
        imported = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not imported & {"torch", "numpy"}, f"{path.relative_to(ROOT)} imports tensors"
