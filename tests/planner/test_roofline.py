"""Steps and prompts against sums by hand; reads of experts against every draw there is."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product

import pytest

from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.roofline import (
    Load,
    Proposals,
    prompt_seconds,
    step_seconds,
    tokens_per_second,
)
from compressor.planner.weight_load import (
    WeightLoad,
    plain_load,
    prediction_load,
    result_load,
    source_load,
)
from compressor.recipe.gpus import Gpu
from compressor.recipe.model import WeightsSection
from compressor.schemes import known_schemes, parse_scheme
from compressor.spec import TensorHeader
from compressor.stages.base import Claim

from .fakes import LLAMA, LLAMA4, llama4_headers, llama_headers

GPU = Gpu("test", 10**9, 1e9, {"bf16": 1e12, "fp4": 4e12}, "nowhere")


def claims_of(scheme: str, headers: dict[str, TensorHeader], config: dict[str, object]) -> list[Claim]:
    """Every projection in one scheme."""
    section = WeightsSection.model_validate({"scheme": scheme})
    return claim_tensors(headers, config, family_for(config), section, DIALECTS["compressed-tensors"])


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens"), [(4, 1, 1), (4, 1, 3), (4, 2, 2), (5, 2, 3), (3, 3, 2)]
)
def test_expected_experts_of_every_draw(experts: int, chosen: int, tokens: int) -> None:
    """The mean number of different experts over all draws of all tokens."""
    draws = list(combinations(range(experts), chosen))
    touched = [len(set().union(*each)) for each in product(draws, repeat=tokens)]
    mean = Fraction(sum(touched), len(touched))
    load = WeightLoad(0, 7, 1000 * experts, chosen / experts, 3, {}, {}, 0)
    # Floating point alone separates the two.
    assert load.read(tokens) == pytest.approx(float(10 + 1000 * mean), rel=1e-12)


def test_loads_of_a_dense_model_by_hand() -> None:
    """Embeddings are looked up, unless they are the head as well."""
    headers = llama_headers(layers=2, hidden=128, wide=256, kv=64, vocab=512)
    matrices = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    norms, head = 5 * 128, 512 * 128
    claims = claims_of("nvfp4a16", headers, LLAMA)
    before, after = source_load(claims, LLAMA), result_load(claims, LLAMA)
    assert before.held_bytes == 2 * (matrices + norms + 2 * head)
    assert before.read(1) == before.read(9) == before.read_by_all == 2 * (matrices + norms + head)
    assert (before.active, before.parameters) == (matrices + norms + head, matrices + norms + head)
    assert before.embedding_parameters == head
    # Half a byte each and a scale for 16; a scale of four bytes for each of 14 matrices.
    assert after.read(1) == matrices // 2 + matrices // 16 + 14 * 4 + 2 * (norms + head)
    tied_config = LLAMA | {"tie_word_embeddings": True}
    tied = source_load(claims_of("nvfp4a16", llama_headers(tied=True), tied_config), tied_config)
    assert tied.head_bytes == 2 * head
    assert tied.embedding_parameters == 0


def test_routed_experts_multiply_by_their_share() -> None:
    """One of four experts; the shared one and the router always."""
    config = LLAMA4 | {"num_local_experts": 4, "num_experts_per_tok": 1}
    claims = claims_of("nvfp4a16", llama4_headers(experts=4, hidden=64, wide=128), config)
    load = source_load(claims, config)
    routed, dense = 2 * 4 * 3 * 64 * 128, 2 * (4 * 64 + 3 * 64 * 128)
    assert load.share == 0.25
    assert load.active == routed / 4 + dense
    assert load.read(1) == 2 * (routed / 4 + dense)
    assert load.read_by_all == 2 * (routed + dense)


def test_prediction_layers_are_read_by_their_draft_only() -> None:
    """Held with the model; as a draft they read themselves and the model's head, and look their copies up."""
    headers = llama_headers(layers=2)
    extra = [
        TensorHeader("model.layers.2.mlp.up_proj.weight", "BF16", (256, 128)),
        TensorHeader("model.layers.2.embed_tokens.weight", "BF16", (512, 128)),
        TensorHeader("model.layers.2.shared_head.head.weight", "BF16", (512, 128)),
    ]
    more = headers | {header.name: header for header in extra}
    plain = result_load(claims_of("nvfp4a16", headers, LLAMA), LLAMA)
    claims = claims_of("nvfp4a16", more, LLAMA)
    whole, draft = result_load(claims, LLAMA), prediction_load(claims, LLAMA)
    assert whole.read(1) == plain.read(1)
    assert whole.prediction_parameters == 256 * 128 + 2 * 512 * 128
    assert draft.held_bytes == 0
    assert draft.active == 256 * 128 + 512 * 128
    layer = next(claim for claim in claims if claim.tensor.name == extra[0].name)
    assert draft.read(1) == layer.result_bytes + 2 * 512 * 128


