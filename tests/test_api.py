"""The Python API, frozen: changing a name or a signature here breaks users' code."""

from __future__ import annotations

import inspect
import subprocess
import sys

import compressor

SIGNATURES = {
    "plan": "(recipe: 'str | Path', *, overrides: 'Sequence[str]' = (), output: 'Path | None' = None, "
    "workspace: 'Path | None' = None) -> 'Plan'",
    "run": "(recipe: 'str | Path', *, overrides: 'Sequence[str]' = (), output: 'Path | None' = None, "
    "workspace: 'Path | None' = None, fresh: 'bool' = False, progress: 'Progress | None' = None, "
    "allow_code: 'bool' = False) -> 'RunResult'",
    "evaluate": "(recipe: 'str | Path', *, overrides: 'Sequence[str]' = (), output: 'Path | None' = None, "
    "workspace: 'Path | None' = None, progress: 'Progress | None' = None) -> 'EvalResult'",
}


def test_api_is_frozen() -> None:
    """The package exports these functions with these signatures and nothing else."""
    assert sorted(compressor.__all__) == sorted(SIGNATURES)
    found = {name: str(inspect.signature(getattr(compressor, name))) for name in SIGNATURES}
    assert found == SIGNATURES


def test_api_functions_survive_imports_of_rooms() -> None:
    """No submodule shadows an API function once everything has been imported."""
    code = (
        "import compressor, compressor.runner, compressor.planner.plan, compressor.cli.main;"
        "assert callable(compressor.plan) and callable(compressor.run) and callable(compressor.evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
