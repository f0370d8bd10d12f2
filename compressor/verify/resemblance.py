"""How a decoded matrix relates to the one that it was made from, as a whole and group by group.

Legend: O out_features, I in_features, N groups, C channels of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Data-free rounding takes the nearest value; decoded ones are rounded themselves (to bfloat16, at worst), so
# that much of a group's range is no difference.
TIE = 0.01
# Looked at one by one: groups of this many weights in all, and any of so many times the mean relative error.
SAMPLED_WEIGHTS = 1 << 16
UNUSUAL = 4.0


@dataclass(frozen=True)
class Resemblance:
    """How a decoded matrix relates to its source.

    Attributes:
        relative: squared error over the source's squared norm.
        gain: projection of the decoded matrix onto the source, over the source's squared norm, less 1.
        excess: squared error over what it would be if each weight had the nearest of its group's decoded
            values; in a sample of groups.
        astray: fraction of weights that have a farther one; in the same sample.
        groups: groups that hold such weights, among the sample and those of unusual error.
    """

    relative: float
    gain: float
    excess: float
    astray: float
    groups: int


def resemblance(decoded_OI: torch.Tensor, source_OI: torch.Tensor, group: tuple[int, int]) -> Resemblance:
    """Compares two fp32 matrices; ``group``: rows and columns that share a scale.

    A scale off by two, a swapped nibble or a stray code gives some weight a value although another weight
    of the same group holds one that is nearer. Rounding to nearest never does, whatever its scales. Sorting
    every group would take longer than compressing did, so some are looked at, and all that stand out.
    """
    decoded_NC, source_NC = (_grouped(values_OI, *group) for values_OI in (decoded_OI, source_OI))
    error_N = (decoded_NC - source_NC).square_().sum(-1)
    energy_N = source_NC.square().sum(-1)
    error, energy = float(error_N.double().sum()), float(energy_N.double().sum())
    relative = error / energy if energy else error
    product = float((decoded_NC * source_NC).sum(-1).double().sum())
    # NaN compares false with everything, so it stands out.
    unusual_N = ~(error_N <= UNUSUAL * relative * energy_N)
    sampled_N = unusual_N.new_zeros(unusual_N.shape)
    sampled_N[:: max(1, source_NC.numel() // SAMPLED_WEIGHTS)] = True
    miss_NC, nearest_NC, astray_NC = _nearness(decoded_NC[sampled_N], source_NC[sampled_N])
    least = float(nearest_NC.double().square().sum())
    excess = float(miss_NC.double().square().sum()) / least if least else 1.0
    others_N = unusual_N & ~sampled_N
    *_, others_NC = _nearness(decoded_NC[others_N], source_NC[others_N])
    return Resemblance(
        relative=relative,
        gain=product / energy - 1.0 if energy else 0.0,
        excess=excess,
        astray=float(astray_NC.float().mean()),
        groups=int(astray_NC.any(dim=1).sum()) + int(others_NC.any(dim=1).sum()),
    )


def _nearness(
    decoded_NC: torch.Tensor, source_NC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, C] distances to the own value and to the nearest of the group's, and whether they differ."""
    import torch

    ordered_NC = decoded_NC.sort(dim=-1).values
    place_NC = torch.searchsorted(ordered_NC, source_NC).clamp_(1, ordered_NC.shape[1] - 1)
    below_NC = (ordered_NC.gather(1, place_NC - 1) - source_NC).abs_()
    nearest_NC = torch.minimum(below_NC, (ordered_NC.gather(1, place_NC) - source_NC).abs_())
    miss_NC = (decoded_NC - source_NC).abs_()
    allowed_N1 = TIE * ordered_NC[:, [0, -1]].abs().amax(dim=1, keepdim=True)
    return miss_NC, nearest_NC, ~(miss_NC - nearest_NC <= allowed_N1)


def _grouped(values_OI: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, C]: the matrix as groups; a last group that is cut short is filled with zeros."""
    import torch

    height, width = values_OI.shape
    padded_OI = torch.nn.functional.pad(values_OI, (0, -width % columns, 0, -height % rows))
    blocks = padded_OI.view(-(-height // rows), rows, -(-width // columns), columns)
    return blocks.transpose(1, 2).reshape(-1, rows * columns)
