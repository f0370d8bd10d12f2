"""The stages of a plan: name, content key and work of each, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.planner.calibrated import walk_key
from compressor.planner.evaluated import measured_content
from compressor.planner.keys import stream_key
from compressor.planner.oneshot import oneshot_key
from compressor.planner.plan import Plan
from compressor.planner.polished import polish_key
from compressor.planner.staged import base_source, scaled_source, trained_source, weights_source
from compressor.progress import Progress
from compressor.stages.adapt import adapt_stage
from compressor.stages.adapt_files import copy_adapter
from compressor.stages.assemble import assemble
from compressor.stages.budget import budget_stage
from compressor.stages.budget_values import ChosenValues
from compressor.stages.context import context_stage
from compressor.stages.decode import decode_stage
from compressor.stages.drafts import drafts_stage
from compressor.stages.evaluate import evaluate_stage
from compressor.stages.kv import kv_stage
from compressor.stages.oneshot import oneshot_stage
from compressor.stages.polish import polish_stage
from compressor.stages.sensitivity import sensitivity_stage
from compressor.stages.stream import stream
from compressor.stages.walk import walk_stage
from compressor.stages.walked import Finished, WalkedTensors
from compressor.workspace import stage_key

ASSEMBLE_VERSION = 1
EVALUATE_VERSION = 3


@dataclass(frozen=True)
class Stage:
    """One step: its name, content key, and the work that fills the folder it is given."""

    name: str
    key: str
    work: Callable[[Path], Mapping[str, Any]]


def stages_of(plan: Plan, progress: Progress, make: Callable[[Plan], Path]) -> list[Stage]:
    """All stages of a plan, in their order; ``drafts``, or else ``assemble``, makes the checkpoint.

    Args:
        plan: made with ``planning=False``.
        progress: told by each of them.
        make: runs a plan within this one (a draft model's) and returns its checkpoint's folder.
    """
    space = plan.workspace
    walk = plan.walk
    zeroth = None if walk is None else walk_key(walk, plan.claims, plan.weights_source)
    found = None if zeroth is None else space.artefact("walk", zeroth)
    polish = None
    if plan.polish is not None and zeroth is not None:
        polish = _polish(plan, zeroth, progress)
        found = space.artefact(polish.name, polish.key)
    oneshot = _oneshot(plan, progress)
    if oneshot is not None:
        found = space.artefact(oneshot.name, oneshot.key)
    first = stream_key(plan)
    kv = _kv(plan, progress)
    adapt = _adapt(plan, progress)
    needs = [first] if kv is None else [first, kv.key]
    # Merged adapters are in the weights.
    needs += [adapt.key] if adapt is not None and plan.base_source == plan.scaled_source else []
    second = stage_key("assemble", ASSEMBLE_VERSION, {}, needs)
    streamed, checkpoint = space.artefact("stream", first), space.artefact("assemble", second)
    drafts = _drafts(plan, second, progress, make)
    decode = None if drafts is None else _decode(plan, drafts, progress)
    if drafts is not None:
        checkpoint = space.artefact(drafts.name, drafts.key)
    spec = plan.evaluation
    measured = [second] if drafts is None else [drafts.key]
    third = stage_key("evaluate", EVALUATE_VERSION, measured_content(plan.evaluation), measured)

    def run_stream(folder: Path) -> Mapping[str, Any]:
        walked: Finished | None = None if found is None else WalkedTensors(found)
        walked = walked or _solved(plan)
        shards, dialect, evict = plan.shards, plan.dialect, plan.evicts
        return {
            "resumed": stream(weights_source(plan), shards, dialect, folder, progress, walked, evict=evict)
        }

    def run_assemble(folder: Path) -> Mapping[str, Any]:
        heard = None if kv is None else space.artefact(kv.name, kv.key)
        assemble(base_source(plan), plan.shards, plan.dialect, streamed, folder, heard)
        if adapt is not None:
            copy_adapter(space.artefact(adapt.name, adapt.key), folder)
        return {}

    def run_evaluate(folder: Path) -> Mapping[str, Any]:
        bounds = plan.loaded.recipe.workspace
        most = bounds.max_memory_bytes if bounds is not None else None
        apart = plan.context is not None and plan.context.measured_tokens
        scaled = scaled_source(plan) if apart else None
        return evaluate_stage(
            plan.source, checkpoint, plan.claims, spec, progress, most, scaled, folder, space=space
        )

    before = [stage for stage in (_context(plan, progress), adapt) if stage is not None]
    before += [*_budget(plan, progress), *([kv] if kv is not None else [])]
    stages = [
        Stage("stream", first, run_stream),
        Stage("assemble", second, run_assemble),
        *([drafts] if drafts is not None else []),
        *([decode] if decode is not None else []),
        Stage("evaluate", third, run_evaluate),
    ]
    if oneshot is not None:
        return [*before, oneshot, *stages]
    if walk is None or zeroth is None:
        return [*before, *stages]

    def run_walk(folder: Path) -> Mapping[str, Any]:
        shown, how, evict = walk.calibration, walk.walk, plan.evicts
        return walk_stage(weights_source(plan), plan.claims, shown, how, folder, progress, evict=evict)

    walked = [*before, Stage("walk", zeroth, run_walk)]
    return [*walked, *stages] if polish is None else [*walked, polish, *stages]


def stages_to_choose(plan: Plan, progress: Progress) -> list[Stage]:
    """The stages up to the choice of schemes, of a plan that waits for it; the last one makes it."""
    before = [stage for stage in (_context(plan, progress), _adapt(plan, progress)) if stage is not None]
    return [*before, *_budget(plan, progress)]


def _solved(plan: Plan) -> Finished | None:
    """What was solved while schemes were chosen; None where rules say them."""
    if plan.budget is None:
        return None
    sensed = plan.workspace.artefact("sensitivity", plan.budget.sensitivity_key(plan.base_source))
    return ChosenValues(sensed, plan.budget.solved(plan.claims, plan.base_source, plan.weights_source))


def _budget(plan: Plan, progress: Progress) -> list[Stage]:
    """The stages that measure options and choose among them; none where rules say the schemes."""
    budget = plan.budget
    if budget is None:
        return []
    first, second = budget.sensitivity_key(plan.base_source), budget.key(plan.base_source)
    job, goal, sensed = budget.job, budget.goal, plan.workspace.artefact("sensitivity", first)
    return [
        Stage(
            "sensitivity",
            first,
            lambda folder: sensitivity_stage(base_source(plan), job, folder, progress),
        ),
        Stage(
            "budget",
            second,
            lambda folder: budget_stage(base_source(plan), job, goal, sensed, folder, progress),
        ),
    ]


def _context(plan: Plan, progress: Progress) -> Stage | None:
    """The first stage, where positions are scaled."""
    planned = plan.context
    if planned is None:
        return None

    def run_context(folder: Path) -> Mapping[str, Any]:
        return context_stage(plan.source, planned.job, folder, progress)

    return Stage("context", planned.key(plan.source.fingerprint), run_context)


def _adapt(plan: Plan, progress: Progress) -> Stage | None:
    """The stage after it that trains adapters."""
    planned = plan.adapters
    if planned is None:
        return None

    spec, key = planned.spec, planned.key(plan.scaled_source)
    return Stage("adapt", key, lambda folder: adapt_stage(trained_source(plan), spec, folder, progress))


def _kv(plan: Plan, progress: Progress) -> Stage | None:
    """The stage before the weights that fits what the KV cache needs."""
    planned = plan.kv_stage
    if planned is None:
        return None

    def run_kv(folder: Path) -> Mapping[str, Any]:
        return kv_stage(base_source(plan), planned.job, planned.calibration, folder, progress)

    return Stage("kv", planned.key(plan.base_source), run_kv)


def _oneshot(plan: Plan, progress: Progress) -> Stage | None:
    """The stage in the walk's place where llm-compressor chooses the values."""
    oneshot = plan.oneshot
    if oneshot is None:
        return None

    def run_oneshot(folder: Path) -> Mapping[str, Any]:
        return oneshot_stage(base_source(plan), plan.claims, oneshot.calibration, folder, progress)

    return Stage("oneshot", oneshot_key(oneshot, plan.claims, plan.base_source), run_oneshot)


def _drafts(plan: Plan, assembled: str, progress: Progress, make: Callable[[Plan], Path]) -> Stage | None:
    """The stage after ``assemble`` that makes a draft; its folder is the checkpoint with it."""
    planned = plan.drafts
    if planned is None:
        return None

    def run_drafts(folder: Path) -> Mapping[str, Any]:
        model = None if planned.model is None else make(planned.model)
        checkpoint = plan.workspace.artefact("assemble", assembled)
        return drafts_stage(
            base_source(plan), checkpoint, plan.claims, plan.dialect, planned.spec, folder, progress, model
        )

    return Stage("drafts", planned.key(assembled), run_drafts)


def _decode(plan: Plan, drafts: Stage, progress: Progress) -> Stage | None:
    """The stage after it that measures decoding, where the recipe asks for that."""
    planned = plan.drafts
    if planned is None or planned.spec.measure is None:
        return None
    spec, checkpoint = planned.spec, plan.workspace.artefact(drafts.name, drafts.key)

    def run_decode(_: Path) -> Mapping[str, Any]:
        return decode_stage(base_source(plan), checkpoint, spec, progress)

    return Stage("decode", planned.measured_key(drafts.key), run_decode)


def _polish(plan: Plan, walked: str, progress: Progress) -> Stage:
    """The stage after the walk, whose key is ``walked``."""
    assert plan.polish is not None
    assert plan.walk is not None
    calibration, spec = plan.walk.calibration, plan.polish.spec

    def run_polish(folder: Path) -> Mapping[str, Any]:
        artefact = plan.workspace.artefact("walk", walked)
        return polish_stage(weights_source(plan), plan.claims, calibration, spec, artefact, folder, progress)

    return Stage("polish", polish_key(plan.polish, walked), run_polish)
