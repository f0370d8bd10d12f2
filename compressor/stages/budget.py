"""Chooses the scheme of every group under a budget, from what the stage ``sensitivity`` measured.

Under a budget of bytes the choice is one exact knapsack. Under a bound on the loss it is a search: the
smallest mix is judged, then the size at which the predicted cost would meet the bound, and so on between what
failed and what passed. Judging solves nothing: every option's values are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from compressor.budget.knapsack import Mix, Option, best_mix, mix_of, random_mix, smallest_mix, uniform_mix
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.progress import Progress
from compressor.stages.budget_judge import Judge, Judged
from compressor.stages.budget_spec import COPY, Goal, Group, SensitivityJob, Stored
from compressor.stages.sensitivity import cache_name, measured_costs
from compressor.stages.tokens import calibration_tokens
from compressor.workspace import write_json

# Mixes that a search for a loss judges, and how near in size what failed and what passed may come before it
# ends.
_MOST_JUDGED = 8
_NEAR = 0.004
_RANDOM = 2
_FRONTIER = 24


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        schemes: group -> name of its option.
        kv_format: of the KV cache, where it was chosen too; else None.
    """

    schemes: Mapping[str, str]
    kv_format: str | None = None


def budget_stage(
    source: Source, job: SensitivityJob, goal: Goal, sensed: Path, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Facts: ``choice`` (``Choice``) and ``budget`` (as ``report.budget.BudgetFacts``).

    Args:
        source: the checkpoint.
        job: of the stage ``sensitivity``.
        goal: what the choice must keep to.
        sensed: that stage's folder.
        folder: of this one; mixes that were judged are kept in it for a rerun.
        progress: told each mix.

    Raises:
        CheckpointError: solved values changed since they were written.
        UserError: no mix keeps to the goal.
    """
    ids_NT = calibration_tokens(source, job.calibration, sensed, progress).ids_NT
    judge = Judge(source, ids_NT[job.heard :], job.groups, job.walk, job.seed, sensed, progress)
    work = Choosing(job, goal, measured_costs(sensed), judge, folder)
    kv_format = None
    if goal.max_increase is not None:
        chosen = work.within_loss()
    elif goal.caches:
        chosen, kv_format = work.beside_cache()
    else:
        chosen = work.within_bytes()
    work.judge_controls(chosen)
    facts = {
        "goal": goal.said,
        "tokens_heard": job.heard * job.calibration.sequence_length,
        "tokens_judged": ids_NT[job.heard :].numel(),
        "groups": work.groups_told(chosen),
        "points": work.points(),
        "frontier": work.frontier(),
        "kv_format": kv_format,
        "caches": work.trades(),
    }
    return {"choice": asdict(Choice(work.named(chosen), kv_format)), "budget": facts}


class Measures(Protocol):
    """What a choice asks of ``Judge``."""

    def measure(self, chosen: Mapping[str, Stored], note: str) -> Judged:
        """What is lost with each group stored as ``chosen`` says; ``note`` names the mix for people."""
        ...


class Choosing:
    """The groups with their costs, and what was judged so far.

    Args:
        job: with the groups.
        goal: what the choice must keep to.
        costs: group -> option -> nats a token; None for a group that could not be tried.
        judge: measures mixes.
        folder: where what it found is kept.
    """

    def __init__(
        self,
        job: SensitivityJob,
        goal: Goal,
        costs: Mapping[str, Mapping[str, float] | None],
        judge: Measures,
        folder: Path,
    ) -> None:
        self._job, self._goal, self._judge, self._folder = job, goal, judge, folder
        self._stored: list[list[Stored]] = []
        self._options: list[list[Option]] = []
        for group in job.groups:
            known = costs.get(group.name)
            # What cannot be tried is stored as exactly as the candidates allow.
            stored = list(group.options) if known is not None else [group.options[-1]]
            self._stored.append(stored)
            self._options.append(
                [Option(of.name, of.nbytes, 0.0 if known is None else known[of.name]) for of in stored]
            )
        self._costs = costs
        self._judged: dict[tuple[int, ...], tuple[str, str, Judged]] = {}

    def within_bytes(self) -> Mix:
        """The best mix under a budget of bytes."""
        assert self._goal.group_bytes is not None
        mix = best_mix(self._options, self._goal.group_bytes)
        self._judge_mix(mix, "chosen", self._goal.said)
        return mix

    def beside_cache(self) -> tuple[Mix, str]:
        """The best mix and format of the KV cache that share a budget of bytes."""
        assert self._goal.group_bytes is not None
        found = best_mix([*self._options, self._caches()], self._goal.group_bytes)
        mix = mix_of(self._options, found.chosen[:-1])
        self._judge_mix(mix, "chosen", self._goal.said)
        return mix, self._goal.caches[found.chosen[-1]].format

    def _caches(self) -> list[Option]:
        """The formats of the KV cache, with what they add to the loss in all layers that have them."""
        found = []
        for cache in self._goal.caches:
            costs = (self._costs[cache_name(layer)] or {} for layer in cache.layers)
            found.append(Option(cache.format, cache.nbytes, sum(of[cache.format] for of in costs)))
        return found

    def trades(self) -> list[dict[str, Any]]:
        """The best mix beside each format of the KV cache that leaves room for any."""
        told = []
        for cache in self._caches():
            assert self._goal.group_bytes is not None
            try:
                mix = best_mix(self._options, self._goal.group_bytes - cache.nbytes)
            except UserError:
                continue
            told.append(
                {
                    "format": cache.name,
                    "cache_bytes": cache.nbytes,
                    "cache_kl": cache.cost,
                    **self._size(mix),
                }
            )
        return told

    def within_loss(self) -> Mix:
        """The smallest mix found that keeps to the loss, judged as the chosen one.

        Raises:
            UserError: not even the largest one does.
        """
        assert self._goal.max_increase is not None
        limit = self._goal.max_increase
        mix: Mix | None = best_mix(self._options, sum(min(o.nbytes for o in of) for of in self._options))
        passed, failed = self._most_exact(), None
        while mix is not None and len(self._judged) < _MOST_JUDGED:
            judged = self._judge_mix(mix, "tried", f"{self._goal.bits(mix.nbytes):.3f} bits")
            if judged.upper <= limit:
                passed = mix
            else:
                failed = mix
            if failed is None:
                break
            mix = self._between(failed, passed, limit)
        if passed.chosen not in self._judged and self._judge_mix(passed, "tried", "largest").upper > limit:
            raise UserError(
                f"no mix of the candidates keeps the perplexity within {limit:.2%} on calibration text",
                where="weights.budget.max_perplexity_increase",
                fix="add `copy` to weights.candidates, or allow more",
            )
        label, judged = self._goal.said, self._judged[passed.chosen][2]
        self._judged[passed.chosen] = ("chosen", label, judged)
        return passed

    def _between(self, failed: Mix, passed: Mix, limit: float) -> Mix | None:
        """The mix to judge next: of the cost that would just do, if the loss is what the costs say it is.

        None where what failed and what passed are near each other.
        """
        if passed.nbytes - failed.nbytes <= _NEAR * passed.nbytes:
            return None
        upper = self._judged[failed.chosen][2].upper
        # Losses by cost of the two ends; the largest mix, which was not judged, is taken to lose nothing.
        at = self._judged.get(passed.chosen)
        low = 0.0 if at is None else at[2].upper
        share = min(0.9, max(0.1, (limit - low) / (upper - low))) if upper > low else 0.5
        mix = smallest_mix(self._options, passed.cost + share * (failed.cost - passed.cost))
        return mix if failed.nbytes < mix.nbytes < passed.nbytes else None

    def _most_exact(self) -> Mix:
        """The mix of least cost, whatever it takes."""
        return best_mix(self._options, sum(max(o.nbytes for o in of) for of in self._options))

    def judge_controls(self, chosen: Mix) -> None:
        """Judges each scheme by itself, and random mixes of as many bytes as the chosen one."""
        names = {option.name for of in self._options for option in of} - {COPY}
        for name in sorted(names):
            mix = uniform_mix(self._options, name)
            if mix is not None:
                judged = self._judge_mix(mix, "uniform", name)
                if self._judged[mix.chosen][0] == "tried":
                    self._judged[mix.chosen] = ("uniform", name, judged)
        for seed in range(_RANDOM):
            mix = random_mix(self._options, chosen.nbytes, self._job.seed + seed)
            self._judge_mix(mix, "random", f"seed {self._job.seed + seed}")

    def _judge_mix(self, mix: Mix, kind: str, label: str) -> Judged:
        """The mix's loss; of a mix that was judged before, what was found then."""
        if mix.chosen not in self._judged:
            stored = {
                group.name: of[number]
                for group, of, number in zip(self._job.groups, self._stored, mix.chosen, strict=True)
            }
            spelt = json.dumps({name: option.name for name, option in stored.items()}, sort_keys=True)
            path = self._folder / f"judged-{sha256(spelt.encode()).hexdigest()[:16]}.json"
            if not path.is_file():
                write_json(path, asdict(self._judge.measure(stored, label)))
            facts = json.loads(path.read_text())
            interval = facts["increase_ci95"]
            judged = Judged(facts["kl"], facts["increase"], None if interval is None else tuple(interval))
            self._judged[mix.chosen] = (kind, label, judged)
        return self._judged[mix.chosen][2]

    def named(self, mix: Mix) -> dict[str, str]:
        """Group -> name of its option."""
        return {
            group.name: of[number].name
            for group, of, number in zip(self._job.groups, self._stored, mix.chosen, strict=True)
        }

    def groups_told(self, mix: Mix) -> list[dict[str, Any]]:
        """Every group, its options and its choice, for the report."""
        names = self.named(mix)
        return [
            {
                "name": group.name,
                "parameters": group.parameters,
                "chosen": names[group.name],
                "options": [
                    {"scheme": of.name, "bytes": of.nbytes, "cost": self._cost(group, of)}
                    for of in group.options
                ],
            }
            for group in self._job.groups
        ]

    def _cost(self, group: Group, option: Stored) -> float | None:
        known = self._costs.get(group.name)
        return None if known is None else known[option.name]

    def points(self) -> list[dict[str, Any]]:
        """The mixes that were judged, fewest bytes first."""
        found = []
        for chosen, (kind, label, judged) in self._judged.items():
            mix = mix_of(self._options, chosen)
            found.append({"kind": kind, "label": label, **self._size(mix), **asdict(judged)})
        return sorted(found, key=lambda point: (point["bytes"], point["predicted_kl"]))

    def frontier(self) -> list[dict[str, Any]]:
        """Best mixes between the smallest and the most exact one."""
        first = sum(min(o.nbytes for o in of) for of in self._options)
        last = self._most_exact().nbytes
        budgets = {first + (last - first) * step // _FRONTIER for step in range(_FRONTIER + 1)}
        mixes = {best_mix(self._options, budget).chosen for budget in budgets}
        told = [self._size(mix_of(self._options, chosen)) for chosen in mixes]
        return sorted(told, key=lambda size: size["bytes"])

    def _size(self, mix: Mix) -> dict[str, Any]:
        return {
            "bytes": self._goal.fixed_bytes + mix.nbytes,
            "bits_per_target_weight": self._goal.bits(mix.nbytes),
            "predicted_kl": mix.cost,
        }


def choice_of(facts: Mapping[str, Any]) -> Choice:
    """The choice that the stage's facts tell."""
    return Choice(dict(facts["choice"]["schemes"]), facts["choice"]["kv_format"])


def stored_as(groups: Sequence[Group], choice: Choice) -> dict[str, Stored]:
    """Source tensor -> how it is stored."""
    return {
        claim.tensor.name: next(of for of in group.options if of.name == choice.schemes[group.name])
        for group in groups
        for claim in group.claims
    }
