"""What ``weights.scheme: auto`` adds to a plan: groups of matrices, how each may be stored, and the goal.

Claims are made from headers, and schemes are chosen while the run goes on. So a plan is made twice: first
with the smallest option of every group, to say what will be done and to run the stages up to the choice; then
once more with what was chosen, from where a run goes on like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.dialects.base import Dialect
from compressor.errors import PlanError, UserError
from compressor.numerics.paired import FEWEST_UNITS
from compressor.planner.budget_goal import plan_goal
from compressor.planner.budget_groups import group_claims
from compressor.planner.calibrated import WalkPlan, plan_walk, settle_solvers
from compressor.planner.claimed import claimed, placed
from compressor.planner.kv_choice import BF16
from compressor.planner.kv_planned import KvPlanned, plan_kv
from compressor.planner.oneshot import takes
from compressor.planner.predict import Prediction, gpus_needed
from compressor.planner.sizes import DTYPE_BYTES, hidden_size, is_routed
from compressor.recipe.budget import AUTO
from compressor.recipe.kv_cache import KvCacheSection
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.model import Recipe
from compressor.solvers import parse_solver
from compressor.stages.base import Claim
from compressor.stages.budget import Choice, stored_as
from compressor.stages.budget_spec import Goal, Group, SensitivityJob, Stored
from compressor.workspace import stage_key

SENSITIVITY_VERSION = 1
BUDGET_VERSION = 1
# Rows of calibration text without which there is nothing to judge on, nor an interval: one that is heard, and
# ``numerics.paired.FEWEST_UNITS``.
_LEAST_ROWS = 1 + FEWEST_UNITS
# Mixes that are judged, about; a pass back costs as much as so many forward.
_JUDGED = 7
_BACK = 2
_STATES_SHARE = 0.3


@dataclass(frozen=True)
class BudgetPlan:
    """The choice of schemes in a plan.

    Attributes:
        job: of the stage ``sensitivity``.
        goal: of the stage ``budget``.
        walk: of the passes, for what they take.
        choice: what was chosen, once it is.
        provisional_bytes: of the groups as the claims have them while nothing is chosen.
        states_bytes: of the hidden states before all blocks, which wait for the pass back.
    """

    job: SensitivityJob
    goal: Goal
    walk: WalkPlan
    choice: Choice | None
    provisional_bytes: int
    states_bytes: int

    @property
    def open_bytes(self) -> int | None:
        """What the goal leaves beyond the smallest options; None once the choice is made, and where the goal
        does not say (a loss, or bytes that are shared with the KV cache).
        """
        if self.choice is not None or self.goal.group_bytes is None or self.goal.caches:
            return None
        return self.goal.group_bytes - self.provisional_bytes

    @property
    def routed_bytes_share(self) -> float:
        """Of the groups' bytes, as the claims have them while nothing is chosen: those of routed experts."""
        routed = [group for group in self.job.groups if is_routed(group.claims[0].tensor.name)]
        return sum(group.options[0].nbytes for group in routed) / max(1, self.provisional_bytes)

    def sensitivity_key(self, source: str) -> str:
        """Content key of the stage ``sensitivity``; ``source`` is that of what it reads."""
        return stage_key("sensitivity", SENSITIVITY_VERSION, self.job.content, [source])

    def key(self, source: str) -> str:
        """Content key of the stage ``budget``."""
        goal = self.goal
        spec = {
            "group_bytes": goal.group_bytes,
            "max_increase": goal.max_increase,
            "fixed_bytes": goal.fixed_bytes,
            "said": goal.said,
            "targets": [goal.target_parameters, goal.target_bytes],
            # The export format spells some schemes in other shapes.
            "options": [[option.nbytes for option in group.options] for group in self.job.groups],
            "caches": [[cache.format, cache.nbytes, cache.layers] for cache in goal.caches],
        }
        return stage_key("budget", BUDGET_VERSION, spec, [self.sensitivity_key(source)])

    def solved(self, claims: Sequence[Claim], source: str, folded: str) -> dict[str, tuple[Group, Stored]]:
        """Group -> its choice, of those whose values the stage ``sensitivity`` has solved for good.

        ``source`` is the key of what it read, ``folded`` of what weights are read from: a fold of the KV
        cache changes them, as a solver does that is shown data.
        """
        if self.choice is None or source != folded:
            return {}
        solvers = {claim.tensor.name: claim.solver for claim in claims}
        chosen = stored_as(self.job.groups, self.choice)
        return {
            group.name: (group, chosen[group.claims[0].tensor.name])
            for group in self.job.groups
            if all(solvers[claim.tensor.name] in (self.job.solver, None) for claim in group.claims)
        }

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with what the passes take, and with the goal's bytes while nothing is chosen."""
        job, rows = self.job, self.job.calibration.num_samples
        options = max((len(group.options) for group in job.groups), default=0)
        blocks = max(1, len({group.block for group in job.groups}))
        tried = options * len(job.groups) / blocks
        passes = (1 + _BACK + tried) * job.heard / rows + _JUDGED * (rows - job.heard) / rows
        solved = sum(claim.bytes_16bit for group in job.groups for claim in group.claims)
        values = sum(option.nbytes for group in job.groups for option in group.options if option.scheme)
        walked = self.walk.add_to(replace(prediction, time_s=0.0, disk_bytes=0))
        spilled = job.walk.states == "disk"
        found = replace(
            walked,
            peak_rss_bytes=walked.peak_rss_bytes + (0 if spilled else self.states_bytes),
            disk_bytes=prediction.disk_bytes
            + values
            + walked.disk_bytes
            + (self.states_bytes if spilled else 0),
            time_s=prediction.time_s
            + self.walk.time_s * passes
            + (options - 1) * solved / job.solver.bytes_per_s,
        )
        if (more := self.open_bytes) is None:
            return found
        result_bytes = prediction.result_bytes + more
        kv = prediction.kv.total_bytes if prediction.kv else 0
        return replace(
            found,
            result_bytes=result_bytes,
            disk_bytes=found.disk_bytes + more,
            bits_per_weight=8 * result_bytes / prediction.parameters,
            bits_per_target_weight=self.goal.bits(self.provisional_bytes + more),
            gpus_after=gpus_needed(result_bytes, kv),
            gpus_weights_after=gpus_needed(result_bytes, 0),
        )

    def to_json(self) -> dict[str, Any]:
        """For ``compress plan --json``: the goal, and every group with the bytes of its options."""
        return {
            "goal": self.goal.said,
            "group_bytes": self.goal.group_bytes,
            "max_increase": self.goal.max_increase,
            "kv_formats": {cache.format: cache.nbytes for cache in self.goal.caches},
            "groups": {
                group.name: {option.name: option.nbytes for option in group.options}
                for group in self.job.groups
            },
        }

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        job = self.job
        names = list(dict.fromkeys(option.name for group in job.groups for option in group.options))
        lines = [f"{self.goal.said}: {len(job.groups)} groups among {', '.join(names)}"]
        if self.choice is None:
            lines.append("schemes are chosen while it runs; the table has the smallest of each group")
        heard, judged = job.heard, job.calibration.num_samples - job.heard
        length = job.calibration.sequence_length
        lines.append(f"measured on {heard * length:,} tokens, judged on {judged * length:,} others")
        return tuple(lines)


