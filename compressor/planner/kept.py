"""What does not go with tensors that stay as the source stores them."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.dialects.base import Dialect
from compressor.errors import UserError
from compressor.stages.base import Claim


def kept_faults(claims: Sequence[Claim], dialect: Dialect, *, polished: bool) -> list[UserError]:
    """Parts of a recipe that would have to change kept tensors, or could not write them."""
    kept = next((claim.tensor.name for claim in claims if claim.kept is not None), None)
    if kept is None:
        return []
    solvers = {claim.rule: claim.solver for claim in claims if claim.solver is not None}
    faults = []
    for key, solver in solvers.items():
        what = "smooth" if solver.smoothing is not None else solver.kind
        if what in ("smooth", "llmcompressor"):
            where = "weights.solver" if key == "weights.scheme" else f"{key}.solver"
            faults.append(
                _fault(f"solver {what} would change the matrices that model.from keeps", where, kept)
            )
    if polished:
        faults.append(_fault("polish trains around matrices that model.from keeps", "weights.polish", kept))
    if dialect.name != "compressed-tensors":
        what = f"format {dialect.name} has no form for matrices that model.from keeps"
        faults.append(_fault(what, "export.format", kept))
    return faults


def _fault(what: str, where: str, example: str) -> UserError:
    return UserError(
        f"{what} as compressed-tensors stores them, such as {example}",
        where=where,
        fix="set `model.from: dequantize`, or leave this out",
    )
