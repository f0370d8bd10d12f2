"""Inverse frequencies and multipliers, against transformers' own and against vLLM's tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compressor.rope import methods

# fp32 keeps 24 bits; a power, a ramp and a quotient round a few times.
FP32 = 2e-6
SHAPES = [(64, 1.0, 1e4), (64, 1.0, 1e5), (128, 1.0, 5e5), (128, 0.25, 1e4), (256, 0.25, 1e7), (96, 0.4, 1e4)]
FACTORS = [(4.0, 8192), (2.44140625, 8192), (16.0, 4096), (1.1, 128), (33.3, 2048)]

KNOBS: dict[str, dict[str, Any]] = {
    "yarn-knobs": {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25},
    "yarn-untruncated": {"truncate": False},
    "yarn-mscale": {"mscale": 0.707, "mscale_all_dim": 1.0},
}


def _theirs(
    parameters: dict[str, Any], head: int, part: float, length: int, tokens: int | None = None
) -> tuple[torch.Tensor, float]:
    """What transformers computes for a Llama of these sizes."""
    config = LlamaConfig(
        hidden_size=4 * head,
        head_dim=head,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters=parameters | {"partial_rotary_factor": part},
    )
    inverse, multiplier = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=tokens)
    return inverse, multiplier


def _check(found: methods.Frequencies, theirs: tuple[torch.Tensor, float]) -> None:
    inverse, multiplier = theirs
    mine = torch.tensor(found.inverse, dtype=torch.float64)
    assert mine.shape == inverse.shape
    torch.testing.assert_close(mine, inverse.double(), rtol=FP32, atol=0)
    assert found.multiplier == pytest.approx(float(multiplier), rel=1e-12)


def _dims(head: int, part: float) -> int:
    return int(head * part) // 2 * 2


@pytest.mark.parametrize(("head", "part", "theta"), SHAPES)
@pytest.mark.parametrize(("factor", "original"), FACTORS)
@pytest.mark.parametrize(
    "kind", ["linear", "yarn", "yarn-knobs", "yarn-untruncated", "yarn-mscale", "longrope", "llama3"]
)
def test_against_transformers(
    kind: str, factor: float, original: int, head: int, part: float, theta: float
) -> None:
    """Every method of transformers, by name and through ``of_parameters``."""
    dims, name = _dims(head, part), kind.partition("-")[0]
    part = dims / head
    length = int(factor * original)
    parameters: dict[str, Any] = {"rope_type": name, "rope_theta": theta, "factor": factor}
    if name != "linear":
        parameters["original_max_position_embeddings"] = original
    knobs: dict[str, Any] = KNOBS.get(kind, {})
    if name == "llama3":
        knobs = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = [1 + (factor - 1) * i / (dims // 2) for i in range(dims // 2)]
    if name == "longrope":
        knobs = {"short_factor": [1.0] * (dims // 2), "long_factor": factors}
    parameters |= knobs
    # transformers takes the long factors from one token past the original length on.
    theirs = _theirs(parameters, head, part, length, original + 1 if name == "longrope" else None)
    _check(methods.of_parameters(parameters, dims, length, original + 1), theirs)
    if kind == "linear":
        _check(methods.linear(dims, theta, factor), theirs)
    elif name == "yarn":
        _check(methods.yarn(dims, theta, factor, original, **knobs), theirs)
    elif name == "llama3":
        _check(methods.llama3(dims, theta, factor, original), theirs)
    else:
        _check(methods.longrope(theta, factors, methods.longrope_multiplier(factor, original)), theirs)


@pytest.mark.parametrize(("head", "part", "theta"), SHAPES)
@pytest.mark.parametrize("tokens", [100, 512, 513, 4096])
def test_dynamic(tokens: int, head: int, part: float, theta: float) -> None:
    """Which grow with the text, from the config's length on."""
    dims = _dims(head, part)
    parameters = {"rope_type": "dynamic", "rope_theta": theta, "factor": 4.0}
    theirs = _theirs(parameters, head, dims / head, 512, tokens)
    _check(methods.dynamic(dims, theta, 4.0, 512, tokens), theirs)
    _check(methods.of_parameters(parameters, dims, 512, tokens), theirs)


def test_ntk_is_what_its_name_says() -> None:
    """The highest frequency is kept, the lowest is that of linear scaling, those between lie between."""
    plain, scaled = methods.unscaled(64, 1e4).inverse, methods.ntk(64, 1e4, 4.0).inverse
    assert scaled[0] == plain[0] == 1
    assert scaled[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)
    assert all(b / 4 < a < b for a, b in zip(scaled[1:-1], plain[1:-1], strict=True))


def test_yarn_ends() -> None:
    """Pairs that turn often within L are kept, those that turn less than once are divided by the factor."""
    dims, theta, factor, original = 64, 1e4, 4.0, 8192
    plain, scaled = methods.unscaled(dims, theta).inverse, methods.yarn(dims, theta, factor, original).inverse
    turns = [original * f / (2 * math.pi) for f in plain]
    # The ramp's ends are rounded outwards to indices: one pair of either side.
    often, seldom = sum(t > 32 for t in turns) - 1, sum(t >= 1 for t in turns) + 1
    assert scaled[:often] == pytest.approx(plain[:often], rel=1e-12)
    assert scaled[seldom:] == pytest.approx([f / factor for f in plain[seldom:]], rel=1e-12)
    assert all(a < b for a, b in zip(scaled[often + 1 :], plain[often + 1 :], strict=True))


def test_divisors_give_the_frequencies_again() -> None:
    """Any method as the factors of LongRoPE: what a search starts from."""
    yarn = methods.yarn(64, 1e5, 4.0, 8192)
    again = methods.longrope(1e5, yarn.divisors(1e5), yarn.multiplier)
    assert again.inverse == pytest.approx(yarn.inverse, rel=1e-12)
    assert methods.ntk(64, 1e5, 4.0).divisors(1e5)[-1] == pytest.approx(4.0)


def test_unknown() -> None:
    """Types that no method here makes."""
    with pytest.raises(KeyError, match="proportional"):
        methods.of_parameters(
            {
                "rope_type": "proportional",
                "rope_theta": 1e4,
                "factor": 1.0,
                "original_max_position_embeddings": 2,
            },
            64,
            4,
            4,
        )
