"""Recipe + tensor headers -> Plan. Reads no weights; finds every fault that can be found early, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor import data
from compressor.budget.gates import Gate
from compressor.calibration.check import check_calibration
from compressor.calibration.pinned import pinned
from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.sources import open_source
from compressor.dialects import DIALECTS
from compressor.dialects.base import Dialect
from compressor.errors import PlanError, UserError
from compressor.evals.base import EvalSpec
from compressor.model.families import family_for
from compressor.planner.adapted import AdaptPlan, adapted_key, settled_adapters
from compressor.planner.bounds import Parts, predict_bounded
from compressor.planner.budgeted import BudgetPlan, auto_claims, plan_budget, plan_cache
from compressor.planner.calibrated import WalkPlan
from compressor.planner.claimed import placed, solving_faults
from compressor.planner.context import (
    ContextPlan,
    configured_source,
    context_key,
    plan_context,
    planned_reach,
    settled_context,
)
from compressor.planner.drafted import DraftPlan, settled_drafts
from compressor.planner.evaluated import evaluation_spec
from compressor.planner.evaluated_long import LongCost, long_cost, long_warnings
from compressor.planner.faults import collect
from compressor.planner.keys import own_stages
from compressor.planner.kv_choice import KvOption
from compressor.planner.kv_job import KvStage, kv_weights_source, plan_kv_stage
from compressor.planner.kv_planned import KvPlanned, section_options
from compressor.planner.layout import group_units, pack_shards
from compressor.planner.made import as_made
from compressor.planner.oneshot import OneshotPlan
from compressor.planner.pictured import image_faults
from compressor.planner.places import check_disk, check_places
from compressor.planner.polished import PolishPlan
from compressor.planner.predict import Prediction, RuleRow, rule_rows
from compressor.planner.solving import plan_solving, walks
from compressor.planner.walkable import walk_faults
from compressor.planner.warned import source_warnings
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.mixtures import calibration_spec
from compressor.stages.base import Claim, Shard, needs_data
from compressor.stages.budget import Choice
from compressor.stages.evaluate import memory_needed
from compressor.stages.modules import modules_of
from compressor.workspace import DRAFT_RESULT, Workspace, stage_key


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, decided before it reads a weight.

    Attributes:
        loaded: the resolved recipe and where it came from.
        source: the opened source (headers only so far), as it was given.
        context: how its positions are scaled before anything else, or None where they stay.
        adapters: what is trained on long documents after that, or None.
        family: the family's name, and what the fallback inferred ("" for named families).
        claims: one for each source tensor.
        dialect: how the result is spelled.
        shards: the output files' contents.
        calibration: what the recipe calibrates on, or None where it neither says so nor needs it.
        walk: the calibrated part, or None where nothing needs data.
        oneshot: what takes the walk's place where llm-compressor chooses the values, or None.
        polish: the distillation after it, or None where the recipe asks for none.
        drafts: what proposes tokens for the result, or None.
        prediction: bytes, memory, disk, time, GPUs.
        kv: how the KV cache is to be stored, or None where the recipe does not say.
        kv_stage: what is done for it before the weights.
        evaluation: what to measure, or None where the recipe switches it off.
        gates: what the measured losses must not exceed.
        output: the output folder.
        workspace: where stages are kept.
        warnings: things the user should know before starting.
        evicts: whether what was fetched of the source is removed when it is read no more.
        budget: how schemes are chosen, or None where rules say them.
    """

    loaded: LoadedRecipe
    source: Source
    context: ContextPlan | None
    adapters: AdaptPlan | None
    family: str
    inferred: str
    claims: tuple[Claim, ...]
    dialect: Dialect
    shards: tuple[Shard, ...]
    calibration: CalibrationSpec | None
    walk: WalkPlan | None
    oneshot: OneshotPlan | None
    polish: PolishPlan | None
    drafts: DraftPlan | None
    prediction: Prediction
    kv: KvPlanned | None
    kv_stage: KvStage | None
    evaluation: EvalSpec | None
    gates: tuple[Gate, ...]
    output: Path
    workspace: Workspace
    warnings: tuple[str, ...]
    evicts: bool = False
    budget: BudgetPlan | None = None

    @property
    def rows(self) -> tuple[RuleRow, ...]:
        """The claims summed by rule."""
        return tuple(rule_rows(self.claims))

    @property
    def kv_options(self) -> tuple[KvOption, ...]:
        """What each format of the KV cache would take; none where the cache is not known."""
        return section_options(self.loaded.recipe.kv_cache, self.configured.config)[0]

    @property
    def configured(self) -> Source:
        """The source as stages will read it: under the planned config, where its positions are scaled."""
        return configured_source(self.context, self.source)

    @property
    def base_source(self) -> str:
        """Content key of what the stages before the weights read: the source, scaled and adapted."""
        return adapted_key(self.adapters, self.scaled_source)

    @property
    def scaled_source(self) -> str:
        """Content key of the source, or of the reconfigured one."""
        return context_key(self.context, self.source.fingerprint)

    @property
    def long(self) -> LongCost | None:
        """What measuring at long context takes, or None where the recipe asks for none."""
        return long_cost(self.evaluation, self.claims, self.source.config)

    @property
    def weights_source(self) -> str:
        """Content key of what weights are read from: the same, or the same once it is folded."""
        return kv_weights_source(self.kv_stage, self.base_source)

    @property
    def reload_rss_bytes(self) -> int:
        """Memory to load the result back, and to measure it against its source where that is asked for."""
        return memory_needed(self.claims, self.evaluation)


