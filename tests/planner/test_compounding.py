"""The table of shipped recipes against slow sums over headers, published counts and trial."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from compressor.data import shipped_root
from compressor.planner.compounding import Found, compounding_facts
from compressor.planner.plan import Plan, make_plan
from compressor.recipe.load import load_recipe
from compressor.recipe.serve import ServeSection
from compressor.report.compounding import CompoundingFacts, Ledger

USABLE = 0.9 * 80e9


@cache
def _plan(name: str) -> Plan:
    return make_plan(load_recipe(f"recipes/{name}.yaml"), planning=True)


def planned(name: str, **serve: Any) -> Plan:
    """The plan of a shipped recipe, served so; made once, since the section changes nothing else."""
    plan = _plan(name)
    recipe = plan.loaded.recipe.model_copy(update={"serve": ServeSection(**serve)})
    return replace(plan, loaded=replace(plan.loaded, recipe=recipe))


def facts_of(name: str, **serve: Any) -> CompoundingFacts:
    """Its compounding facts."""
    facts, reason = compounding_facts(planned(name, **serve))
    assert facts is not None, reason
    return facts


def values(facts: CompoundingFacts, key: str) -> tuple[Any, Any]:
    """Both numbers of a row."""
    row = next(row for row in facts.rows if row.key == key)
    return row.baseline.value, row.optimized.value


def ledger(facts: CompoundingFacts, resource: str) -> Ledger:
    """The ledger of a resource."""
    return next(found for found in facts.ledgers if found.resource == resource)


@pytest.fixture(scope="module")
def seventy() -> CompoundingFacts:
    """Llama 3.3 70B in NVFP4, four users of 32,768 tokens."""
    return facts_of("llama-70b-nvfp4", context=32768, concurrency=4, price_per_hour=3.0)


def slow_70b() -> dict[str, float]:
    """Bytes of Llama 3.3 70B, tensor by tensor, from the published headers."""
    found = json.loads((shipped_root() / "recipes/configs/llama-3.3-70b/tensors.json").read_text())
    source = result = embedding = 0.0
    for name, _, shape in found["tensors"]:
        count = math.prod(shape)
        source += 2 * count
        if name.endswith("_proj.weight"):
            result += count / 2 + count / 16 + 4
        else:
            result += 2 * count
        if "embed_tokens" in name:
            embedding = 2 * count
    return {"source": source, "result": result, "embedding": embedding}


def test_70b_by_hand(seventy: CompoundingFacts) -> None:
    """Bytes, GPUs, users and speeds from first principles."""
    slow, cache = slow_70b(), 80 * 2 * 8 * 128 * 2 * 32768
    assert values(seventy, "weights") == (slow["source"], slow["result"])
    assert values(seventy, "cache") == (cache, cache)
    needed = [1, 1]
    for side, weights in enumerate((slow["source"], slow["result"])):
        while weights + 4 * cache > needed[side] * USABLE:
            needed[side] += 1
    assert values(seventy, "gpus") == tuple(needed)
    assert needed == [3, 2]
    users = [0, 0]
    for side, weights in enumerate((slow["source"], slow["result"])):
        while weights + (users[side] + 1) * cache <= needed[0] * USABLE:
            users[side] += 1
    assert values(seventy, "users") == tuple(users)
    for side, key in enumerate(("source", "result")):
        moved = slow[key] - slow["embedding"] + 4 * cache
        speed = needed[side] * 3.35e12 / moved
        assert values(seventy, "speed")[side] == pytest.approx(speed, rel=1e-9)
        assert values(seventy, "throughput")[side] == pytest.approx(4 * speed, rel=1e-9)
        assert values(seventy, "gpu_speed")[side] == pytest.approx(speed / needed[side], rel=1e-9)
        price = 3.0 * needed[side] / 3600 / (4 * speed) * 1e6
        assert values(seventy, "output_price")[side] == pytest.approx(price, rel=1e-9)


def test_70b_reads_a_prompt_as_its_arithmetic_allows(seventy: CompoundingFacts) -> None:
    """Two operations for each weight and token, and the causal half of attention's square."""
    slow = slow_70b()
    multiplied = (slow["source"] - 2 * slow["embedding"]) / 2  # the head's size is the embedding's
    attention = 80 * 4 * 64 * 128 * (32768 * 32769 / 2)
    flops = 2 * multiplied * 32768 + 2 * slow["embedding"] / 2 + attention
    assert values(seventy, "first_token")[0] == pytest.approx(flops / (3 * 989.5e12), rel=1e-9)