def auto_claims(
    loaded: LoadedRecipe,
    given: Source,
    source: Source,
    dialect: Dialect,
    faults: list[UserError],
    choice: Choice | None,
    may_copy_all: bool,
) -> tuple[list[Claim], list[str], tuple[Group, ...]]:
    """The claims of a recipe, what to warn of, and the groups that schemes are chosen for: ``auto`` alone has
    any.

    Arguments as of ``claimed``; ``choice``: what was chosen, or None for the smallest option everywhere.

    Raises:
        PlanError: as ``claimed``, or a candidate that the export format has no form for.
    """
    if loaded.recipe.weights.scheme != AUTO:
        return *settle_solvers(claimed(loaded, given, source, dialect, faults, may_copy_all)), ()
    open_claims = claimed(loaded, given, source, dialect, faults, True)
    candidates = loaded.recipe.weights.auto_candidates
    faults += [
        UserError(problem, where=f"weights.candidates.{index}", fix="leave this candidate out")
        for index, scheme in enumerate(candidates)
        if not isinstance(scheme, str) and (problem := dialect.problem(scheme))
    ]
    if faults:
        raise PlanError(placed(faults, loaded))
    groups = group_claims(open_claims, candidates, source.config, dialect)
    if choice is None:
        choice = Choice({group.name: group.options[0].name for group in groups})
    chosen = {name: stored.scheme for name, stored in stored_as(groups, choice).items()}
    return *settle_solvers(claimed(loaded, given, source, dialect, faults, True, chosen)), groups