def load(**changes: object) -> Load:
    """A million weights in 16 bit; a cache of 1 kB."""
    return replace(Load(plain_load(10**6, 2 * 10**6), 1_000.0, 5e3, 7e6), **changes)


def test_a_step_waits_for_the_longer_of_both() -> None:
    """Memory with few users, arithmetic with many: each by hand."""
    assert step_seconds(load(), 1, GPU, 1) == pytest.approx((2e6 + 1e3) / 1e9)
    assert step_seconds(load(), 1, GPU, 2) == pytest.approx((2e6 + 1e3) / 2e9)
    many = 10_000
    assert step_seconds(load(), many, GPU, 1) == pytest.approx(many * (2e6 + 5e3) / 1e12)
    assert tokens_per_second(load(), 1, GPU, 1, fixed_s=0.001) == pytest.approx(1 / (2.001e-3 + 1e-3))


def test_a_prompt_multiplies_the_head_once() -> None:
    """All weights for each token, the head for the last one, attention beside it; the format's own rate."""
    weights = WeightLoad(0, 100, 0, 1.0, 50, {"fp4": 2e6, "bf16": 1e6}, {"bf16": 3e6}, 0)
    found = prompt_seconds(load(weights=weights), 1_000, GPU, 1)
    assert found == pytest.approx(2 * 2e6 * 1000 / 4e12 + (2 * 1e6 * 1000 + 2 * 3e6 + 7e6) / 1e12)


def test_proposals_cost_and_give() -> None:
    """Three proposed tokens: one pass for four, three readings of the draft, 2.5 tokens."""
    weights = plain_load(10**5, 2 * 10**5)
    drafted = load(proposals=Proposals(3, 2.5, weights))
    seconds = (2e6 + 1e3 + 3 * 2e5) / 1e9
    assert step_seconds(drafted, 1, GPU, 1) == pytest.approx(seconds)
    assert tokens_per_second(drafted, 1, GPU, 1) == pytest.approx(2.5 / seconds)
    assert drafted.token_bytes(2) == pytest.approx((2e6 + 2e3 + 3 * 2e5) / 5)
    assert drafted.token_flops() == pytest.approx((4 * (2e6 + 5e3) + 3 * 2e5) / 2.5)


def test_proposed_tokens_draw_experts_of_their_own() -> None:
    """One user's four tokens read four experts of many, which 2.5 tokens do not pay for; a crowd's do."""
    weights = WeightLoad(0, 0, 10**9, 1e-3, 0, {"bf16": 1e6}, {}, 10**9)
    alone = Load(weights, 0.0, 0.0, 0.0)
    drafted = replace(alone, proposals=Proposals(3, 2.5, plain_load(0, 0)))
    assert drafted.token_bytes(1) == pytest.approx(1e9 * (1 - 0.999**4) / 2.5)
    assert drafted.token_bytes(1) > alone.token_bytes(1)
    assert drafted.token_bytes(10_000) < alone.token_bytes(10_000) / 2


@pytest.mark.parametrize("name", known_schemes())
@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_schemes_multiply_as_they_round_inputs(name: str, activations: str | None) -> None:
    """A scheme's arithmetic is the format that the library says inputs are rounded to, bf16 where none is."""
    said = {"kind": name} | ({} if activations is None else {"activations": activations})
    try:
        scheme = parse_scheme(said)
    except ValueError:
        pytest.skip("the scheme has no such option")
    inputs = scheme.ct_scheme([]).input_activations
    rounded = "bf16" if inputs is None else f"{'int' if inputs.type == 'int' else 'fp'}{inputs.num_bits}"
    assert scheme.arithmetic == rounded
