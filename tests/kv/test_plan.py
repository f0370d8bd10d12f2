"""Plans written and read back; what strangers may have put in their place.

Legend: B sequences, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import CheckpointError
from compressor.kv.base import KvCodec
from compressor.kv.formats import FORMATS
from compressor.kv.fp8 import Fp8Codec
from compressor.kv.plan import JSON_NAME, TENSORS_NAME, KvPlan, LayerPlan, codec_classes
from tests.kv.test_fitted import random_codec

HEADS, HEAD_DIM = 2, 64


def a_plan() -> KvPlan:
    """A layer of every kind: 16 bit, a format of vLLM's, static scales, fitted."""
    make = FORMATS["turboquant_4bit_nc"].make
    assert make is not None
    groups = [[2 * i, 2 * i + 1] for i in range(20)]
    return KvPlan(
        {
            0: LayerPlan("bf16", HEADS, HEAD_DIM),
            2: LayerPlan("turboquant_4bit_nc", HEADS, HEAD_DIM, *make()),
            3: LayerPlan("fp8", HEADS, HEAD_DIM, Fp8Codec(torch.tensor([0.5, 2.0])), Fp8Codec()),
            5: LayerPlan("fitted", HEADS, HEAD_DIM, *(random_codec(HEADS, HEAD_DIM, groups) for _ in "kv")),
        },
        sink_tokens=4,
    )


