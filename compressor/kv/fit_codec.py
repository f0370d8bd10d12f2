"""How a ``FittedCodec`` is found: coordinates in which errors count alike, and centroids in groups of them.

An error ``e`` of a stored vector moves the loss by ``g e`` to first order, with ``g`` its gradient there: on
average over tokens by ``e M e``, M = E[g g]. Where no gradients are at hand, M is what queries do to keys and
the output projection to values. Coordinates are the principal axes of ``M^(1/2) x``, which reverse
water-filling asks for (Cover and Thomas, section 10.3.3); bytes are shared out so that each has as many bits
of them to carry, and a byte's 256 centroids are found by k-means from the product of Lloyd-Max levels, over
tokens weighted by how much they count (several coordinates in a code, and weights: CQ, arXiv 2405.03917).

Legend: N tokens, E elements of a token in all heads, C coordinates, G groups (one byte each), K centroids,
P coordinates of the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from compressor.kv.fitted import CENTROIDS, MOST_IN_GROUP, FittedCodec
from compressor.numerics.lloyd_max import gaussian_levels

BITS = 8
# Squared error of the Gaussian's Lloyd-Max levels at 0..8 bits (Max, 1960); times 4 a bit beyond.
_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000641, 0.000163, 0.0000413)
_EXACT_LEVELS = 5

# M is an estimate from few texts: a share of its mean is added, so that no direction counts for nothing.
_RIDGE = 0.05
# Half of each token's weight is one, half how much it counts, which is capped: few tokens carry most of it.
_WEIGHT_SHARE = 0.5
_MOST_WEIGHT = 20.0
_LEAST_BITS = 0.05  # of a coordinate, to be stored at all
_ROUNDS = 12
# Tokens whose distances to all centroids of a group are alive at once: they stay in the cache of a core.
_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Coordinates:
    """Vectors in coordinates in which all errors count alike.

    Attributes:
        mean_E: subtracted first, fp64.
        forward_EC: to coordinates, fp64; C = E.
        backward_CE: back, fp64.
        spread_C: variance of each, descending, fp64: in units of the loss.
    """

    mean_E: torch.Tensor
    forward_EC: torch.Tensor
    backward_CE: torch.Tensor
    spread_C: torch.Tensor


def token_weights(counts_N: torch.Tensor) -> torch.Tensor:
    """fp64 [N], of mean about one, from how much each token counts (squared gradient norms, or ones)."""
    counts_N = counts_N.double()
    relative_N = (counts_N / counts_N.mean().clamp_min(1e-300)).clamp_max(_MOST_WEIGHT)
    return (1 - _WEIGHT_SHARE) + _WEIGHT_SHARE * relative_N / relative_N.mean().clamp_min(1e-300)


def find_coordinates(x_NE: torch.Tensor, weights_N: torch.Tensor, metric_EE: torch.Tensor) -> Coordinates:
    """The coordinates of some tokens under a metric.

    Args:
        x_NE: keys or values.
        weights_N: from ``token_weights``.
        metric_EE: M, symmetric, without negative eigenvalues but for rounding.
    """
    x_NE, weights_N = x_NE.double(), weights_N.to(x_NE.device)[:, None]
    mean_E = (x_NE * weights_N).sum(0) / weights_N.sum()
    x_NE = x_NE - mean_E
    covariance_EE = (x_NE * weights_N).T @ x_NE / weights_N.sum()
    metric_EE = metric_EE.to(x_NE.device, torch.float64)
    ridge = _RIDGE * metric_EE.diagonal().mean().clamp_min(1e-30)
    values_E, vectors_EE = torch.linalg.eigh(metric_EE + ridge * torch.eye(len(metric_EE)).to(metric_EE))
    root_E = values_E.clamp_min(float(ridge) / 2).sqrt()
    into_EE = vectors_EE * root_E @ vectors_EE.T
    back_EE = vectors_EE / root_E @ vectors_EE.T
    spread_E, axes_EE = torch.linalg.eigh(into_EE @ covariance_EE @ into_EE)
    axes_EE, spread_E = axes_EE.flip(1), spread_E.flip(0)
    floor = spread_E[0].clamp_min(1e-30) * 1e-12
    return Coordinates(mean_E, into_EE @ axes_EE, axes_EE.T @ back_EE, spread_E.clamp_min(float(floor)))


def expected_errors(spread_C: torch.Tensor, most_bytes: int) -> torch.Tensor:
    """fp64 [most_bytes + 1]: the expected sum of squared errors with 0, 1, ... bytes a token.

    Of the best whole numbers of bits for each coordinate, as Gaussians: greedy, which is exact because each
    further bit gains less than the one before.
    """
    levels = spread_C.new_tensor(_DISTORTION)
    gains = (spread_C[:, None] * (levels[:-1] - levels[1:])).flatten().sort(descending=True).values
    steps = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    wanted = (torch.arange(most_bytes + 1, device=steps.device) * BITS).clamp_max(len(steps) - 1)
    return spread_C.sum() - steps[wanted]


def fit_codec(
    found: Coordinates,
    x_NE: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    token_bytes: int,
    kv_heads: int,
) -> FittedCodec:
    """A codec with ``token_bytes`` a token in all heads, a multiple of ``kv_heads``.

    Args:
        found: of these tokens.
        x_NE: the tokens that centroids are fitted to; 16 for each centroid are enough.
        weights_N: from ``token_weights``.
        token_bytes: at most E.
        kv_heads: of the layer.
    """
    elements = x_NE.shape[1]
    assert token_bytes % kv_heads == 0
    assert 0 < token_bytes <= elements
    members = share_out(found.spread_C, token_bytes)
    kept_C = torch.tensor(sorted(c for group in members for c in group), device=x_NE.device)
    of = {c: number for number, group in enumerate(members) for c in group}
    groups_C = torch.tensor([of[c] for c in kept_C.tolist()])
    forward_EC = found.forward_EC[:, kept_C]
    y_NC = ((x_NE.double() - found.mean_E) @ forward_EC).float()
    start_KC = _product_levels(found.spread_C.cpu(), members, kept_C.tolist()).to(y_NC)
    centroids_KC = _k_means(y_NC, weights_N.to(y_NC), groups_C.to(y_NC.device), start_KC)
    return FittedCodec(
        kv_heads=kv_heads,
        head_dim=elements // kv_heads,
        mean=found.mean_E.float().cpu(),
        forward=forward_EC.float().cpu().contiguous(),
        backward=found.backward_CE[kept_C].float().cpu().contiguous(),
        groups=groups_C,
        centroids=centroids_KC.cpu().contiguous(),
    )


def share_out(spread_C: torch.Tensor, groups: int) -> list[list[int]]:
    """The coordinates of each of so many bytes, which get as equal a number of bits to carry as can be.

    A coordinate's bits are those of reverse water-filling; what has next to none is left out. The largest
    come first, each to the byte that has the fewest bits so far.
    """
    log_C = spread_C.double().log2().cpu()
    low, high = float(log_C.min()) - 2 * BITS * groups, float(log_C.max())
    for _ in range(80):
        water = (low + high) / 2
        over = float((log_C - water).clamp_min(0).sum()) / 2
        low, high = (water, high) if over > BITS * groups else (low, water)
    bits = ((log_C - high).clamp_min(0) / 2).tolist()
    members: list[list[int]] = [[] for _ in range(groups)]
    loads = [0.0] * groups
    for coordinate in sorted(range(len(bits)), key=lambda c: -bits[c]):
        empty = [group for group in range(groups) if not members[group]]
        if bits[coordinate] < _LEAST_BITS and not empty:
            break
        free = empty or [group for group in range(groups) if len(members[group]) < MOST_IN_GROUP]
        if not free:
            break
        group = min(free, key=lambda g: loads[g])
        members[group].append(coordinate)
        loads[group] += bits[coordinate]
    return members


def _product_levels(spread_C: torch.Tensor, members: list[list[int]], kept: list[int]) -> torch.Tensor:
    """[K, C] centroids to start from: 8 bits a group, shared out greedily, Lloyd-Max levels of Gaussians."""
    made_KC = torch.zeros(CENTROIDS, len(kept))
    place = {coordinate: number for number, coordinate in enumerate(kept)}
    for group in members:
        bits = dict.fromkeys(group, 0)
        for _ in range(BITS):
            gain = {c: float(spread_C[c]) * (_DISTORTION[b] - _DISTORTION[b + 1]) for c, b in bits.items()}
            bits[max(group, key=gain.__getitem__)] += 1
        grids = [[level * float(spread_C[c]) ** 0.5 for level in _levels(bits[c])] for c in group]
        made_KC[:, [place[c] for c in group]] = torch.tensor(list(product(*grids)))
    return made_KC


def _levels(bits: int) -> tuple[float, ...]:
    """2**bits levels of N(0, 1): Lloyd-Max for few, for many those of the density's cube root (Bennett)."""
    if bits == 0:
        return (0.0,)
    if bits <= _EXACT_LEVELS:
        return gaussian_levels(bits)
    ranks = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels: list[float] = (3**0.5 * torch.special.ndtri(ranks)).tolist()
    return tuple(levels)


