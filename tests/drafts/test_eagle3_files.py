"""A head's folder: what is written, read back, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.drafts.eagle3_files import read_head, read_stored, write_head
from compressor.errors import CheckpointError, UserError
from tests.drafts.eagle import Target, make_head, make_target

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A tiny Llama."""
    return make_target(tmp_path_factory.mktemp("models") / "target")


def _write(target: Target, folder: Path, known: int | None = 100, **more: Any) -> Path:
    told: dict[str, Any] = {"verifier": "/models/target", "tokens": 3, "dtype": torch.bfloat16}
    write_head(folder, make_head(target, known=known), **told | more)
    return folder


@pytest.mark.parametrize("known", [None, 100])
def test_round_trip(target: Target, tmp_path: Path, known: int | None) -> None:
    """Values, sizes and vocabulary; what vLLM shares is not stored."""
    _write(target, tmp_path, known, dtype=torch.float32)
    head, back = make_head(target, known=known), read_head(tmp_path, target.config, target.ends)
    assert back.shape == head.shape
    for name, parameter in head.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("embed_tokens" in name for name in stored)
    assert ("lm_head.weight" in stored) == ("d2t" in stored) == ("t2d" in stored) == (known is not None)
    if head.vocabulary is not None:
        assert back.vocabulary is not None
        assert torch.equal(back.vocabulary.ids_R, head.vocabulary.ids_R)
    told = read_stored(tmp_path, target.config)
    assert (told.tokens, told.verifier) == (3, "/models/target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_config(target: Target, tmp_path: Path) -> None:
    """The fields that vLLM 0.32 reads (transformers_utils/configs/speculators)."""
    config = json.loads((_write(target, tmp_path) / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 100,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
        "dtype": "bfloat16",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "/models/target", "architectures": []},
        },
    }
    assert (layer["model_type"], layer["vocab_size"], layer["num_hidden_layers"]) == ("llama", 256, 1)
    assert layer["rope_parameters"] == target.config["rope_parameters"]


def test_not_finite(target: Target, tmp_path: Path) -> None:
    """Broken training is told before anything is written."""
    head = make_head(target)
    with torch.no_grad():
        head.fc.weight[0, 0] = 1e30
    with pytest.raises(UserError, match=r"fc\.weight"):
        write_head(tmp_path, head, verifier="x", tokens=3, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def _layer(**more: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["transformer_layer_config"].update(more)


def _top(**more: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(more)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_top(speculators_model_type="eagle"), "speculators_model_type"),
        (_top(draft_vocab_size=True), "draft_vocab_size"),
        (_top(draft_vocab_size=10**12), "no head for this target"),
        (_top(draft_vocab_size=99), r"lm_head\.weight"),
        (_top(eagle_aux_hidden_state_layer_ids=[4, 2, 3]), "increasing"),
        (_top(eagle_aux_hidden_state_layer_ids=[1, 2, 5]), "0 to 4"),
        (_top(eagle_aux_hidden_state_layer_ids=[]), "no list"),
        (_top(eagle_aux_hidden_state_layer_ids=["2"]), "no list"),
        (_top(norm_before_residual="yes"), "truth value"),
        (_top(norm_output=True), "norm_output"),
        (_top(transformer_layer_config=[]), "no JSON object"),
        (_top(speculators_config=None), "number of tokens"),
        (_layer(hidden_size=128), "hidden_size"),
        (_layer(intermediate_size=10**9), "intermediate_size"),
        (_layer(intermediate_size=129), "gate_proj"),
        (_layer(num_hidden_layers=2), "num_hidden_layers"),
        (_layer(rope_parameters={"rope_type": "yarn"}), "rope_parameters"),
        (_layer(model_type="qwen3"), "model_type"),
        (lambda config: config["speculators_config"].update(proposal_methods=[{}]), "number of tokens"),
        (lambda config: config["speculators_config"]["verifier"].clear(), "verifier"),
    ],
)
def test_hostile_config(
    target: Target, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    """Refused with a reason, not a traceback."""
    path = _write(target, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        read_stored(tmp_path, target.config)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"a": 1, "a": 2}', b"[" * 99999, b" " * 2**21])
def test_no_config(target: Target, tmp_path: Path, raw: bytes) -> None:
    """Neither."""
    (_write(target, tmp_path) / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_stored(tmp_path, target.config)


def _swap(name: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = made(tensors[name])

    return change


def _put(tensor: torch.Tensor, place: int, value: float) -> torch.Tensor:
    tensor.view(-1)[place] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "fc.weight is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more is unknown"),
        (_swap("fc.weight", lambda weight: weight.T.contiguous()), "fc.weight"),
        (_swap("norm.weight", torch.Tensor.long), "norm.weight"),
        (_swap("norm.weight", lambda weight: _put(weight, 3, float("nan"))), "not finite"),
        (_swap("d2t", lambda offsets: _put(offsets, 0, -1)), "d2t"),
        (_swap("d2t", lambda offsets: _put(offsets, -1, 2**62)), "d2t"),
        (_swap("d2t", lambda offsets: _put(offsets, -1, 157)), "d2t"),
        (_swap("d2t", lambda offsets: offsets.flip(0).contiguous()), "d2t"),
        (_swap("t2d", torch.logical_not), "disagree"),
    ],
)
def test_hostile_tensors(target: Target, tmp_path: Path, change: Callable[[Tensors], Any], told: str) -> None:
    """Likewise."""
    path = _write(target, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=told):
        read_head(tmp_path, target.config, target.ends)