@pytest.mark.parametrize("name", ["llama3-70b-128k", "scout-nvfp4"])
def test_the_longest_context_by_trial(name: str) -> None:
    """A token more does not fit, or the model reads no further."""
    facts = facts_of(name, gpu="l40s", gpus=5, concurrency=3)
    plan = planned(name)
    weights = [plan.prediction.source_bytes, plan.prediction.result_bytes]
    found = values(facts, "fits")
    for side, longest in enumerate(found):
        if longest is None:
            assert weights[side] > 5 * 0.9 * 48e9
            continue
        reach = values(facts, "reach")[side]
        at = [
            values(facts_of(name, gpu="l40s", gpus=5, context=int(tokens)), "cache")[side]
            for tokens in (longest, min(longest + 1, reach))
        ]
        assert weights[side] + 3 * at[0] <= 5 * 0.9 * 48e9
        assert longest == reach or weights[side] + 3 * at[1] > 5 * 0.9 * 48e9


@pytest.mark.parametrize(
    ("name", "active", "total"),
    [
        # As published: 17B of 109B and of 400B (the vision tower counts), 37B of 671B, 12B of 52B.
        ("scout-nvfp4", 17e9, 109e9),
        ("maverick-nvfp4", 17e9, 400e9),
        ("deepseek-v3-nvfp4", 37e9, 671e9),
        ("jamba-fp8", 12e9, 52e9),
        ("llama-70b-nvfp4", 70.6e9, 70.6e9),
    ],
)
def test_active_weights_as_published(name: str, active: float, total: float) -> None:
    """Counted with the embedding, as publishers do, who round."""
    point = facts_of(name).point
    counted = point.active_parameters + point.embedding_parameters
    assert counted == pytest.approx(active, rel=0.03)
    assert point.parameters == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("said", [{"context": 131072, "concurrency": 8}, {"context": 4096}])
@pytest.mark.parametrize("name", ["maverick-nvfp4", "jamba-fp8", "llama3-70b-128k", "deepseek-v3-nvfp4"])
def test_factors_multiply_to_the_whole(name: str, said: dict[str, int]) -> None:
    """In every ledger; and the steps of arithmetic are not those of weights' bits."""
    facts = facts_of(name, **said)
    assert [found.resource for found in facts.ledgers] == ["memory", "traffic", "arithmetic"]
    for found in facts.ledgers:
        assert found.product == pytest.approx(found.before / found.after, rel=1e-9)
    assert not any("stored" in step.what for step in ledger(facts, "arithmetic").steps)


def test_ledgers_end_at_the_table() -> None:
    """Memory held is weights and caches; the bytes of a token are bandwidth over speed."""
    facts = facts_of("llama3-70b-128k", context=131072, concurrency=2)
    weights, cache = values(facts, "weights"), values(facts, "cache")
    memory = ledger(facts, "memory")
    # A dense model with full attention is its own twin.
    assert (memory.before, memory.after) == (weights[0] + 2 * cache[0], weights[1] + 2 * cache[1])
    speed = values(facts, "throughput")[1] / facts.point.gpus[1]
    assert ledger(facts, "traffic").after == pytest.approx(3.35e12 / speed, rel=1e-9)


def test_maverick_against_its_twin() -> None:
    """24 of 48 layers route one of 128 experts; 36 of 48 read chunks of 8,192: by hand at 131,072 tokens."""
    facts = facts_of("maverick-nvfp4", context=131072)
    traffic = {step.what.partition(":")[0]: step for step in ledger(facts, "traffic").steps}
    assert traffic["attention"].alone == pytest.approx(48 * 131072 / (12 * 131072 + 36 * 8192))
    assert all(step.of == "model" for name, step in traffic.items() if name in ("attention", "experts"))
    arithmetic = {step.what.partition(":")[0]: step for step in ledger(facts, "arithmetic").steps}
    routed = 24 * 128 * 3 * 5120 * 8192
    active = facts.point.active_parameters
    assert arithmetic["experts"].alone == pytest.approx((active + routed * 127 / 128) / active)


