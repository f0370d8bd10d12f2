"""Content keys of a plan's large stages."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from compressor.planner.calibrated import walk_key
from compressor.planner.oneshot import oneshot_key
from compressor.planner.polished import polish_key
from compressor.workspace import stage_key

if TYPE_CHECKING:
    from compressor.planner.plan import Plan

STREAM_VERSION = 1


def own_stages(plan: Plan) -> set[str]:
    """Folders of the workspace that the plan's large artefacts are in, finished or not."""
    walk, source = plan.walk, plan.weights_source
    walked = set() if walk is None else {f"walk-{walk_key(walk, plan.claims, source)}"}
    if plan.budget is not None:
        walked.add(f"sensitivity-{plan.budget.sensitivity_key(plan.base_source)}")
    return walked | {f"stream-{stream_key(plan)}"}


def stream_key(plan: Plan) -> str:
    """Content key of the weights stage: the source and every claim, not the recipe's spelling of them."""
    spec = {
        "claims": [
            [
                claim.tensor.name,
                claim.action,
                claim.scheme.model_dump(mode="json") if claim.scheme else None,
                claim.solver.model_dump(mode="json") if claim.solver else None,
                asdict(claim.role),
                [[output.name, output.dtype, output.shape] for output in claim.outputs],
            ]
            for claim in plan.claims
        ],
        "shards": [len(shard.units) for shard in plan.shards],
        "seed": plan.loaded.recipe.seed,
    }
    if plan.dialect.name != "compressed-tensors":
        # Left out for the first dialect: its stages from before there were others stay valid.
        spec["dialect"] = plan.dialect.name
    needs = [plan.weights_source]
    if plan.oneshot is not None:
        needs.append(oneshot_key(plan.oneshot, plan.claims, plan.base_source))
    if plan.walk is not None:
        walked = walk_key(plan.walk, plan.claims, plan.weights_source)
        needs.append(walked if plan.polish is None else polish_key(plan.polish, walked))
    return stage_key("stream", STREAM_VERSION, spec, needs)