def _k_means(
    y_NC: torch.Tensor, weights_N: torch.Tensor, groups_C: torch.Tensor, start_KC: torch.Tensor
) -> torch.Tensor:
    """[K, C]: weighted k-means in all groups at once. A centroid that nothing is near stays where it is."""
    groups = int(groups_C.max()) + 1
    counts_G = torch.bincount(groups_C)
    places_GP = groups_C.new_full((groups, int(counts_G.max())), len(groups_C))
    order_C = torch.argsort(groups_C, stable=True)
    rank_C = torch.arange(len(groups_C)).to(groups_C) - (counts_G.cumsum(0) - counts_G)[groups_C[order_C]]
    places_GP[groups_C[order_C], rank_C] = order_C
    y_GNP = torch.nn.functional.pad(y_NC, (0, 1))[:, places_GP].transpose(0, 1).contiguous()
    book_GKP = torch.nn.functional.pad(start_KC, (0, 1))[:, places_GP].transpose(0, 1).contiguous()
    for _ in range(_ROUNDS):
        book_GKP = _moved(y_GNP, weights_N, book_GKP)
    made_KC = torch.empty_like(start_KC)
    made_KC[:, order_C] = book_GKP.transpose(0, 1)[:, groups_C[order_C], rank_C]
    return made_KC


