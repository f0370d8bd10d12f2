"""The benchmark that holds the roofline against decoding: its model, its count of bytes, what it stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from scripts import bench
from scripts.benchmarks import process, roofline


@pytest.fixture(autouse=True)
def attention() -> None:
    """Attention of the benchmark is in transformers' table."""
    AttentionInterface.register(roofline._ATTENTION, roofline._attend)


def test_a_row_for_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both widths and a prompt; predictions are finite, and each row is on the disk before the next."""
    monkeypatch.setattr(process, "RESULTS", tmp_path)
    monkeypatch.setitem(roofline._RATE_SIDE, "cpu", 256)
    monkeypatch.setitem(roofline._READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(roofline, "_REPLAY_S", 0.001)
    words = [
        "roofline",
        "--name",
        "roofline",
        "--shapes",
        "tiny",
        "--batches",
        "1",
        "2",
        "--decode-context",
        "32",
    ]
    options = bench.parse(words)
    options.result_name = bench.result_name(options)
    found = roofline.roofline(options)
    assert [(row["bits"], row["what"], row["batch"]) for row in found["rows"]] == [
        (16, "decode", 1),
        (16, "decode", 2),
        (16, "prompt", 1),
        (4, "decode", 1),
        (4, "decode", 2),
    ]
    for row in found["rows"]:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["roofline_off"] == pytest.approx(row["roofline_ms"] / row["ms"] - 1)
    assert json.loads((tmp_path / "roofline.json").read_text())["rows"] == found["rows"]
    assert found["left_out"] == []


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is told."""
    monkeypatch.setattr(process, "RESULTS", tmp_path)
    monkeypatch.setitem(roofline._RATE_SIDE, "cpu", 128)
    monkeypatch.setitem(roofline._READ_BYTES, "cpu", 1 << 20)
    options = bench.parse(["roofline", "--shapes", "tiny", "--minutes", "0"])
    options.result_name = "none"
    found = roofline.roofline(options)
    assert found["rows"] == []
    assert len(found["left_out"]) == 4


def test_a_failure_is_tried_again_without_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And told; a second one leaves the row out."""
    stances: list[str] = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    failures = [RuntimeError("no graph of it\nmore"), RuntimeError("no kernel"), RuntimeError("")]

    def decoded(*how: object) -> dict[str, int]:
        if how == ("bad",) or len(failures) == 3:
            raise failures.pop(0)
        return {"row": 1}

    monkeypatch.setattr(roofline, "_decoded", decoded)
    result: dict[str, list[str]] = {"left_out": []}
    assert roofline._row(result, "first", "good") == {"row": 1}
    assert roofline._row(result, "second", "bad") is None
    assert result["left_out"] == [
        "first: no graph of it",
        "second: no kernel",
        "second, nothing compiled: RuntimeError",
    ]
    assert set(stances) == {"force_eager"}


def test_the_planned_bytes_are_the_models() -> None:
    """In 16 bit to the byte: all parameters but a looked-up embedding, and the cache of each sequence."""
    sizes = roofline.SHAPES["tiny"] | {"tie_word_embeddings": False}
    config = AutoConfig.for_model("llama", **roofline.SHAPES["tiny"])
    model = AutoModelForCausalLM.from_config(config)
    assert sizes["vocab_size"] == config.vocab_size
    read = 2 * sum(parameter.numel() for parameter in model.parameters())  # tied: the head is the embedding
    cache = 2 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 40
    assert roofline.planned_load("tiny", 16, 40).moved(3) == read + 3 * cache


def test_the_packed_layers_are_nearly_the_planned_bytes() -> None:
    """PyTorch keeps zeros in 16 bit where checkpoints have 4: less than 3% more."""
    model = roofline._made("small", "cpu")
    roofline.pack_layers(model)
    packed = sum(part.nbytes for part in model.modules() if isinstance(part, roofline.PackedLinear))
    planned = roofline.planned_load("small", 4, 1).weights
    norms = 2 * sum(value.numel() for name, value in model.named_parameters() if "norm" in name)
    assert 0.97 < (planned.read(1) - planned.head_bytes - norms) / packed <= 1


def test_packed_products_are_those_of_their_codes() -> None:
    """Against the decoded matrix: scale times (code - 8) plus zero, the kernel's convention."""
    torch.manual_seed(1)
    layer = roofline.PackedLinear(64, 256, torch.device("cpu"))
    codes_OI = torch.randint(0, 16, (64, 256), dtype=torch.int32)
    layer.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    layer.scales_GO2 = torch.rand(2, 64, 2).to(torch.bfloat16)
    scales_OG, zeros_OG = layer.scales_GO2.float().permute(2, 1, 0)
    groups = (64, 2, roofline.GROUP)
    weight_OI = ((codes_OI.view(groups) - 8) * scales_OG[..., None] + zeros_OG[..., None]).flatten(1)
    x = torch.randn(3, 256).to(torch.bfloat16)
    # bfloat16 in and out, sums of 256 in fp32: two roundings of 2^-9 at most.
    torch.testing.assert_close(layer(x).float(), x.float() @ weight_OI.T, rtol=0.02, atol=0.5)


def test_a_step_is_what_transformers_computes() -> None:
    """The held cache and the attention give the logits of an ordinary pass over the same tokens."""
    model = roofline._made("tiny", "cpu")
    ids = torch.full((1, 9), 7)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        expected = plain.eval()(ids).logits[:, -1]
        cached = plain(ids[:, :-1], use_cache=True).past_key_values
        held = roofline._Held(model, 1, 9)
        for (keys, values), layer in zip(held.layers, cached.layers, strict=True):
            keys[:, :, :-1] = layer.keys
            values[:, :, :-1] = layer.values
        mask = torch.zeros(1, 1, 1, 9, dtype=torch.bfloat16)
        found = model(
            ids[:, :1], position_ids=torch.full((1, 1), 8), attention_mask=mask, past_key_values=held
        ).logits[:, -1]
    # Two layers in bfloat16, whose order of sums differs.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
