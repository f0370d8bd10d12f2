"""The fitted codec against a slow, obvious second implementation.

Legend: as in ``compressor/kv/fitted.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.kv.fitted import CENTROIDS, FittedCodec


def random_codec(heads: int, head_dim: int, groups: list[list[int]], /, **other: Any) -> FittedCodec:
    """A codec with random matrices; ``groups``: the coordinates of each byte."""
    made = torch.Generator().manual_seed(0)
    elements, coordinates = heads * head_dim, sum(map(len, groups))
    forward = torch.randn(elements, coordinates, generator=made) / elements**0.5
    of_C = torch.zeros(coordinates, dtype=torch.int64)
    for number, members in enumerate(groups):
        of_C[members] = number
    arguments: dict[str, Any] = {
        "kv_heads": heads,
        "head_dim": head_dim,
        "mean": torch.randn(elements, generator=made),
        "forward": forward,
        "backward": torch.linalg.pinv(forward),
        "groups": of_C,
        "centroids": torch.randn(CENTROIDS, coordinates, generator=made),
    }
    return FittedCodec(**arguments | other)


def slow_codes(codec: FittedCodec, x_E: torch.Tensor) -> list[int]:
    """The bytes of one token: every centroid of every group is tried."""
    parts = codec.tensors()
    y_C = (x_E - parts["mean"]) @ parts["forward"]
    codes = []
    for group in range(int(parts["groups"].max()) + 1):
        members = (parts["groups"] == group).nonzero()[:, 0]
        distances_K = (parts["centroids"][:, members] - y_C[members]).square().sum(-1)
        codes.append(int(distances_K.argmin()))
    return codes


@pytest.mark.parametrize(
    ("heads", "head_dim", "groups"),
    [
        (2, 4, [[0, 5], [1], [2, 3, 4, 6], [7]]),
        (1, 6, [[2, 1, 0]]),
        (3, 8, [[2 * i, 2 * i + 1] for i in range(12)]),
        (2, 8, [[0], [1, 2]]),  # fewer coordinates than elements
    ],
)
def test_as_the_obvious_way(heads: int, head_dim: int, groups: list[list[int]]) -> None:
    """Codes of every token, what they decode to, and the slots' places in the heads."""
    codec = random_codec(heads, head_dim, groups)
    x_BHTD = torch.randn(2, heads, 5, head_dim, generator=torch.Generator().manual_seed(1))
    slots_BHTS = codec.encode(x_BHTD)
    assert slots_BHTS.dtype == torch.uint8
    assert slots_BHTS.shape == (2, heads, 5, codec.slot_bytes(head_dim))
    back_BHTD = codec.decode(slots_BHTS, head_dim, torch.float32)
    parts = codec.tensors()
    for batch in range(2):
        for token in range(5):
            codes = slow_codes(codec, x_BHTD[batch, :, token].flatten())
            assert slots_BHTS[batch, :, token].flatten().tolist() == codes
            y_C = torch.tensor([parts["centroids"][codes[g], c] for c, g in enumerate(parts["groups"])])
            expected = y_C @ parts["backward"] + parts["mean"]
            torch.testing.assert_close(back_BHTD[batch, :, token].flatten(), expected)


def test_tokens_do_not_touch_each_other() -> None:
    """A cache may be written token by token, in any grouping."""
    codec = random_codec(2, 8, [[4 * i + j for j in range(4)] for i in range(4)])
    x_BHTD = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(2))
    whole = codec.encode(x_BHTD)
    one_by_one = torch.cat([codec.encode(x_BHTD[:, :, t : t + 1]) for t in range(40)], 2)
    assert torch.equal(whole, one_by_one)
    assert codec.encode(x_BHTD[:, :, :0]).shape == (1, 2, 0, 2)
    assert codec.decode(whole[:, :, :0], 8, torch.bfloat16).shape == (1, 2, 0, 8)


def test_made_again_from_its_parts() -> None:
    """``options`` and ``tensors`` are the arguments of its class."""
    codec = random_codec(2, 4, [[0, 1, 2], [3, 4, 5, 6]])
    again = FittedCodec(**codec.options(), **codec.tensors())
    x_BHTD = torch.randn(1, 2, 9, 4)
    assert torch.equal(codec.encode(x_BHTD), again.encode(x_BHTD))
    assert codec.problem(4) is None
    assert "head_dim of 4, not 8" in str(codec.problem(8))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mean": torch.zeros(7)}, "mean is"),
        ({"mean": torch.zeros(8, dtype=torch.float64)}, "mean is"),
        ({"mean": torch.full((8,), float("nan"))}, "not finite"),
        ({"forward": torch.zeros(8, 3)}, "forward is"),
        ({"centroids": torch.zeros(255, 4)}, "centroids is"),
        ({"groups": torch.tensor([0, 1, 1, 2])}, "shared out evenly"),
        ({"groups": torch.tensor([0, 2, 2, 3])}, "without gaps"),
        ({"groups": torch.tensor([-1, 0, 0, 1])}, "without gaps"),
        ({"groups": torch.tensor([0.0, 1, 1, 1])}, "int64"),
        ({"kv_heads": 0}, "kv_heads is no size"),
        ({"kv_heads": 2**40}, "kv_heads is no size"),
        ({"kv_heads": 2**10, "head_dim": 2**10}, "elements a token"),
        ({"head_dim": True}, "head_dim is no size"),
    ],
)
def test_hostile_parts(other: dict[str, Any], message: str) -> None:
    """Nothing is made of parts that do not go together."""
    with pytest.raises(ValueError, match=message):
        random_codec(2, 4, [[0, 1], [2, 3]], **other)


def test_no_group_may_be_huge() -> None:
    """Tables are as wide as the largest group."""
    with pytest.raises(ValueError, match="32 in a byte"):
        random_codec(1, 64, [list(range(33)), [33]])
