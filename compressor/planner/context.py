"""What the recipe's ``context`` section adds to a plan: the scaled config, its source, and its key."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import FactorySource
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.errors import UserError
from compressor.planner.kv_bytes import full_context
from compressor.recipe.context import ContextSection
from compressor.rope.scaled import scaled_config
from compressor.stages.context import ContextJob
from compressor.workspace import stage_key

CONTEXT_VERSION = 1


@dataclass(frozen=True)
class ContextPlan:
    """The stage of a plan.

    Attributes:
        job: what it is told.
        original_length: tokens that the source reads.
    """

    job: ContextJob
    original_length: int | None

    def source(self, source: Source) -> ReconfiguredSource:
        """The source under the config that is planned."""
        scaled = self.job.scaled
        return ReconfiguredSource(source, dict(scaled.config), scaled.length)

    def key(self, source: str) -> str:
        """Content key; ``source`` is the source's."""
        return stage_key("context", CONTEXT_VERSION, self.job.content, [source])


def plan_context(section: ContextSection, source: Source) -> ContextPlan:
    """The section against the source.

    Raises:
        UserError: its positions cannot be scaled so.
    """
    if isinstance(source, FactorySource):
        raise UserError(
            f"{source.factory} makes the model: which of its arguments scale positions is not known",
            where="context",
            fix="remove the section, and set the arguments in config.json",
        )
    spec = section.spec()
    scaled = scaled_config(source.config, spec)
    original = spec.original_length or full_context(source.config)
    return ContextPlan(ContextJob(spec, scaled), original)


def configured_source(context: ContextPlan | None, source: Source) -> Source:
    """What stages read as far as the plan knows: the source, under another config where it is scaled."""
    return source if context is None else context.source(source)


def context_key(context: ContextPlan | None, fingerprint: str) -> str:
    """Content key of the same."""
    return fingerprint if context is None else context.key(fingerprint)
