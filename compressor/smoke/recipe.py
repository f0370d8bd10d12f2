"""The recipe of a smoke run: the same rules and solvers on a small model, with few tokens and few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.model.families import family_for, is_prediction
from compressor.planner.claims import unmet_patterns
from compressor.planner.kv_choice import BF16, kv_options
from compressor.planner.plan import Plan
from compressor.recipe.adapters import AdaptersSection
from compressor.recipe.budget import WeightBudgetSection
from compressor.recipe.calibration import CalibrationSection
from compressor.recipe.context import ContextSection
from compressor.recipe.drafts import DraftsSection, DraftTrainSection
from compressor.recipe.evaluate import EvaluateSection
from compressor.recipe.evaluate_long import LongSection
from compressor.recipe.kv_cache import KvBudgetSection, KvCacheSection
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.model import ModelSection, Recipe, WeightsSection
from compressor.solvers.base import Solver
from compressor.spec import TensorHeader

SEQUENCES, SEQUENCE_TOKENS = 8, 64
SEARCH_TOKENS = 256  # twice that holds a needle and its question, even where tokens are bytes
EVAL_TOKENS, EVAL_CONTEXT, EVAL_ITEMS = 256, 64, 4
FEW_CONTINUATIONS = {"prompts": 2, "prompt_tokens": 8, "new_tokens": 4}
SHORT_RUNS = {"prompt_tokens": 8, "new_tokens": 4, "batch": 1, "runs": 1}
LONG_TOKENS = 512
STEPS = 4
SMALL_VOCABULARY = 128


def small_recipe(
    plan: Plan, model: Path, config: dict[str, Any], headers: Mapping[str, TensorHeader]
) -> tuple[LoadedRecipe, list[str]]:
    """The recipe for the small model in the folder ``model``, and the patterns that meet nothing in it.

    Quality is measured even where the recipe says not to: that the result computes is what is to be shown.
    """
    recipe, context = plan.loaded.recipe, _context(plan)
    unmet = unmet_patterns(headers, config, family_for(config), recipe.weights)
    changed = {
        "model": ModelSection(source=str(model)),
        "weights": _weights(recipe.weights, unmet),
        "calibration": _calibration(plan),
        "evaluate": _evaluate(recipe, context),
        "kv_cache": _kv_cache(plan, config),
        "context": context,
        "adapters": _adapters(recipe),
        "drafts": _drafts(recipe, config, headers),
    }
    patterns = list(dict.fromkeys(pattern for _, pattern in sorted(unmet)))
    # Without patterns the rules' numbers, and so their places, may be others.
    places = {} if patterns else plan.loaded.places
    return LoadedRecipe(recipe.model_copy(update=changed), plan.loaded.path, places), patterns


# Of a weight that is chosen for: room for some matrices in 8 bit.
_BITS = 9.0


def _weights(weights: WeightsSection, unmet: set[tuple[str, str]]) -> WeightsSection:
    """Without the patterns that meet nothing, which a plan would refuse, and with few steps of training."""
    ignore = tuple(
        pattern
        for index, pattern in enumerate(weights.ignore)
        if (f"weights.ignore.{index}", pattern) not in unmet
    )
    rules = []
    for index, rule in enumerate(weights.rules):
        patterns = (rule.match,) if isinstance(rule.match, str) else tuple(rule.match)
        met = tuple(pattern for pattern in patterns if (f"weights.rules.{index}", pattern) not in unmet)
        if met:
            solver = None if rule.solver is None else _quick(rule.solver)
            rules.append(rule.model_copy(update={"match": met, "solver": solver}))
    # Any mix does: bytes that suit the source are none for a small model.
    budget = weights.budget and WeightBudgetSection(bits_per_target_weight=_BITS)
    polish = weights.polish and weights.polish.model_copy(update={"steps": min(weights.polish.steps, STEPS)})
    return weights.model_copy(
        update={"ignore": ignore, "rules": tuple(rules), "solver": _quick(weights.solver), "polish": polish}
        | {"budget": budget}
    )


def _quick(solver: Solver) -> Solver:
    """The solver with few steps of training, wherever it has some."""
    changed: dict[str, Any] = {}
    for name, value in solver:
        if name == "steps" and isinstance(value, int):
            changed[name] = min(value, STEPS)
        elif isinstance(value, Solver):
            changed[name] = _quick(value)
        elif name == "modifiers":
            changed[name] = tuple(_quick_modifier(item) for item in value)
    return solver.model_copy(update=changed)


def _quick_modifier(item: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """llm-compressor's modifier with few iterations; AutoRound takes 200 where nothing is said."""
    return {
        name: {**options, **({"iters": STEPS} if name == "AutoRoundModifier" else {})}
        for name, options in item.items()
    }


