"""The sources that a plan's finished stages have made of the one that was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.checkpoint.adapted import AdaptedSource
from compressor.checkpoint.base import Source
from compressor.checkpoint.folded import FOLD_NAME, FoldedSource, KvFold
from compressor.stages.context import reconfigured

if TYPE_CHECKING:
    from compressor.planner.plan import Plan


def base_source(plan: Plan) -> Source:
    """What the stages before the weights read, once those before are finished: the source under its config,
    as its adapters have changed it.
    """
    trained, adapters = trained_source(plan), plan.adapters
    if adapters is None or not adapters.spec.merge:
        return trained
    key = adapters.key(plan.scaled_source)
    return AdaptedSource(trained, plan.workspace.artefact("adapt", key), key)


def trained_source(plan: Plan) -> Source:
    """What adapters are trained on, once ``context`` is finished: the source under its config."""
    return scaled_source(plan) or plan.source


def scaled_source(plan: Plan) -> Source | None:
    """The source as it was given but for its config, which stage ``context`` has written; None without."""
    if plan.context is None:
        return None
    key = plan.context.key(plan.source.fingerprint)
    return reconfigured(plan.source, plan.workspace.artefact("context", key))


def weights_source(plan: Plan) -> Source:
    """What weights are read from: the same, or the same as the finished stage ``kv`` has folded it."""
    base, stage = base_source(plan), plan.kv_stage
    if stage is None or not stage.job.folds:
        return base
    folder = plan.workspace.artefact("kv", stage.key(plan.base_source))
    return FoldedSource(base, KvFold.read(folder)) if (folder / FOLD_NAME).is_file() else base
