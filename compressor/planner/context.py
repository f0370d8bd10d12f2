"""What the recipe's ``context`` section adds to a plan: the scaled config, its source, its key, its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import FactorySource
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.errors import UserError
from compressor.evals.base import EvalSpec
from compressor.planner.context_search import SearchPlan, plan_search
from compressor.planner.kv_bytes import full_context
from compressor.recipe.context import ContextSection
from compressor.recipe.load import LoadedRecipe
from compressor.recipe.model import Recipe
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.search import SearchSpace
from compressor.stages.base import Claim
from compressor.stages.context import ContextJob
from compressor.workspace import stage_key

CONTEXT_VERSION = 1


@dataclass(frozen=True)
class ContextPlan:
    """The stage of a plan.

    Attributes:
        job: what it is told.
        original_length: tokens that the source was trained at.
        measured_tokens: on which the evaluation will tell what scaling alone costs, or 0 where nothing else
            is changed, or nothing measured.
        search: for factors, or None.
    """

    job: ContextJob
    original_length: int
    measured_tokens: int = 0
    search: SearchPlan | None = None

    def source(self, source: Source) -> ReconfiguredSource:
        """The source under the config that is planned."""
        scaled = self.job.scaled
        return ReconfiguredSource(source, dict(scaled.config), scaled.length)

    def key(self, source: str) -> str:
        """Content key; ``source`` is the source's."""
        told = self.job.content
        if self.search is not None:
            # A factor may reach further than the target, which documents are cut to by default.
            told |= {"device": self.search.device, "tokens": self.search.tokens}
        return stage_key("context", CONTEXT_VERSION, told, [source])

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        scaled, spec = self.job.scaled, self.job.spec
        smallest = " (the smallest that reaches it)" if self.is_smallest else ""
        lines = [
            f"{self.original_length:,} -> {scaled.length:,} tokens, {spec.method}, factor "
            f"{scaled.factor:g}{smallest}",
            *scaled.notes,
            *(self.search.described() if self.search else ()),
        ]
        if self.measured_tokens:
            lines.append(
                f"what scaling alone costs is measured on {self.measured_tokens:,} tokens in windows of "
                "evaluate.context: the source twice more, in 16 bit"
            )
        return tuple(lines)

    @property
    def is_smallest(self) -> bool:
        """Whether a smaller factor would not reach as far as was asked."""
        return self.job.scaled.length <= self.job.spec.target_length

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``compress plan --json``."""
        scaled, spec = self.job.scaled, self.job.spec
        return {
            "method": spec.method,
            "original_length": self.original_length,
            "target_length": spec.target_length,
            "length": scaled.length,
            "factor": scaled.factor,
            "is_smallest_factor": self.is_smallest,
            "measured_tokens": self.measured_tokens,
            "notes": list(scaled.notes),
            "search": self.search and self.search.to_json(),
        }


def plan_context(section: ContextSection, source: Source, loaded: LoadedRecipe) -> ContextPlan:
    """The section against the source; ``loaded`` is the recipe that it is of.

    Raises:
        UserError: its positions cannot be scaled so.
        CheckpointError: its config has no rotary positions.
        PlanError: factors cannot be searched on the files that it names.
    """
    if isinstance(source, FactorySource):
        raise UserError(
            f"{source.factory} makes the model: which of its arguments scale positions is not known",
            where="context",
            fix="remove the section, and set the arguments in config.json",
        )
    spec = section.spec()
    search, first = None, spec
    if section.search is not None:
        space = SearchSpace.of(source.config, spec)
        search = plan_search(section.search, loaded, space, spec)
        # The lengths are what everything is planned by, and they are the same whatever is found.
        first = space.seeds()[0].context(spec)
    scaled = scaled_config(source.config, first)
    positions = read_positions(source.config)
    stated = positions.length if positions.rope_type == "default" else positions.original_length
    original = spec.original_length or stated
    assert original is not None, "scaled_config refuses a length that nobody tells"
    return ContextPlan(
        ContextJob(spec, scaled, None if search is None else search.spec), original, search=search
    )


def planned_reach(recipe: Recipe, config: dict[str, Any]) -> int | None:
    """Tokens that the result reads; None where nobody says.

    Where positions cannot be scaled, what was asked for: that fault is told once, not again of every length.

    Args:
        recipe: what is asked.
        config: of the source, scaled where it can be.
    """
    longest, section = full_context(config), recipe.context
    return longest if section is None or longest is None else max(longest, section.target_length)


def configured_source(context: ContextPlan | None, source: Source) -> Source:
    """What stages read as far as the plan knows: the source, under another config where it is scaled."""
    return source if context is None else context.source(source)


def context_key(context: ContextPlan | None, fingerprint: str) -> str:
    """Content key of the same."""
    return fingerprint if context is None else context.key(fingerprint)


def settled_context(
    context: ContextPlan | None,
    claims: Sequence[Claim],
    config: dict[str, Any],
    evaluation: EvalSpec | None,
    warnings: list[str],
    *,
    changed: bool,
) -> ContextPlan | None:
    """The stage once all is planned; adds to ``warnings`` what is to be known before hours are spent.

    ``changed``: whether weights change otherwise than by their schemes.
    """
    if context is None:
        return None
    if context.search is not None:
        context = replace(context, search=context.search.costed(claims, config))
        warnings += context.search.warnings() if context.search else []
    scaled, target = context.job.scaled, context.job.spec.target_length
    if not context.is_smallest:
        warnings.append(
            f"context.factor {scaled.factor:g} reaches {scaled.length:,} tokens; {target:,} need "
            f"{target / context.original_length:g}, and larger factors cost short prompts more"
        )
    if evaluation is None:
        return context
    if evaluation.context > context.original_length:
        warnings.append(
            f"evaluate.context of {evaluation.context:,} is beyond the {context.original_length:,} tokens "
            "that the source was trained at: there it tells nothing of what short prompts lose"
        )
    changed = changed or any(map(_is_changed, claims))
    return replace(context, measured_tokens=(evaluation.tokens or 0) if changed else 0)


def _is_changed(claim: Claim) -> bool:
    narrowed = any(output.dtype != claim.tensor.dtype for output in claim.outputs)
    return claim.scheme is not None or claim.kept is not None or narrowed
