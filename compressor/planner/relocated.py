"""The recipe of a run as the copy in its output folder says it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compressor import data
from compressor.evals.long_spec import LongSpec
from compressor.planner.adapter_spec import documents_from
from compressor.recipe.evaluate_long import LongSection
from compressor.recipe.mixtures import seen_from
from compressor.recipe.model import Recipe

if TYPE_CHECKING:
    from compressor.planner.plan import Plan


def recipe_seen_from(folder: Path, plan: Plan) -> Recipe:
    """The recipe with relative files named from ``folder``, so that the copy exported there runs too."""
    recipe = plan.loaded.recipe
    model = recipe.model.model_copy(update={"source": _source_seen_from(folder, plan)})
    recipe = recipe.model_copy(update={"model": model})
    recipe = _with_documents(recipe, plan, folder)
    spec = plan.evaluation
    given = recipe.evaluate is not None and not Path(recipe.evaluate.text).is_absolute()
    if recipe.evaluate is not None and spec is not None and given and not spec.text_is_shipped:
        moved = os.path.relpath(spec.text, folder)
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"text": moved})})
    if recipe.evaluate is not None and recipe.evaluate.long is not None and spec is not None:
        long = _long(folder, recipe.evaluate.long, spec.long)
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"long": long})})
    if recipe.adapters is not None and plan.adapters is not None:
        documents = documents_from(folder, plan.adapters.spec.documents)
        section = recipe.adapters.model_copy(update={"documents": documents})
        recipe = recipe.model_copy(update={"adapters": section})
    if recipe.drafts is not None and plan.drafts is not None and plan.drafts.model is not None:
        moved = _source_seen_from(folder, plan.drafts.model)
        drafts = recipe.drafts.model_copy(update={"model": moved})
        recipe = recipe.model_copy(update={"drafts": drafts})
    if plan.calibration is not None:
        seen = seen_from(folder, recipe.calibration, plan.calibration)
        recipe = recipe.model_copy(update={"calibration": seen})
    return recipe


def _source_seen_from(folder: Path, plan: Plan) -> str:
    """What the plan reads, a local path named from ``folder``."""
    named = plan.loaded.recipe.model.source
    local = plan.source.model_dir() if plan.source.revision is None else None
    if local is None or named.startswith("pkg:") or Path(named).is_absolute():
        return named
    return os.path.relpath(local / (plan.source.gguf_file() or ""), folder)


def _with_documents(recipe: Recipe, plan: Plan, folder: Path) -> Recipe:
    """With the documents of a search for factors named from ``folder``, where these are not shipped ones."""
    search = None if plan.context is None else plan.context.search
    if search is None or recipe.context is None or recipe.context.search is None:
        return recipe
    named = {"documents": search.spec.documents, "held_out": search.spec.held_out}
    moved = {
        key: os.path.relpath(path, folder)
        for key, path in named.items()
        if path is not None
        and not Path(getattr(recipe.context.search, key)).is_absolute()
        and not path.is_relative_to(data.shipped_root() / "calibration")
    }
    section = recipe.context.model_copy(update={"search": recipe.context.search.model_copy(update=moved)})
    return recipe.model_copy(update={"context": section})


def _long(folder: Path, section: LongSection, spec: LongSpec | None) -> LongSection:
    if spec is None or spec.documents_are_shipped or Path(section.documents).is_absolute():
        return section
    return section.model_copy(update={"documents": os.path.relpath(spec.documents, folder)})
