"""From a recipe's wish to a plan: every tier, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError, UserError
from compressor.kv.cache import PackedCache
from compressor.kv.formats import FORMATS
from compressor.kv.plan import KvPlan, LayerPlan
from compressor.kv.spec import KvSpec
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.kv_choice import forced_ends
from compressor.progress import Silent
from compressor.stages import kv_fit
from compressor.stages.kv_fit import AttentionShape, FittedKv, fit_kv
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama

IDS_NT = torch.randint(0, 250, (12, 64), generator=torch.Generator().manual_seed(0))
LAYERS, HEADS, HEAD_DIM = 6, 2, 16
PLAIN = 2 * 2 * HEAD_DIM  # of a token and head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of six layers."""
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=LAYERS)


def fitted(folder: Path, spec: KvSpec, out: Path) -> FittedKv:
    """The plan, which must be what is read back."""
    made = fit_kv(FolderSource(folder), spec, IDS_NT, out, Silent(), torch.device("cpu"))
    again = KvPlan.read(out)
    assert again.token_bytes == made.plan.token_bytes
    assert {i: layer.format for i, layer in again.layers.items()} == {
        i: layer.format for i, layer in made.plan.layers.items()
    }
    return made


def uniform(name: str) -> KvPlan:
    """One format in all layers."""
    make = FORMATS[name].make
    assert make is not None
    layers = {i: LayerPlan(name, HEADS, HEAD_DIM, *make()) for i in range(LAYERS)}
    return KvPlan(layers)


def error_of(folder: Path, plan: KvPlan) -> float:
    """Mean KL of the model that reads its packed cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 250, (4, 64), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        plain = model(ids, use_cache=False).logits.log_softmax(-1)
        cache = PackedCache.of(model.config, plan.codecs())
        read = model(ids, past_key_values=cache).logits.log_softmax(-1)
    return float((plain.exp() * (plain - read)).sum(-1).mean())


def test_research_uses_its_budget(folder: Path, tmp_path: Path) -> None:
    """Fitted codecs in every layer, within the budget; more bytes, less error."""
    errors = []
    for slot in (6, 12, 24):
        spec = KvSpec("auto", "research", slot * LAYERS * HEADS, sink_tokens=1)
        (tmp_path / str(slot)).mkdir()
        made = fitted(folder, spec, tmp_path / str(slot))
        assert made.plan.token_bytes == slot * LAYERS * HEADS
        assert made.plan.sink_tokens == 1
        assert {layer.format for layer in made.plan.layers.values()} == {"fitted"}
        assert made.facts["error_of"] == "loss"
        errors.append(error_of(folder, made.plan))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_research_beats_a_plain_format(folder: Path, tmp_path: Path) -> None:
    """With the same bytes."""
    plain = uniform("turboquant_mse_2bit")
    spec = KvSpec("auto", "research", plain.token_bytes)
    assert error_of(folder, fitted(folder, spec, tmp_path).plan) < 0.7 * error_of(folder, plain)


def test_blocks_when_memory_is_short(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kind of plan without gradients, not as good as with them but better than no choice."""
    spec = KvSpec("auto", "research", 8 * LAYERS * HEADS)
    monkeypatch.setattr(kv_fit, "available_memory_bytes", lambda: 1000)
    made = fitted(folder, spec, tmp_path)
    assert made.facts["error_of"] == "attention output"
    plain = uniform("turboquant_mse_2bit")
    assert plain.token_bytes >= made.plan.token_bytes
    assert error_of(folder, made.plan) < error_of(folder, plain)


def test_own_mixes_formats(folder: Path, tmp_path: Path) -> None:
    """Any keys with any values, within the budget; at least as good as each single format that fits."""
    form = FORMATS["turboquant_4bit_nc"]
    budget = form.slot_bytes(HEAD_DIM) * LAYERS * HEADS
    made = fitted(folder, KvSpec("auto", "own", budget), tmp_path)
    assert made.plan.token_bytes <= budget
    assert made.facts["expected_error"] > 0
    for name in ("nvfp4", "turboquant_4bit_nc", "turboquant_mse_3bit"):
        single = uniform(name)
        assert single.token_bytes <= budget
        assert error_of(folder, made.plan) <= error_of(folder, single)