def test_written_and_read(tmp_path: Path) -> None:
    """Every codec comes back and makes the same bytes."""
    plan = a_plan()
    plan.write(tmp_path)
    again = KvPlan.read(tmp_path)
    assert list(again.layers) == [0, 2, 3, 5]
    assert (again.sink_tokens, again.recent_tokens) == (4, 0)
    assert again.token_bytes == plan.token_bytes
    x_BHTD = torch.randn(1, HEADS, 7, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    for index, layer in plan.layers.items():
        assert again.layers[index].format == layer.format
        pairs = (layer.keys, again.layers[index].keys), (layer.values, again.layers[index].values)
        for codec, copy in pairs:
            assert type(codec) is type(copy)
            if isinstance(codec, KvCodec) and isinstance(copy, KvCodec):
                assert torch.equal(codec.encode(x_BHTD), copy.encode(x_BHTD))
    (tmp_path / "again").mkdir()
    again.write(tmp_path / "again")
    for name in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_codecs_of_all_formats_come_back(tmp_path: Path) -> None:
    """``options`` and ``tensors`` of each codec make it again, through the files."""
    layers = {}
    for index, form in enumerate(FORMATS.values()):
        if form.make is not None:
            layers[index] = LayerPlan(form.name, HEADS, HEAD_DIM, *form.make())
            assert layers[index].slot_bytes == form.slot_bytes(HEAD_DIM)
    KvPlan(layers).write(tmp_path)
    again = KvPlan.read(tmp_path)
    assert {i: layer.token_bytes for i, layer in again.layers.items()} == {
        i: layer.token_bytes for i, layer in layers.items()
    }


def test_bytes() -> None:
    """Counted by hand: 2 heads of 64; 16 bit 256 bytes a head, TurboQuant 70, fp8 128, fitted 20 a layer."""
    plan = a_plan()
    assert plan.token_bytes == 2 * 256 + 2 * 70 + 2 * 128 + 2 * 20
    assert plan.bits == pytest.approx(16 * 948 / (4 * 512))
    # Four sink tokens of three packed layers.
    assert plan.bytes_at(100) == 948 * 100 + 4 * (3 * 512 - (948 - 512))
    assert plan.bytes_at(3) == 3 * 4 * 512
    assert plan.bits_at(100) == pytest.approx(16 * plan.bytes_at(100) / (4 * 512 * 100))
    assert set(plan.codecs()) == {2, 3, 5}
    assert plan.codecs()[2].sink_tokens == 4


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes a plan with its JSON changed."""
    a_plan().write(folder)
    stored = json.loads((folder / JSON_NAME).read_text())
    change(stored)
    (folder / JSON_NAME).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layers"), "not those of a plan"),
        (lambda p: p.update(version=2), "version 2"),
        (lambda p: p.update(layers={}), "must be a list"),
        (lambda p: p.update(sink_tokens=-1), "sink_tokens"),
        (lambda p: p.update(recent_tokens=2**40), "recent_tokens"),
        (lambda p: p["layers"].append(p["layers"][0]), "listed twice"),
        (lambda p: p["layers"].append(7), "a layer is not described"),
        (lambda p: p["layers"][0].update(kv_heads=0), "kv_heads"),
        (lambda p: p["layers"][0].update(kv_heads=True), "kv_heads"),
        (lambda p: p["layers"][0].update(format="x" * 100), "no name of a format"),
        (lambda p: p["layers"][0].update(format="\x1b[2J"), "no name of a format"),
        (lambda p: p["layers"][1].update(keys=None), "only one of keys and values"),
        (lambda p: p["layers"][1].update(head_dim=48), "2.keys"),
        (lambda p: p["layers"][1]["keys"].update(kind="os.system"), "unknown codec"),
        (lambda p: p["layers"][1]["keys"].update(kind=["fp8"]), "unknown codec"),
        (lambda p: p["layers"][1]["keys"].update(options={"self": 1}), "not the options"),
        (lambda p: p["layers"][1]["keys"].update(options=[]), "not the options"),
        (lambda p: p["layers"][1]["keys"]["options"].update(bits="9" * 99), "2.keys"),
        (lambda p: p["layers"][1]["keys"]["options"].update(bits=10**9), "2.keys"),
        (lambda p: p["layers"][1]["keys"]["options"].update(bits=4.0), "not the options"),
        (lambda p: p["layers"][3]["keys"]["options"].update(kv_heads=4), "5.keys"),
        (lambda p: p["layers"][3].update(kv_heads=4), "number of KV heads"),
        (lambda p: p["layers"][3]["keys"]["options"].update(mean=[0.0] * 128), "not the options"),
        (lambda p: p["layers"].pop(), "no layer uses tensor"),
    ],
)
def test_hostile_json(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    """One message that names the file; nothing is run."""
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        KvPlan.read(tmp_path)
    assert JSON_NAME in str(caught.value)


def test_hostile_files(tmp_path: Path) -> None:
    """Missing, cut, not JSON, other tensors."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        KvPlan.read(tmp_path)
    a_plan().write(tmp_path)
    tensors = load_file(tmp_path / TENSORS_NAME)
    save_file(tensors | {"5.keys.mean": torch.zeros(3)}, tmp_path / TENSORS_NAME)
    with pytest.raises(CheckpointError, match=r"5\.keys: no fitted codec"):
        KvPlan.read(tmp_path)
    save_file(tensors | {"5.keys.__class__": torch.zeros(3)}, tmp_path / TENSORS_NAME)
    with pytest.raises(CheckpointError, match="not the options and tensors"):
        KvPlan.read(tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    # Static FP8 scales: without them a cache would read its bytes with a scale of 1.
    with pytest.raises(CheckpointError, match=r"3\.keys: its tensors are not those"):
        KvPlan.read(tmp_path)
    (tmp_path / JSON_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        KvPlan.read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "tensors", "message"),
    [
        ("fp8", {}, {"scale": torch.ones(3)}, "number of KV heads"),
        ("fp8", {}, {"scale": torch.ones(0)}, "number of KV heads"),
        ("turboquant_split", {"bits": 2}, {"outliers": torch.arange(32).repeat(3, 1)}, "number of KV heads"),
        ("turboquant_mse", {}, {"bits": torch.tensor(2)}, "tensors are not those"),
        ("turboquant_mse", {"bits": 2}, {"seed": torch.tensor(2)}, "tensors are not those"),
    ],
)
def test_tensors_of_another_model(
    kind: str, options: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    """What would only fail at the first token, or make sizes that are tensors, is refused when read."""
    codec = {"kind": kind, "options": options}
    layer = {"layer": 0, "format": "x", "kv_heads": 2, "head_dim": 128, "keys": codec, "values": codec}
    plan = {"version": 1, "sink_tokens": 0, "recent_tokens": 0, "layers": [layer]}
    (tmp_path / JSON_NAME).write_text(json.dumps(plan))
    stored = {f"0.{side}.{name}": x.clone() for side in ("keys", "values") for name, x in tensors.items()}
    save_file(stored, tmp_path / TENSORS_NAME)
    with pytest.raises(CheckpointError, match=message):
        KvPlan.read(tmp_path)


def test_kinds_differ() -> None:
    """A kind names one class."""
    classes = codec_classes()
    assert all(found.kind == kind for kind, found in classes.items())
    assert "fitted" in classes


def test_no_layers() -> None:
    """Of latent attention none is listed: nothing is stored in fewer bits."""
    assert KvPlan().bits == 16.0
    assert KvPlan().token_bytes == 0
