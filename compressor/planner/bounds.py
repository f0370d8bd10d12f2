"""What a plan will cost, within what its recipe allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.checkpoint.base import Source, fetched_files
from compressor.errors import UserError
from compressor.evals.base import EvalSpec
from compressor.planner.adapted import AdaptPlan
from compressor.planner.budgeted import BudgetPlan
from compressor.planner.calibrated import WalkPlan
from compressor.planner.context import ContextPlan
from compressor.planner.context_search import SearchPlan
from compressor.planner.disk import bounded
from compressor.planner.drafted import DraftPlan
from compressor.planner.kv_job import KvStage
from compressor.planner.oneshot import OneshotPlan
from compressor.planner.places import check_memory
from compressor.planner.polished import PolishPlan
from compressor.planner.predict import Prediction, predict
from compressor.recipe.model import WorkspaceSection
from compressor.stages.base import Claim, Shard


@dataclass(frozen=True)
class Parts:
    """What a plan has beside the stream; None for what it has not."""

    evaluation: EvalSpec | None
    adapters: AdaptPlan | None
    walk: WalkPlan | None
    oneshot: OneshotPlan | None
    polish: PolishPlan | None
    kv: KvStage | None
    context: ContextPlan | None = None
    drafts: DraftPlan | None = None
    budget: BudgetPlan | None = None

    @property
    def search(self) -> SearchPlan | None:
        """For factors of longer contexts."""
        return None if self.context is None else self.context.search

    @property
    def needs_whole(self) -> str:
        """What loads the whole source from the disk, as a fault names it; "" for nothing."""
        parts: dict[str, object] = {
            "evaluate": self.evaluation,
            "adapters": self.adapters,
            "solver llmcompressor": self.oneshot,
            "weights.polish": self.polish,
            "kv_cache": self.kv and self.kv.walk,
            "context.search": self.search,
            "drafts": self.drafts,
            "weights.scheme auto": self.budget,
        }
        return ", ".join(name for name, part in parts.items() if part is not None)


def predict_bounded(
    bounds: WorkspaceSection | None,
    source: Source,
    claims: Sequence[Claim],
    shards: Sequence[Shard],
    parts: Parts,
    faults: list[UserError],
    warnings: list[str],
) -> tuple[Prediction, bool]:
    """The prediction, and whether what is fetched of the source is removed when it is read no more.

    Adds to ``faults`` and ``warnings`` what there is to say of the recipe's bounds.
    """
    bounds = bounds or WorkspaceSection()
    files = fetched_files(source)
    download = 0 if files is None else sum(files.file_bytes.values())
    units = [unit for shard in shards for unit in shard.units]
    prediction = predict(claims, units, source.config, download)
    for part in (
        parts.adapters,
        parts.walk,
        parts.oneshot,
        parts.polish,
        parts.kv,
        parts.search,
        parts.drafts,
        parts.budget,
    ):
        if part is not None:
            prediction = part.add_to(prediction)
    check_memory(prediction.peak_rss_bytes, claims, parts.evaluation, bounds.max_memory_bytes, faults)
    needs_whole, most = parts.needs_whole, bounds.max_bytes
    prediction, evicts = bounded(
        prediction, source, claims, shards, parts.walk, needs_whole=needs_whole, max_bytes=most, faults=faults
    )
    if evicts and parts.walk is not None:
        warnings.append(
            "workspace.max_bytes does not hold the source: it is downloaded once to be walked, and the files "
            "with tensors that stay in 16 bit once more"
        )
    return prediction, evicts
