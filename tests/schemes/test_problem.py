"""Shapes that a scheme cannot hold: the dimension, the block, and what to do."""

from __future__ import annotations

import pytest

from compressor.schemes import parse_scheme
from tests.schemes.cases import LABELS, SCHEMES

IGNORE = "leave the matrix in 16 bit with ignore"


@pytest.mark.parametrize(
    ("spelling", "shape", "fused", "expected"),
    [
        (
            "nvfp4a16",
            (64, 588),
            False,
            f"in_features 588 is not a multiple of 16, the block of NVFP4: {IGNORE}",
        ),
        ("nvfp4", (64, 24), False, "in_features 24 is not a multiple of 16, the block of NVFP4"),
        ("mxfp4", (64, 48), False, "in_features 48 is not a multiple of 32, the group of MXFP4"),
        ("fp8_block", (100, 256), True, "out_features 100 is not a multiple of 128"),
        (
            "fp8_block",
            (128, 576),
            False,
            "in_features 576 is not a multiple of 128, the block of FP8_BLOCK: use fp8_",
        ),
        ("int4", (64, 576), False, f"multiple of 128, the group of INT4: use group_size: 64, or {IGNORE}"),
        ("int4", (64, 96), False, "use group_size: 32"),
        ("int4", (64, 100), False, f"the group of INT4: {IGNORE}"),
        ({"kind": "int4", "symmetric": False}, (12, 128), False, "out_features 12 is not a multiple of 8"),
        ("int8", (64, 102), False, "in_features 102 is not a multiple of 4"),
        ({"kind": "int8", "group_size": 128}, (64, 64), False, "use group_size: 64"),
    ],
)
def test_problems(spelling: object, shape: tuple[int, int], fused: bool, expected: str) -> None:
    """One sentence each."""
    problem = parse_scheme(spelling).problem(*shape, fused=fused)  # type: ignore[arg-type]
    assert problem is not None
    assert expected in problem


@pytest.mark.parametrize(
    ("spelling", "shape", "fused"),
    [
        ("nvfp4a16", (7, 16), True),
        ("fp8_dynamic", (7, 13), True),
        ("fp8_static", (7, 13), True),
        ("fp8_block", (100, 256), False),
        ("fp8_block", (256, 256), True),
        ({"kind": "int4", "group_size": 32}, (7, 32), True),
        ({"kind": "int8", "activations": "dynamic"}, (7, 13), True),
    ],
)
def test_shapes_that_fit(spelling: object, shape: tuple[int, int], fused: bool) -> None:
    """Nothing is refused without need."""
    assert parse_scheme(spelling).problem(*shape, fused=fused) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
@pytest.mark.parametrize("shape", [(0, 128), (128, 0)])
def test_empty_matrices(scheme: object, shape: tuple[int, int]) -> None:
    """A hostile header's empty matrix is no matrix."""
    problem = scheme.problem(*shape, fused=False)  # type: ignore[attr-defined]
    assert problem == f"the matrix is empty ({shape[0]} x {shape[1]})"


def test_labels_are_distinct() -> None:
    """Tables tell every option apart."""
    assert len(set(LABELS)) == len(LABELS)
