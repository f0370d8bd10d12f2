"""What a plan can say of a model that a factory makes, without running any of its code."""

from __future__ import annotations

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import FACTORY_KEY, FactorySource, missing_package, not_allowed
from compressor.errors import UserError
from compressor.recipe.model import Recipe
from compressor.solvers.llmcompressor import LlmCompressor


def as_made(
    recipe: Recipe, source: Source, faults: list[UserError], *, planning: bool, allow_code: bool
) -> Source:
    """The source with its factory, where the recipe names one; adds to ``faults`` what does not fit."""
    if recipe.model.factory is None:
        faults += _unnamed_factory(source)
        return source
    made = FactorySource(source, recipe.model.factory, allowed=allow_code)
    faults += _factory_faults(recipe, made, planning=planning)
    return made


def _factory_faults(recipe: Recipe, source: FactorySource, *, planning: bool) -> list[UserError]:
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


def _unnamed_factory(source: Source) -> list[UserError]:
    """A checkpoint whose config.json names a factory that the recipe does not name."""
    named = source.config.get(FACTORY_KEY)
    if named is None:
        return []
    what = f"its config.json says that {str(named)[:80]!r} makes the model, which the recipe does not name"
    fix = "set model.factory if you trust it, or remove the entry from config.json"
    return [UserError(what, where="model.source", fix=fix)]


def _needs_transformers(key: str) -> UserError:
    return UserError(
        "works with models of transformers only, not with a factory's", where=key, fix="leave it out"
    )
