"""What the result stores for the tensors of prediction layers, once these have been trained.

The plan's claims say it, as for every tensor: copied in 16 bit, or quantized where rules ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.dialects.base import Dialect
from compressor.errors import CheckpointError
from compressor.model.names import extract
from compressor.stages.base import Claim, Unit
from compressor.stages.importance import norm_importance
from compressor.stages.stream import jobs_of

if TYPE_CHECKING:
    import torch


def stored_predictions(
    source: Source, tensors: Mapping[str, torch.Tensor], claims: Iterable[Claim], dialect: Dialect
) -> dict[str, torch.Tensor]:
    """Name -> tensor of the result for each of these source tensors, in the claims' order.

    Args:
        source: whose tensors they were.
        tensors: by their names in the source, in its dtypes and shapes.
        claims: of the whole source; none of these tensors is kept as the source compresses it.
        dialect: how the result spells what schemes store.

    Raises:
        CheckpointError: a tensor that no claim is about, or that the source stores compressed.
    """
    concerned = [claim for claim in claims if claim.tensor.name in tensors]
    unknown = tensors.keys() - {claim.tensor.name for claim in concerned}
    if unknown:
        raise CheckpointError("the plan has no claim for a trained tensor", where=min(unknown))
    stored: dict[str, torch.Tensor] = {}
    for job in jobs_of(Unit(tuple(concerned))):
        claim = job.claims[0]
        if claim.kept is not None:
            raise CheckpointError(
                "a tensor that stays as the source compresses it cannot be trained",
                where=claim.tensor.name,
                fix="set model.from to dequantize",
            )
        if not job.parts:
            stored |= {output.name: tensors[claim.tensor.name] for output in claim.outputs}
            continue
        scheme, solver = claim.scheme, claim.solver
        assert scheme is not None
        assert solver is not None
        weights_OI = [extract(tensors[member.tensor.name], part) for member, part in job.parts]
        norm, width = claim.role.input_norm, job.parts[0][1].in_features
        importance_I = norm_importance(source, norm, width, tensors)
        for (_, part), solved in zip(job.parts, solver.solve(weights_OI, scheme, importance_I), strict=True):
            for local, tensor in dialect.spell(scheme, solved.tensors).items():
                stored[f"{part.module}.{local}"] = tensor
    return stored