def test_drafts_count_once_their_tokens_a_pass_are_known() -> None:
    """Not at all unmeasured; as claimed where the recipe says so; as measured where a run did."""
    name = "llama3-70b-compounded"
    unknown = facts_of(name)
    assert any("draft is not counted" in note for note in unknown.notes)
    claimed = facts_of(name, tokens_per_pass=2.0)
    assert claimed.point.tokens_per_pass_mark == "claimed"
    step = ledger(claimed, "traffic").steps[-1]
    assert (step.alone, step.mark) == (2.0, "claimed")
    assert 1.5 < step.factor < 2
    assert values(claimed, "speed")[1] > 1.5 * values(unknown, "speed")[1]
    assert values(claimed, "speed")[0] == values(unknown, "speed")[0]
    # A draft computes more for each token that stays.
    assert ledger(claimed, "arithmetic").steps[-1].factor < 1
    measured, _ = compounding_facts(planned(name, tokens_per_pass=2.0), Found(tokens_per_pass=2.5))
    assert measured is not None
    assert (measured.point.tokens_per_pass, measured.point.tokens_per_pass_mark) == (2.5, "measured")


def test_kernels_and_steps_that_were_measured_slow_it_down() -> None:
    """Each side's share of the bandwidth, and microseconds of every step; bytes and prompts stay."""
    plain = facts_of("llama-70b-nvfp4", concurrency=4)
    slower = facts_of("llama-70b-nvfp4", concurrency=4, efficiency=(0.9, 0.6), step_overhead_us=500)
    for side, share in enumerate((0.9, 0.6)):
        seconds = 1 / values(plain, "speed")[side] / share + 500e-6
        assert values(slower, "speed")[side] == pytest.approx(1 / seconds, rel=1e-9)
    for key in ("weights", "users", "first_token"):
        assert values(slower, key) == values(plain, key)
    assert slower.ledgers == plain.ledgers


def test_what_does_not_fit_has_no_speed() -> None:
    """On a single GPU of 80 GB the source's 141 GB do not; the result's do."""
    facts = facts_of("llama-70b-nvfp4", gpus=1)
    row = next(row for row in facts.rows if row.key == "speed")
    assert (row.baseline.value, row.baseline.note) == (None, "does not fit")
    assert row.optimized.value is not None
    assert row.gain is None
    assert values(facts, "users")[0] == 0


def test_claims_stand_beside_what_is_computed() -> None:
    """As the recipe states them."""
    facts = facts_of("llama-70b-nvfp4", gpus=2, claims={"users": {"baseline": [4, 6], "optimized": [12, 16]}})
    (claim,) = facts.claims
    assert (claim.baseline, claim.optimized) == ((4, 6), (12, 16))
    assert claim.computed == values(facts, "users")
    assert claim.measured == (None, None)


def test_measured_is_marked() -> None:
    """Bytes that were counted and changes that were measured; the rest stays computed."""
    plan = planned("llama-70b-nvfp4")
    found = Found(weights_measured=(True, True), changes=(("perplexity", "perplexity", 0.012),))
    facts, _ = compounding_facts(plan, found)
    assert facts is not None
    marks = {row.key: row.optimized.mark for row in facts.rows}
    assert (marks["weights"], marks["perplexity"], marks["users"]) == ("measured", "measured", "computed")
    plain, _ = compounding_facts(plan)
    assert plain is not None
    assert {row.optimized.mark for row in plain.rows} == {"computed", "not measured"}


def test_facts_survive_json() -> None:
    """As the report stores them."""
    facts = facts_of("maverick-nvfp4", price_per_hour=2.5)
    assert CompoundingFacts.model_validate_json(facts.model_dump_json()) == facts
