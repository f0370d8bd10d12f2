"""The section ``serve``: what it accepts, refuses with a reason, and leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.recipe.gpus import GPUS
from compressor.recipe.load import dump_recipe, load_recipe

Write = Callable[..., Path]
HEAD = "schema_version: 1\nmodel: {source: org/model}\nweights: {scheme: nvfp4a16}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe and gives its path."""

    def written(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return written


def test_named_and_described_gpus(write: Write) -> None:
    """By name from the table; by its figures; what a GPU lacks is computed in bf16."""
    section = load_recipe(str(write(f"{HEAD}serve: {{gpu: l40s}}\n"))).recipe.serve
    assert section is not None
    assert section.card() == GPUS["l40s"]
    assert GPUS["a100-80gb"].rate("fp8") == GPUS["a100-80gb"].rate("bf16") == 312e12
    own = "{memory: 96GB, bandwidth: 1790GB, tflops: {bf16: 500, fp4: 2000}}"
    section = load_recipe(str(write(f"{HEAD}serve: {{gpu: {own}}}\n"))).recipe.serve
    assert section is not None
    card = section.card()
    assert (card.name, card.memory_bytes, card.bandwidth) == ("custom", 96 * 10**9, 1.79e12)
    assert (card.rate("fp4"), card.rate("int8")) == (2e15, 5e14)


def test_claims_are_ranges_and_survive_writing(write: Write) -> None:
    """A number is a range of one; what is written reads back the same; nothing said is not written."""
    text = f"{HEAD}serve: {{claims: {{users: {{baseline: [4, 6], optimized: 14}}}}}}\n"
    recipe = load_recipe(str(write(text))).recipe
    assert recipe.serve is not None
    assert recipe.serve.claims["users"].baseline == (4, 6)
    assert recipe.serve.claims["users"].optimized == (14, 14)
    assert load_recipe(str(write(dump_recipe(recipe), "again.yaml"))).recipe == recipe.model_copy(
        update={"name": recipe.name}
    )
    assert "serve" not in dump_recipe(load_recipe(str(write(HEAD))).recipe)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{gpu: h100}", "serve.gpu: unknown GPU 'h100'; did you mean 'h100-80gb'"),
        ("{gpu: h200}", "did you mean 'h200-141gb'"),
        ("{gpu: 5}", "serve.gpu: must be the name of a GPU"),
        ("{gpu: {name: mine, foo: 1}}", "unknown key 'serve.gpu.foo'"),
        ("{gpu: {memory: 80GB, tflops: {bf16: 2}}}", "key 'serve.gpu.bandwidth' is missing"),
        ("{gpu: {memory: 80GB, bandwidth: 3TB}}", "bandwidth"),
        ("{gpu: {memory: 80GB, bandwidth: 3000GB, tflops: {fp8: 2}}}", "needs bf16"),
        ("{concurrency: 0}", "concurrency"),
        ("{tokens_per_pass: 0.5}", "tokens_per_pass"),
        ("{efficiency: 2}", "serve.efficiency: must be less than or equal to 1, not 2"),
        ("{claims: {users: {baseline: 1, optimized: 2, foo: 1}}}", "unknown key 'serve.claims.users.foo'"),
        ("{claims: {users: {baseline: [6, 4], optimized: 2}}}", "must be the lowest and the highest"),
        ("{price_per_hour: true}", "must be a number"),
        ("{gpu: {memory: 80GB, bandwith: 3TB, tflops: {bf16: 2}}}", "did you mean 'bandwidth'"),
        ("{gpu: [1]}", "must be the name of a GPU, or a map"),
        ("{claims: {speed: {basline: 1, optimized: 2}}}", "did you mean 'baseline'"),
        ("{price_per_hour: 1.0e-320}", "price_per_hour"),
        ("{efficiency: 1.0e-320}", "efficiency"),
        ("{gpu: {memory: 80GB, bandwidth: 3000GB, tflops: {bf16: 1.0e-320}}}", "tflops"),
        ("{claims: {speed_of_light: {baseline: 1, optimized: 2}}}", "speed_of_light"),
    ],
)
def test_faults_are_told(write: Write, section: str, said: str) -> None:
    """With the key, and a way out where there is one; each once, and in the recipe's words."""
    with pytest.raises(UserError) as caught:
        load_recipe(str(write(f"{HEAD}serve: {section}\n")))
    faults = [f"{fault.where}: {fault}" for fault in getattr(caught.value, "faults", (caught.value,))]
    assert any(said in fault for fault in faults)
    assert len(set(faults)) == len(faults)
    assert not any("function-" in fault for fault in faults)


def test_options_of_candidates_are_known(write: Write) -> None:
    """A scheme in a list has the same options as one that stands alone."""
    head = "schema_version: 1\nmodel: {source: org/model}\n"
    budget = "budget: {bits_per_weight: 5}"
    with pytest.raises(UserError, match=r"unknown key 'weights\.candidates\.0\.foo'") as caught:
        load_recipe(
            str(
                write(
                    f"{head}weights: {{scheme: auto, {budget}, candidates: [{{kind: int4, foo: 1}}, copy]}}\n"
                )
            )
        )
    assert "group_size" in (caught.value.fix or "")
