"""Greedy continuations and speed of a pair."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.errors import UserError
from compressor.evals import speed as speed_module
from compressor.evals.base import GenerationSpec, SpeedSpec
from compressor.evals.generation import compare_continuations, evenly
from compressor.evals.speed import compare_speed, weight_bytes
from compressor.progress import Silent
from tests.tiny import tiny_llama

IDS_L = torch.randint(250, (400,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model, and the same with one matrix a little off."""
    folder = tiny_llama(tmp_path_factory.mktemp("pair") / "m", tie=True)
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2)
    )
    with torch.no_grad():
        second.model.layers[0].mlp.down_proj.weight += 0.05 * torch.randn(
            second.model.layers[0].mlp.down_proj.weight.shape, generator=torch.Generator().manual_seed(2)
        )
    return first, second


def _greedy(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """One token after another, the whole text read again for each."""
    ids = prompt.tolist()
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_continuations_are_compared_token_by_token(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Against plain loops without a cache."""
    spec = GenerationSpec(prompts=6, prompt_tokens=16, new_tokens=12)
    found = compare_continuations(*pair, IDS_L, spec, Silent(), first=254)
    prompts = evenly(IDS_L, 6, 16, 254)
    assert [len(prompt) for prompt in prompts] == [16] * 6
    until, agreeing, identical = [], 0, 0
    for prompt in prompts:
        one, other = (_greedy(model, prompt, 12) for model in pair)
        same = [a == b for a, b in zip(one, other, strict=True)]
        until.append(same.index(False) if False in same else 12)
        agreeing += sum(same)
        identical += all(same)
    assert found.lengths == tuple(until)
    assert 0 < sum(until) < 72
    assert found.until_divergence == pytest.approx(sum(until) / 6)
    assert (found.agreeing, found.identical) == (pytest.approx(agreeing / 72), pytest.approx(identical / 6))
    assert (found.prompts, found.prompt_tokens, found.dtype) == (6, 16, "float32")
    assert found.until_divergence_ci95 is not None
    assert 0 <= found.until_divergence_ci95[0] <= found.until_divergence_ci95[1] <= 12
    same_model = compare_continuations(pair[0], pair[0], IDS_L, spec, Silent())
    assert (same_model.identical, same_model.until_divergence_ci95) == (1.0, (12.0, 12.0))


def test_prompts_are_spread_over_the_text() -> None:
    """From its first token to its last, without overlap; fewer where it is short."""
    ids_L = torch.arange(100)
    prompts = evenly(ids_L, 4, 10, None)
    assert [int(prompt[0]) for prompt in prompts] == [0, 30, 60, 90]
    assert prompts[-1].tolist() == list(range(90, 100))
    assert len(evenly(ids_L, 50, 10, None)) == 10
    assert [prompt.tolist() for prompt in evenly(torch.arange(3), 4, 10, 7)] == [[7, 0, 1, 2]]


def test_speed_is_taken_by_turns(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, result, source, ... after a turn of each unmeasured; medians, spread, and bytes counted."""
    turns: list[PreTrainedModel] = []
    real = speed_module._turn

    def turn(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> speed_module.Turn:
        turns.append(model)
        found = real(model, ids_BT, new_tokens)
        # The first turns are far slower, as they are on a real machine.
        return found if len(turns) > 2 else speed_module.Turn(1e6, 1e-6, 1, 1)

    monkeypatch.setattr(speed_module, "_turn", turn)
    spec = SpeedSpec(prompt_tokens=24, new_tokens=8, batch=3, runs=3)
    found = compare_speed(*pair, IDS_L, spec, Silent())
    assert turns == [*pair] * 4
    read = found.to_json()
    assert {name: read[name] for name in ("prompt_tokens", "new_tokens", "batch", "runs")} == vars(spec)
    for whose in ("source", "result"):
        figures = read[whose]
        for name in ("first_token_s", "tokens_per_s"):
            spread = figures[name]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] < 1e6
        # Keys and values of 3 sequences of 24 + 7 tokens, 2 layers, 2 heads of 16, float32.
        assert figures["cache_bytes"] == 3 * 31 * 2 * 2 * 2 * 16 * 4
        assert figures["peak_device_bytes"] is None or figures["peak_device_bytes"] > figures["weight_bytes"]
    assert read["speedup"]["low"] <= read["speedup"]["median"] <= read["speedup"]["high"]
    assert read["runs_compressed"] is False


def test_weights_are_counted_once(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Head and embedding share theirs; buffers count."""
    model = pair[0]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = sum(parameter.numel() * 4 for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert expected <= weight_bytes(model) <= expected + buffers


def test_prompts_that_do_not_fit_are_refused(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Shorter texts, and more than the 512 tokens that the models read."""
    with pytest.raises(UserError, match="400 tokens, and a prompt 500"):
        compare_speed(*pair, IDS_L, SpeedSpec(prompt_tokens=500), Silent())
    with pytest.raises(UserError, match="are 700 tokens; a model reads 512"):
        compare_speed(*pair, IDS_L, SpeedSpec(prompt_tokens=300, new_tokens=400), Silent())
