"""The Python API: three functions. Names and signatures are frozen by tests/test_api.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.evals.base import EvalResult
    from compressor.planner.plan import Plan
    from compressor.progress import Progress
    from compressor.runner import RunResult


def plan(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    workspace: Path | None = None,
) -> Plan:
    """What a recipe will do, from headers alone; ``overrides`` are ``key=value`` as with ``--set``.

    Raises:
        UserError: the recipe or its source has faults; every one that can be found is in the message.
    """
    from compressor.planner.plan import make_plan
    from compressor.recipe.load import load_recipe

    return make_plan(load_recipe(str(recipe), overrides), output=output, workspace=workspace)


def run(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    workspace: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    allow_code: bool = False,
) -> RunResult:
    """Runs a recipe; resumes what an interrupted run left. A failed gate shows in ``result.passed``.

    ``allow_code``: whether code that the recipe names (``model.factory``) may be run.

    Raises:
        UserError: bad input, found before or during the run; finished work is kept.
    """
    from compressor.planner.plan import make_plan
    from compressor.progress import Silent
    from compressor.recipe.load import load_recipe
    from compressor.runner import execute

    loaded = load_recipe(str(recipe), overrides)
    made = make_plan(loaded, output=output, workspace=workspace, planning=False, allow_code=allow_code)
    return execute(made, progress or Silent(), fresh=fresh)


def evaluate(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measures a recipe's exported result again, as its ``evaluate`` section says.

    Raises:
        UserError: there is no result, or the recipe switches evaluation off.
    """
    from compressor.planner.plan import make_plan
    from compressor.progress import Silent
    from compressor.recipe.load import load_recipe
    from compressor.runner import evaluate_again

    made = make_plan(load_recipe(str(recipe), overrides), output=output, workspace=workspace)
    return evaluate_again(made, progress or Silent())