def make_plan(
    loaded: LoadedRecipe,
    *,
    output: Path | None = None,
    workspace: Path | None = None,
    planning: bool = True,
    allow_code: bool = False,
    may_copy_all: bool = False,
    choice: Choice | None = None,
) -> Plan:
    """Plans a recipe.

    Args:
        loaded: the recipe.
        output: the output folder; default ``out/<name>`` in the current folder.
        workspace: the workspace folder; default ``.compress-workspace`` beside the output folder, so that
            finished shards can be linked instead of copied.
        planning: True allows shipped headers in place of an unreachable source, and skips checks of this
            machine's disk.
        allow_code: whether a run may import and call ``model.factory``; planning never does.
        may_copy_all: whether rules may leave all weights in 16 bit, though nothing else changes them.
        choice: what ``weights.scheme: auto`` has become; None while it is not known.

    Raises:
        PlanError: every fault found.
        UserError: the source cannot be opened at all.
    """
    recipe = loaded.recipe
    output = (output or Path("out") / recipe.name).resolve()
    space = Workspace((workspace or output.parent / ".compress-workspace").resolve())
    faults: list[UserError] = []
    given = _open(loaded, space, faults, planning=planning, allow_code=allow_code)
    context = _context(loaded, given, faults)
    source = configured_source(context, given)
    evaluation = collect(faults, lambda: evaluation_spec(loaded, source.config, given.config))
    family, dialect = family_for(source.config), DIALECTS[recipe.export.format]
    claims, warnings, groups = auto_claims(loaded, given, source, dialect, faults, choice, may_copy_all)
    faults += solving_faults(claims, source, dialect, polished=recipe.weights.polish is not None)
    kv = plan_cache(recipe, choice, source.config, faults, warnings)
    calibration = _calibration(loaded, source, claims, evaluation, kv, faults, warnings, planning)
    budget = plan_budget(loaded, source, groups, claims, calibration, choice, faults)
    oneshot, walk, polish = plan_solving(loaded, source, calibration, claims, faults, warnings)
    kv_stage = _kv_stage(loaded, source, claims, kv, calibration, dialect, oneshot is not None, faults)
    adapters = settled_adapters(loaded, source, claims, evaluation, kv_stage, faults, warnings)
    changed = (adapters is not None and adapters.spec.merge) or (kv_stage is not None and kv_stage.job.folds)
    context = settled_context(context, claims, source.config, evaluation, warnings, changed=changed)
    shards = tuple(pack_shards(group_units(claims), recipe.export.max_shard_bytes))
    drafts = _drafts(loaded, source, claims, evaluation, space, faults, warnings, planning)
    parts = Parts(evaluation, adapters, walk, oneshot, polish, kv_stage, context, drafts, budget)
    prediction, evicts = predict_bounded(recipe.workspace, source, claims, shards, parts, faults, warnings)
    warnings[:0] = source_warnings(loaded, given, prediction.result_bytes)
    warnings += [*dialect.warnings(modules_of(source, claims)), *long_warnings(evaluation, claims, source)]
    check_places(output, space.root, source.model_dir() if source.revision is None else None, faults)
    plan = Plan(
        loaded=loaded,
        source=given,
        context=context,
        adapters=adapters,
        family=family.name,
        inferred=family.inferred,
        claims=tuple(claims),
        dialect=dialect,
        shards=shards,
        calibration=calibration,
        walk=walk,
        oneshot=oneshot,
        polish=polish,
        drafts=drafts,
        prediction=prediction,
        kv=kv,
        kv_stage=kv_stage,
        evaluation=evaluation,
        gates=tuple(recipe.evaluate.gates) if recipe.evaluate else (),
        output=output,
        workspace=space,
        warnings=tuple(warnings),
        evicts=evicts,
        budget=budget,
    )
    return _checked(plan, source, faults, planning=planning)