def test_servable_is_one_format_with_skips(folder: Path, tmp_path: Path) -> None:
    """vLLM's forced layers are kept; the others have one format or 16 bit."""
    budget = (4 * PLAIN + 2 * 22) * HEADS
    made = fitted(folder, KvSpec("auto", "vllm", budget), tmp_path)
    formats = {layer.format for layer in made.plan.layers.values()} - {"bf16"}
    assert len(formats) == 1
    (name,) = formats
    if FORMATS[name].skips_ends:
        assert [made.plan.layers[i].format for i in (0, 1, 4, 5)] == ["bf16"] * 4
    assert made.plan.token_bytes <= budget


def test_formats_that_vllm_cannot_page_are_not_chosen(folder: Path, tmp_path: Path) -> None:
    """The next best one is."""
    budget = (4 * PLAIN + 2 * 22) * HEADS
    found: list[str] = []
    for _ in range(2):
        made = fitted(folder, KvSpec("auto", "vllm", budget, unpaged=tuple(found)), tmp_path)
        (name,) = {layer.format for layer in made.plan.layers.values()} - {"bf16"}
        assert name not in found
        found.append(name)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_next", "three"])
def test_spared_layers_are_those_of_the_plan(name: str, tmp_path: Path) -> None:
    """The ends of all decoder blocks, half of them at most: as the planner counts them from the config."""
    folder = tiny_llama(tmp_path, layers=3) if name == "three" else FAMILIES[name](tmp_path)
    source = FolderSource(folder)
    shape = AttentionShape.of(source)
    layers, _ = kv_layers(source.config)
    for form in FORMATS.values():
        ends = forced_ends(layers, source.config, form)
        assert shape.spared[form.name] == ends & set(shape.layers)


def test_hybrid_models_plan_full_attention_only(tmp_path: Path) -> None:
    """Layers of linear attention have no keys to store."""
    (tmp_path / "out").mkdir()
    model = FAMILIES["qwen3_next"](tmp_path / "model")
    spec = KvSpec("auto", "research", 10 * HEADS)
    assert list(fitted(model, spec, tmp_path / "out").plan.layers) == [1]


def test_rotary_frequencies(folder: Path, tmp_path: Path) -> None:
    """The model's own, where it has one kind of them."""
    shape = AttentionShape.of(FolderSource(folder))
    expected = 10000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    assert shape.frequencies_P is not None
    torch.testing.assert_close(shape.frequencies_P, expected)
    assert AttentionShape.of(FolderSource(FAMILIES["gemma3"](tmp_path))).frequencies_P is None


def test_refusals(folder: Path, tmp_path: Path) -> None:
    """One clear message each."""
    cpu = torch.device("cpu")

    def refused(spec: KvSpec, message: str, model: Path = folder) -> None:
        with pytest.raises((UserError, CheckpointError), match=message):
            fit_kv(FolderSource(model), spec, IDS_NT, tmp_path, Silent(), cpu)

    refused(KvSpec("auto", "research", 1), "below the smallest choice")
    refused(KvSpec("auto", "own", 1), "below the smallest choice")
    refused(KvSpec("auto", "vllm", 1), "no servable KV format")
    refused(KvSpec("auto", "own"), "needs a budget")
    latent = FAMILIES["deepseek_v3"](tmp_path / "latent")
    refused(KvSpec("auto", "own", 100), "latent attention", latent)


def test_a_run_that_goes_on_weighs_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is gone by then changes nothing: the same bits come out."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    assert kv_fit._decided(source, tmp_path)
    monkeypatch.setattr(kv_fit, "available_memory_bytes", lambda: 1000)
    assert not kv_fit.fits_whole(source)
    assert kv_fit._decided(source, tmp_path)