def plan_budget(
    loaded: LoadedRecipe,
    source: Source,
    groups: tuple[Group, ...],
    claims: Sequence[Claim],
    calibration: CalibrationSpec | None,
    choice: Choice | None,
    faults: list[UserError],
) -> BudgetPlan | None:
    """The plan of the choice, or None where nothing is chosen; adds to ``faults`` why it cannot be made."""
    section = loaded.recipe.weights.budget
    if section is None or calibration is None or not groups:
        return None
    if calibration.num_samples < _LEAST_ROWS:
        what = f"{calibration.num_samples} rows of text are too few to judge a choice on"
        faults.append(
            UserError(what, where="calibration.num_samples", fix=f"set it to {_LEAST_ROWS} or more")
        )
    if any(takes(claim) for claim in claims):
        what = "solver llmcompressor reads and solves the model by itself, after schemes are known"
        faults.append(UserError(what, where="weights.solver", fix="take rtn or gptq with scheme auto"))
    goal = plan_goal(section, claims, groups, source.config, loaded.recipe.kv_cache, faults)
    if goal is None:
        return None
    bounds = loaded.recipe.workspace
    plain = [replace(claim, scheme=None, solver=None) for claim in claims]
    most = None if bounds is None else bounds.max_memory_bytes
    walk = plan_walk(plain, calibration, source.config, most)
    width = DTYPE_BYTES[walk.walk.dtype] * hidden_size(source.config)
    solver = loaded.recipe.weights.solver
    job = SensitivityJob(
        groups,
        solver if not solver.needs_calibration else parse_solver("rtn"),
        calibration,
        walk.walk,
        walk.device,
        loaded.recipe.seed,
        tuple(cache.format for cache in goal.caches),
    )
    states = len(walk.blocks) * job.heard * calibration.sequence_length * width
    if states > _STATES_SHARE * max(1, _free_bytes(most)):
        job = replace(job, walk=replace(walk.walk, states="disk"))
    provisional = sum(group.options[0].nbytes for group in groups)
    return BudgetPlan(job, goal, walk, choice, provisional, states)


def _free_bytes(most: int | None) -> int:
    from compressor.device import available_memory_bytes

    free = available_memory_bytes()
    return free if most is None else min(free, most)


def plan_cache(
    recipe: Recipe,
    choice: Choice | None,
    config: dict[str, Any],
    faults: list[UserError],
    warnings: list[str],
) -> KvPlanned | None:
    """The KV cache as ``kv_cache`` says it, or in the format that was chosen with the weights."""
    section, budget = recipe.kv_cache, recipe.weights.budget
    if budget is not None and choice is not None and choice.kv_format not in (None, BF16):
        points = {"contexts": (budget.context,), "users": (budget.users or 1,)}
        section = KvCacheSection.model_validate({"format": choice.kv_format, **points})
    return None if section is None else plan_kv(section, config, faults, warnings)
