"""What a plan says of the evaluation: its files found, its names checked."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from compressor import data
from compressor.budget.gates import check_gate_metric
from compressor.errors import PlanError, UserError
from compressor.evals.base import EvalSpec, GenerationSpec, SpeedSpec
from compressor.evals.run import check_tasks
from compressor.planner.context import planned_reach
from compressor.planner.evaluated_long import long_spec
from compressor.planner.faults import collect
from compressor.planner.places import check_text
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.model import Recipe
from compressor.workspace import file_sha256

UNMEASURED = "evaluate is switched off: nothing will be measured, and the report will say so"


def evaluation_spec(loaded: LoadedRecipe, config: dict[str, Any], given: dict[str, Any]) -> EvalSpec | None:
    """The recipe's ``evaluate`` section with its files found and its names checked.

    ``config`` is the result's, whose positions are scaled; ``given`` the source's.

    Raises:
        PlanError: a missing text, an unknown task or metric; all of them together.
    """
    section = loaded.recipe.evaluate
    if section is None:
        return None
    faults: list[UserError] = []
    longest = planned_reach(loaded.recipe, config)
    text = collect(faults, lambda: check_text(section.text, loaded.folder))
    if longest is not None and section.context > longest:
        what = f"windows of {section.context} tokens are longer than the model's context of {longest}"
        faults.append(UserError(what, where="evaluate.context", fix=f"set it to {longest} at most"))
    collect(faults, lambda: check_tasks([task.name for task in section.tasks], where="evaluate.tasks"))
    tasks = {task.name: task.limit for task in section.tasks}
    for index, gate in enumerate(section.gates):
        place = f"evaluate.gates.{index}"
        check = partial(check_gate_metric, gate.metric, tuple(tasks), _others(loaded.recipe), where=place)
        collect(faults, check)
    if text is not None and section.tokens > 2 * (size := data.text_bytes(text)):
        # Not even half a byte for each token; the tokenizer counts exactly, when the run starts.
        what = f"{section.text} has {size:,} bytes; {section.tokens:,} tokens of it are to be read"
        where = "evaluate.text" if "evaluate.text" in loaded.places else "evaluate.tokens"
        faults.append(UserError(what, where=where, fix="lower evaluate.tokens, or name a longer text"))
    long = None
    if (asked := section.long) is not None:
        context = loaded.recipe.context
        long = collect(
            faults,
            lambda: long_spec(
                asked,
                given,
                longest,
                beside=loaded.folder,
                target=context.target_length if context else None,
                trained=context.original_length if context else None,
                seed=loaded.recipe.seed,
            ),
        )
    if text is None or faults:
        raise PlanError(faults)
    generation, speed = section.generation, section.speed
    return EvalSpec(
        text=text,
        text_label=section.text,
        tokens=section.tokens,
        context=section.context,
        tasks=tasks,
        seed=loaded.recipe.seed,
        text_is_shipped=text.is_relative_to(data.shipped_root() / "calibration"),
        long=long,
        seeds=section.seeds or (loaded.recipe.seed,),
        generation=None if generation is None else GenerationSpec(**generation.model_dump()),
        speed=None if speed is None else SpeedSpec(**speed.model_dump()),
    )


def _others(recipe: Recipe) -> list[str]:
    """What can be gated besides text and tasks."""
    long, drafts = recipe.evaluate and recipe.evaluate.long, recipe.drafts
    return [
        *(["needle"] if long and long.needles else []),
        *(["acceptance"] if drafts and drafts.measure else []),
    ]


def measured_content(spec: EvalSpec | None) -> dict[str, Any]:
    """What an evaluation's figures depend on: the text's content, not where it lies or how it was named."""
    if spec is None:
        return {}
    unnamed = ("text_label", "text_is_shipped", "long")
    facts = {name: value for name, value in asdict(spec).items() if name not in unnamed}
    if spec.long is not None:
        named = ("documents_label", "documents_are_shipped")
        long = {name: value for name, value in asdict(spec.long).items() if name not in named}
        facts["long"] = long | {"documents": file_sha256(spec.long.documents)}
    return facts | {"text": file_sha256(spec.text)}