def _calibration(plan: Plan) -> CalibrationSection | None:
    """The same texts, of which fewer and shorter sequences are taken; images do not fit small towers."""
    spec = plan.calibration
    if spec is None:
        return None
    section = plan.loaded.recipe.calibration or CalibrationSection()
    few = {
        "num_samples": min(spec.num_samples, SEQUENCES),
        "sequence_length": min(spec.sequence_length, SEQUENCE_TOKENS),
        "images": None,
    }
    return section.model_copy(update=few)


def _context(plan: Plan) -> ContextSection | None:
    """The same scaling; where factors are searched, the same times a short length, and few candidates."""
    section, planned = plan.loaded.recipe.context, plan.context
    if section is None or section.search is None or planned is None:
        return section
    original = min(planned.original_length, SEARCH_TOKENS)
    few = {"population": 2, "generations": 1, "search_documents": 1, "accept_documents": 1, "tokens": None}
    return section.model_copy(
        update={
            "original_length": original,
            "target_length": -(-original * section.target_length // planned.original_length),
            "search": section.search.model_copy(update=few),
        }
    )


def _adapters(recipe: Recipe) -> AdaptersSection | None:
    """The same training in few steps of one short sequence each."""
    section = recipe.adapters
    few = {
        "sequence_length": SEQUENCE_TOKENS,
        "tokens": STEPS * SEQUENCE_TOKENS,
        "tokens_per_step": SEQUENCE_TOKENS,
        "warmup_steps": 1,
    }
    return section and section.model_copy(update=few)


def _drafts(
    recipe: Recipe, config: dict[str, Any], headers: Mapping[str, TensorHeader]
) -> DraftsSection | None:
    """The same kind, trained in few short steps; a draft model is left out: it fits the real source only.

    Prediction layers lie behind the blocks, and are cut away where the source counts them among these.
    """
    section = recipe.drafts
    if section is None or section.kind == "draft_model":
        return None
    if section.kind == "native" and not any(is_prediction(name, config) for name in headers):
        return None
    few: dict[str, Any] = {"measure": None}
    if section.train is not None or section.kind == "eagle3":
        train = section.train or DraftTrainSection()
        known = train.vocabulary_size
        few["train"] = train.model_copy(
            update={
                "tokens": STEPS * SEQUENCE_TOKENS,
                "sequence_length": SEQUENCE_TOKENS,
                "batch": 1,
                "new_tokens": SEQUENCE_TOKENS // 4 if train.data == "generated" else None,
                "max_generated_tokens": STEPS * SEQUENCE_TOKENS if train.data == "generated" else None,
                # Random weights loop.
                "temperature": 1.0 if train.data == "generated" else None,
                "vocabulary_size": None if known is None else min(known, SMALL_VOCABULARY),
                "held_out_rows": 2,
                "save_every": 2,
                "cache": None,
            }
        )
    return section.model_copy(update=few)


def _kv_cache(plan: Plan, config: dict[str, Any]) -> KvCacheSection | None:
    """The same format; of a budget the same share of 16 bit, or what the smallest format takes.

    Few layers may all be those that vLLM keeps in 16 bit.
    """
    section, kv = plan.loaded.recipe.kv_cache, plan.kv
    if section is None or kv is None or kv.spec.budget_bytes_per_token is None:
        return section
    whole, small = (
        {option.format: option for option in kv_options(of)[0]} for of in (plan.source.config, config)
    )
    plain = small[BF16].bytes_per_token
    wanted = kv.spec.budget_bytes_per_token * plain // whole[BF16].bytes_per_token
    smallest = min(
        option.bytes_per_token for option in small.values() if not option.problem and option.tier == "vllm"
    )
    return section.model_copy(update={"budget": KvBudgetSection(bytes_per_token=max(wanted, smallest))})


def _evaluate(recipe: Recipe, context: ContextSection | None) -> EvaluateSection:
    section = recipe.evaluate or EvaluateSection()
    tasks = tuple(
        task.model_copy(update={"limit": min(task.limit or EVAL_ITEMS, EVAL_ITEMS)}) for task in section.tasks
    )
    few = {
        "tokens": min(section.tokens, EVAL_TOKENS),
        "context": min(section.context, EVAL_CONTEXT),
        "tasks": tasks,
        "long": None if section.long is None else _long(section.long, context),
        "generation": section.generation and section.generation.model_copy(update=FEW_CONTINUATIONS),
        "speed": section.speed and section.speed.model_copy(update=SHORT_RUNS),
    }
    return section.model_copy(update=few)


def _long(section: LongSection, context: ContextSection | None) -> LongSection:
    """One short document and one number of each kind; samples of RULER do not fit in so few tokens."""
    tokens = LONG_TOKENS if context is None else min(LONG_TOKENS, context.target_length)
    needles = section.needles and section.needles.model_copy(
        update={"lengths": (tokens,), "depths": section.needles.depths[:1], "trials": 1}
    )
    few = {"count": 1, "tokens": tokens, "stride": None, "needles": needles, "ruler": None}
    return section.model_copy(update=few)