def _checked(plan: Plan, source: Source, faults: list[UserError], *, planning: bool) -> Plan:
    """The plan, if nothing is wrong with it."""
    if not planning:
        check_disk(plan.prediction, source, plan.output, plan.workspace, own_stages(plan), faults)
    if faults:
        raise PlanError(placed(faults, plan.loaded))
    return plan


def _open(
    loaded: LoadedRecipe, space: Workspace, faults: list[UserError], *, planning: bool, allow_code: bool
) -> Source:
    """The source; adds to ``faults`` what does not go with the factory of its model."""
    model = loaded.recipe.model
    source = open_source(
        model.source,
        revision=model.revision,
        sha256=model.sha256,
        headers=data.find(model.headers, beside=loaded.folder) if model.headers else None,
        beside=loaded.folder,
        cache=space.hub,
        planning=planning,
        from_=model.from_,
    )
    return as_made(loaded.recipe, source, faults, planning=planning, allow_code=allow_code)


def _context(loaded: LoadedRecipe, source: Source, faults: list[UserError]) -> ContextPlan | None:
    """How positions are scaled, if so; adds to ``faults`` why they cannot be."""
    section = loaded.recipe.context
    return None if section is None else collect(faults, lambda: plan_context(section, source, loaded))


def _calibration(
    loaded: LoadedRecipe,
    source: Source,
    claims: list[Claim],
    evaluation: EvalSpec | None,
    kv: KvPlanned | None,
    faults: list[UserError],
    warnings: list[str],
    planning: bool,
) -> CalibrationSpec | None:
    """What is calibrated on; adds to ``faults`` and ``warnings`` what it finds."""
    needed = walks(loaded, claims) or (kv is not None and kv.needs_data)
    needed = needed or loaded.recipe.weights.budget is not None
    if not needed and loaded.recipe.calibration is None:
        return None
    longest = planned_reach(loaded.recipe, source.config)
    spec = collect(faults, lambda: calibration_spec(loaded.recipe, loaded.folder, longest))
    if spec is None:
        return None
    if not needed:
        if loaded.recipe.drafts is None:
            warnings.append("calibration has no effect: no scheme or solver of this recipe needs data")
        return spec
    faults += check_calibration(spec, evaluation.texts if evaluation else {}, longest)
    faults += image_faults(spec, source, claims, polished=loaded.recipe.weights.polish is not None)
    found = collect(faults, lambda: pinned(spec, planning=planning))
    if found is None:
        return None
    warnings += found[1]
    return found[0]


def _kv_stage(
    loaded: LoadedRecipe,
    source: Source,
    claims: Sequence[Claim],
    kv: KvPlanned | None,
    calibration: CalibrationSpec | None,
    dialect: Dialect,
    oneshot: bool,
    faults: list[UserError],
) -> KvStage | None:
    """What is done for the KV cache before the weights; adds to ``faults`` why it cannot be."""
    if kv is None:
        return None
    bounds = loaded.recipe.workspace
    stage = plan_kv_stage(
        kv.spec,
        source,
        claims,
        calibration,
        dialect,
        oneshot=oneshot,
        needs_data=kv.needs_data,
        most_memory=None if bounds is None else bounds.max_memory_bytes,
    )
    if stage.walk is not None and not any(needs_data(claim) for claim in claims):
        faults += walk_faults(claims, source.config, source.label)
    return stage


def _drafts(
    loaded: LoadedRecipe,
    source: Source,
    claims: Sequence[Claim],
    evaluation: EvalSpec | None,
    space: Workspace,
    faults: list[UserError],
    warnings: list[str],
    planning: bool,
) -> DraftPlan | None:
    """What proposes tokens for the result, if anything does; adds what it finds."""

    def plan_model(draft: LoadedRecipe) -> Plan:
        # Apart from this run's workspace, whose lock is held while the draft model is made.
        own = space.drafts / stage_key("draft", 1, draft.recipe.model_dump(mode="json"), [])
        output, workspace = own / DRAFT_RESULT, own / "workspace"
        return make_plan(draft, output=output, workspace=workspace, planning=planning, may_copy_all=True)

    return settled_drafts(loaded, source, claims, evaluation, plan_model, faults, warnings, planning=planning)
