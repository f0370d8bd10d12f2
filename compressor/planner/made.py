"""What a plan can say of a model that a factory makes, without running any of its code."""

from __future__ import annotations

from compressor.checkpoint.made_by import FactorySource, missing_package, not_allowed
from compressor.errors import UserError
from compressor.recipe.model import Recipe
from compressor.solvers.llmcompressor import LlmCompressor


def factory_faults(recipe: Recipe, source: FactorySource, *, planning: bool) -> list[UserError]:
    """A package that is not installed, code that nobody allowed, and what needs transformers' own models."""
    faults = []
    missing = missing_package(source.factory)
    if missing is not None:
        faults.append(missing)
    if not planning and not source.allowed:
        faults.append(not_allowed(source.factory))
    if source.kind != "safetensors":
        faults.append(
            UserError("only a checkpoint in safetensors goes with a factory", where="model.factory")
        )
    if recipe.export.format != "compressed-tensors":
        what = "no engine reads ModelOpt's dialect of a model that transformers does not know"
        faults.append(UserError(what, where="export.format", fix="use compressed-tensors"))
    if recipe.weights.polish is not None:
        faults.append(_needs_transformers("weights.polish"))
    solvers: dict[str, object] = {"weights.solver": recipe.weights.solver}
    solvers |= {f"weights.rules.{index}": rule.solver for index, rule in enumerate(recipe.weights.rules)}
    faults += [
        _needs_transformers(key) for key, solver in solvers.items() if isinstance(solver, LlmCompressor)
    ]
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        faults.append(_needs_transformers("evaluate.tasks"))
    return faults


def _needs_transformers(key: str) -> UserError:
    return UserError(
        "works with models of transformers only, not with a factory's", where=key, fix="leave it out"
    )
