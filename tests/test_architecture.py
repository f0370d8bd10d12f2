"""The structure that CONTRIBUTING.md describes, checked on the source itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "compressor"

# Top to bottom; imports point downwards only. Rooms of one set stand beside each other.
LEVELS: list[set[str]] = [
    {"__main__"},
    {"cli"},
    {"api", "__init__"},
    {"smoke"},
    {"runner"},
    {"pipeline"},
    {"summary", "export", "compare", "verify", "serving"},
    {"planner", "report"},
    {"recipe"},
    {"stages"},
    {"calibration"},
    {"schemes", "solvers", "dialects", "kv", "rope", "drafts", "evals", "budget"},
    {"model", "checkpoint"},
    {"data", "workspace", "meter", "device", "progress"},
    {"spec", "errors"},
    {"kernels"},
    {"numerics"},
]
# Neighbours that may see each other, and the files through which they meet.
PLUGIN_ROOMS = {"schemes", "solvers", "dialects", "kv", "rope", "drafts", "evals", "budget"}
# Each of these is named in one file only: everything else asks that file.
SINGLE_HOMES = {
    "lm_eval": "evals/harness.py",
    "llmcompressor": "stages/oneshot.py",
    "torch.cuda": "device.py",
}
# These describe errors and plain headers: any room may use them.
EVERYWHERE = {"errors", "spec"}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(module: str) -> str:
    """``compressor.schemes.base`` -> ``schemes``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> list[str]:
    """Modules of this package that a file imports, inside functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            # `from compressor import device` names a room, not an attribute.
            if node.module == "compressor":
                found += [f"compressor.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith("compressor.")]


def _level(room: str) -> int:
    for index, rooms in enumerate(LEVELS):
        if room in rooms:
            return index
    raise AssertionError(f"room {room!r} has no level: add it to LEVELS and to CONTRIBUTING.md")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    """No file imports a room above its own, and plug-in rooms meet only through base.py."""
    own = _room(".".join(("compressor", *path.relative_to(PACKAGE).with_suffix("").parts)))
    for module in _imports(path):
        other = _room(module)
        if other == own or other in EVERYWHERE:
            continue
        assert _level(other) >= _level(own), f"{path.name} imports {module}, which is above {own}"
        if own in PLUGIN_ROOMS and other in PLUGIN_ROOMS:
            assert module.endswith(".base"), f"{path.name} must meet {other} through its base.py"


@pytest.mark.parametrize(("name", "home"), SINGLE_HOMES.items())
def test_single_homes(name: str, home: str) -> None:
    """A library that must be easy to replace or to mock is named in one file."""
    # Not a module of this package that is called so too.
    pattern = re.compile(rf"(?<![\w.]){re.escape(name)}\b")
    users = {
        str(path.relative_to(PACKAGE))
        for path in _modules()
        if any(
            pattern.search(ast.unparse(node)) for node in ast.walk(ast.parse(path.read_text())) if _code(node)
        )
    }
    assert users <= {home}


def _code(node: ast.AST) -> bool:
    """Imports and attribute access: not prose in docstrings."""
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute)


def test_files_and_functions_stay_readable() -> None:
    """No file over 400 lines, no function over 80."""
    for path in _modules():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_no_bare_pickle() -> None:
    """Nothing here loads a pickle: checkpoints come from strangers."""
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"torch.load", "pickle.load", "pickle.loads"}, path


def test_readme_tree_is_true() -> None:
    """The tree in README.md names every room, and nothing that is not there."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(pyproject\.toml.*?)```", readme, re.S)
    assert block, "README.md has no tree"
    named = {line.split()[0].rstrip("/") for line in block[1].splitlines() if line.strip()}
    rooms = {
        path.stem if path.suffix == ".py" else path.name
        for path in PACKAGE.iterdir()
        if (path.is_dir() and path.name not in {"__pycache__", "_data"})
        or (path.suffix == ".py" and not path.name.startswith("__"))
    }
    listed = {name.removesuffix(".py") for name in named}
    assert rooms <= listed, f"not in the README's tree: {sorted(rooms - listed)}"
    top = {
        "pyproject.toml",
        "constraints.txt",
        "recipes",
        "calibration",
        "scripts",
        "tests",
        "compressor",
        "bench",
        "docs",
    }
    assert listed - rooms <= {name.removesuffix(".py") for name in top}
