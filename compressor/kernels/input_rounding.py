"""What the compiled twins of ``schemes.inputs.round_rows`` share: a signature, and which one inputs take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from compressor.kernels import compiled, on_cuda

if TYPE_CHECKING:
    import torch

    from compressor.numerics.grids import Grid

# ``stored``: the scale is given. ``own``: of each group, from its largest value. ``e4m3``: the same, rounded
# to E4M3 times a given tensor-level scale.
ScaleKind = Literal["stored", "own", "e4m3"]


class RoundGroups(Protocol):
    """Inputs [N, I] rounded, in their own dtype."""

    def __call__(
        self,
        x_NI: torch.Tensor,
        size: int,
        grid: Grid,
        kind: ScaleKind,
        given: torch.Tensor | None,
        *,
        half_range: float,
        smallest: float,
    ) -> torch.Tensor:
        """See ``input_rounding_cuda.round_groups``."""


def twin_for(x_NI: torch.Tensor) -> RoundGroups | None:
    """The compiled function for inputs that lie where these do; None where torch has to do it."""
    if on_cuda(x_NI):
        from compressor.kernels.input_rounding_cuda import round_groups as on_device

        return on_device
    if compiled(x_NI):
        from compressor.kernels.input_rounding_cpu import round_groups as on_host

        return on_host
    return None
