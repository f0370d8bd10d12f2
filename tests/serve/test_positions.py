"""A scaled config is read alike by vLLM, as it builds the model to serve it, and by transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from compressor.rope import methods
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec, Method
from compressor.verify.process import engine_environment
from tests.rope.test_scaled import FAMILIES, spec_of
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("positions_worker.py")
SCORES = Path(__file__).with_name("packed_worker.py")
ORIGINAL, HEAD, THETA = 512, 64, 1e4
METHODS: tuple[Method, ...] = ("yarn", "longrope", "linear", "ntk", "llama3")
TARGETS = (2048, 1234)
# fp32: an angle carries the error of its frequency, 1e-7 of it in each of a few steps, times the position.
FP32 = 5e-7


def test_tables(tmp_path: Path, engine_python: Path) -> None:
    """Every cosine and sine of every method and factor; as many positions as were asked for."""
    source = tiny_llama(tmp_path / "unscaled", hidden=2 * HEAD, heads=2, kv_heads=1)
    before = json.loads((source / "config.json").read_text())
    longest = {source: ORIGINAL}
    for method in METHODS:
        for target in TARGETS:
            factors = methods.yarn(HEAD, THETA, target / ORIGINAL, ORIGINAL).divisors(THETA)
            spec = ContextSpec(method, target, factors=factors if method == "longrope" else None)
            folder = tmp_path / f"{method}-{target}"
            longest[_written(folder, scaled_config(before, spec).config)] = target
    tables = _of_vllm(dict.fromkeys(longest), engine_python, tmp_path)
    unscaled = tables["unscaled.0"]
    for folder, tokens in longest.items():
        name = folder.name
        assert int(tables[f"{name}.longest"]) == tokens, name
        assert f"{name}.1" not in tables, "layers differ"
        table = tables[f"{name}.0"]
        assert table.shape == (tokens, HEAD), name
        theirs = torch.cat([part[:, : HEAD // 2] for part in _of_transformers(folder, tokens)], dim=1)
        assert bool(((table - theirs).abs() < _slack(tokens)).all()), name
        if folder != source:
            assert not torch.allclose(table[:ORIGINAL], unscaled, atol=1e-2), name


def test_other_families(tmp_path: Path, engine_python: Path) -> None:
    """Layers of two kinds, part of a head, factors that switch: against the formulas, which transformers is
    held to for the same configs in tests/rope/test_scaled.py.
    """
    named: tuple[tuple[str, str, Method], ...] = (
        ("gemma3-legacy", "Gemma3ForCausalLM", "linear"),
        ("gemma3-legacy", "Gemma3ForCausalLM", "yarn"),
        ("stablelm", "StableLmForCausalLM", "yarn"),
        ("qwen3", "Qwen3ForCausalLM", "llama3"),
        ("stablelm", "StableLmForCausalLM", "longrope"),
        ("phi3", "Phi3ForCausalLM", "longrope"),
        ("deepseek_v3", "DeepseekV3ForCausalLM", "yarn"),
    )
    target, asked, expected = 20000, {}, {}
    for name, architecture, method in named:
        config = FAMILIES[name] | {"architectures": [architecture], "vocab_size": 256}
        scaled = scaled_config(config, spec_of(config, method, target))
        folder = _written(tmp_path / f"{name}-{method}", scaled.config)
        asked[folder] = target if name == "phi3" else None
        positions = read_positions(scaled.config)
        told = [positions.parameters, *(other for other in positions.others.values() if other)]
        expected[folder.name] = [
            methods.of_parameters(one, positions.rotary_dim, positions.length or 0, target) for one in told
        ]
    tables = _of_vllm(asked, engine_python, tmp_path)
    for name, wanted in expected.items():
        assert int(tables[f"{name}.longest"]) == target, name
        found = [tables[f"{name}.{index}"] for index in range(2) if f"{name}.{index}" in tables]
        assert len(found) == len(wanted), name
        for frequencies in wanted:
            angles = torch.arange(target)[:, None] * torch.tensor(frequencies.inverse, dtype=torch.float64)
            mine = torch.cat((angles.cos(), angles.sin()), dim=1) * frequencies.multiplier
            assert any(bool(((mine - table[:target]).abs() < _slack(target)).all()) for table in found), name


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_requests_past_the_original_length(method: Method, tmp_path: Path, engine_python: Path) -> None:
    """Are taken, scored and continued as by transformers, also where the config states the length before."""
    folder = tiny_llama(tmp_path / "model", hidden=2 * HEAD, heads=2, kv_heads=1, dtype=torch.float32)
    before = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(scaled_config(before, ContextSpec(method, 256)).config))
    tokens = torch.randint(1, 250, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    asked, out = tmp_path / "asked.json", tmp_path / "out.json"
    engine = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_num_seqs": 1}
    asked.write_text(json.dumps({"prompts": [tokens], "new": 8, "engine": engine}))
    _run(engine_python, SCORES, folder, asked, out)
    answer = json.loads(out.read_text())["results"][0]
    whole_T = torch.tensor(tokens + answer["tokens"])
    found = torch.tensor(answer["prompt"] + answer["logprobs"])
    # Both in fp32; two engines sum in other orders.
    torch.testing.assert_close(found, _scores(folder, None, whole_T), rtol=0, atol=2e-3)
    assert (found - _scores(folder, LlamaConfig.from_dict(before), whole_T)).abs().mean() > 0.05


def _scores(folder: Path, config: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, of the weights under a config or their own."""
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores_TV: torch.Tensor = model(tokens_T[None]).logits[0, :-1].log_softmax(-1)
    return scores_TV.gather(1, tokens_T[1:, None])[:, 0]


def _run(python: Path, worker: Path, *arguments: Path) -> None:
    """A worker in the engine's environment, in the folder of its last argument."""
    env = engine_environment(python, {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"})
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [python, worker, *arguments],
        env=env,
        cwd=arguments[-1].parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


def _slack(tokens: int) -> torch.Tensor:
    """By how much cosines of each position may differ, [positions, 1]."""
    return FP32 * (2 + torch.arange(tokens)[:, None])


def _written(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with nothing but a config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _of_vllm(longest: dict[Path, int | None], python: Path, at: Path) -> dict[str, torch.Tensor]:
    """What the worker writes, by names of the folders; ``longest`` has the tokens of a request."""
    asked, out = at / "models.json", at / "tables.safetensors"
    models = {folder.name: {"folder": str(folder), "longest": tokens} for folder, tokens in longest.items()}
    asked.write_text(json.dumps(models))
    _run(python, WORKER, asked, out)
    tables: dict[str, torch.Tensor] = load_file(out)
    return tables


def _of_transformers(folder: Path, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, [positions, head_dim], from its own module."""
    config: Any = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        kind = type(LlamaForCausalLM(config).model.rotary_emb)
    cos, sin = kind(config)(torch.zeros(1, 1), torch.arange(longest)[None])
    return cos[0], sin[0]