def _moved(y_GNP: torch.Tensor, weights_N: torch.Tensor, book_GKP: torch.Tensor) -> torch.Tensor:
    """Centroids at the weighted means of what is nearest to them."""
    half_GK = book_GKP.square().sum(-1) / 2
    groups, _, width = book_GKP.shape
    nearest_GN = torch.empty(y_GNP.shape[:2], dtype=torch.int64, device=y_GNP.device)
    for y_NP, half_K, book_KP, nearest_N in zip(y_GNP, half_GK, book_GKP, nearest_GN, strict=True):
        for part_NP, out_N in zip(
            torch.split(y_NP, _CHUNK_TOKENS), torch.split(nearest_N, _CHUNK_TOKENS), strict=True
        ):
            # Distance, less what is the same for all centroids, halved and with the sign turned.
            out_N.copy_(torch.addmm(half_K, part_NP, book_KP.T, beta=-1).argmax(-1))
    mass_GK = torch.zeros(book_GKP.shape[:2]).to(book_GKP)
    mass_GK.scatter_add_(1, nearest_GN, weights_N.expand(groups, -1))
    sums_GKP = torch.zeros_like(book_GKP)
    sums_GKP.scatter_add_(1, nearest_GN[..., None].expand(-1, -1, width), y_GNP * weights_N[:, None])
    used_GK1 = mass_GK[..., None] > 0
    return torch.where(used_GK1, sums_GKP / mass_GK[..., None].clamp_min(1e-30), book_GKP)
