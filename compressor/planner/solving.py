"""What chooses the stored values with data: a walk and its polish, or llm-compressor in its place."""

from __future__ import annotations

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.planner.calibrated import WalkPlan, plan_walk
from compressor.planner.learned import learned_on_one_row
from compressor.planner.oneshot import OneshotPlan, plan_oneshot
from compressor.planner.polished import PolishPlan, check_polish, plan_polish
from compressor.planner.walkable import walk_faults
from compressor.recipe.load import LoadedRecipe
from compressor.stages.base import Claim, needs_data


def walks(loaded: LoadedRecipe, claims: list[Claim]) -> bool:
    """Whether any matrix is walked, were it only to be polished."""
    return loaded.recipe.weights.polish is not None or any(needs_data(claim) for claim in claims)


def plan_solving(
    loaded: LoadedRecipe,
    source: Source,
    calibration: CalibrationSpec | None,
    claims: list[Claim],
    faults: list[UserError],
    warnings: list[str],
) -> tuple[OneshotPlan | None, WalkPlan | None, PolishPlan | None]:
    """What chooses values with data; adds to ``faults`` and ``warnings`` what it finds."""
    oneshot = None if calibration is None else plan_oneshot(claims, calibration, source.config)
    walk = None if oneshot is not None else _walk(loaded, source, calibration, claims, faults, warnings)
    polish = None if walk is None else _polish(loaded, source, walk, claims, faults, warnings)
    return oneshot, walk, polish


def _walk(
    loaded: LoadedRecipe,
    source: Source,
    calibration: CalibrationSpec | None,
    claims: list[Claim],
    faults: list[UserError],
    warnings: list[str],
) -> WalkPlan | None:
    """How the blocks are walked, if so; adds to ``faults`` and ``warnings`` what it finds."""
    if calibration is None or not walks(loaded, claims):
        return None
    faults += walk_faults(claims, source.config, source.label)
    faults += learned_on_one_row(claims, calibration)
    section = loaded.recipe.workspace
    most_memory = section.max_memory_bytes if section is not None else None
    walk = plan_walk(claims, calibration, source.config, most_memory)
    warnings += walk.warnings()
    return walk


def _polish(
    loaded: LoadedRecipe,
    source: Source,
    walk: WalkPlan,
    claims: list[Claim],
    faults: list[UserError],
    warnings: list[str],
) -> PolishPlan | None:
    """How the result is polished, if so; adds to ``faults`` and ``warnings`` what it finds."""
    section = loaded.recipe.weights.polish
    if section is None:
        return None
    faults += check_polish(section, walk.calibration, claims)
    polish = plan_polish(section, walk, claims, source.config, loaded.recipe.seed)
    warnings += polish.warnings()
    return polish
