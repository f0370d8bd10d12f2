"""An embedding that a rule has quantized: loaded back with its values, and measured."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor
from compressor.model.decode import StoredWeights
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent
from tests.tiny import tiny_llama

from .cases import write_recipe
from .decoded import reference


def test_a_quantized_embedding_is_loaded_back(tmp_path: Path) -> None:
    """transformers' own loader decodes linear layers only; the logits are those of the decoded weights."""
    source = tiny_llama(tmp_path / "source")
    rules = "rules: [{match: ['*embed_tokens', lm_head], scheme: int8}]"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, f"{{scheme: int8, {rules}}}")
    done = compressor.run(recipe, output=tmp_path / "out", progress=Silent())
    weights, after = StoredWeights(done.output), load_file(done.output / "model.safetensors")
    assert {"model.embed_tokens", "lm_head"} < set(weights.modules)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected.load_state_dict(reference(load_file(source / "model.safetensors"), after, weights))
    loaded = load_checkpoint_model(done.output, torch.float32)
    assert loaded.via == "decoded"
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits)
