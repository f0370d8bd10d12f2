"""Walks whose blocks do not fit in memory: experts are read when they are computed, and nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.model.hidden import HiddenStates
from compressor.model.tape import Tape
from compressor.progress import Progress, Silent
from compressor.stages.receipts import all_receipts
from compressor.stages.walk import WalkSpec, walk
from compressor.workspace import file_sha256
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama4

from .walking import SPEC, claims_of, some_tokens

RTN = {"kind": "rtn", "search": "minmax"}
# Experts in one tensor, in one tensor each, each gate and up apart, and with biases.
MODELS = ("llama4", "mixtral", "qwen3_moe", "gpt_oss")


def _folder(model: str, tmp_path: Path) -> Path:
    if model == "llama4":
        return tiny_llama4(tmp_path / "model", experts=4, dtype=torch.float32)
    return FAMILIES[model](tmp_path / "model")


class _Stopping(Silent):
    """Interrupts the walk when the first matrix of the second block is solved."""

    def advance(self, amount: int, note: str = "") -> None:
        if note.endswith(".1"):
            raise KeyboardInterrupt


def _walk(folder: Path, target: Path, spec: WalkSpec, progress: Progress | None = None) -> dict[str, str]:
    target.mkdir(exist_ok=True)
    source = FolderSource(folder)
    claims = claims_of(source, {"scheme": "fp8_static", "solver": RTN})
    walk(source, claims, some_tokens(4, 24), spec, target, progress or Silent())
    return {path.name: file_sha256(path) for path in sorted(target.glob("*.safetensors"))}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits(model: str, dtype: Any, tmp_path: Path) -> None:
    """Files and receipts are those of a walk that holds its blocks; also when it was interrupted."""
    folder = _folder(model, tmp_path)
    held = replace(SPEC, dtype=dtype)
    expected = _walk(folder, tmp_path / "held", held)
    stored = replace(held, stored_experts=True, read_ahead=False)
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, tmp_path / "stored", stored, _Stopping())
    assert len(all_receipts(tmp_path / "stored")) == 1
    assert _walk(folder, tmp_path / "stored", stored) == expected
    assert all_receipts(tmp_path / "stored") == all_receipts(tmp_path / "held")


@pytest.mark.parametrize("model", MODELS)
def test_experts_are_in_no_memory(model: str, tmp_path: Path) -> None:
    """A loaded block has all parameters but the experts' matrices, and computes what the whole one does."""
    source = FolderSource(_folder(model, tmp_path))
    cpu = torch.device("cpu")
    states = HiddenStates(cpu)
    tape = Tape.record(source, [some_tokens(2, 12)], dtype=torch.float32, device=cpu, states=states)
    whole, stored = tape.load(0), tape.load(0, stored_experts=True)
    large = {name for name, parameter in whole.module.named_parameters() if parameter.dim() == 3}
    assert large
    kept = {name.replace(".original", "") for name, _ in stored.module.named_parameters()}
    assert kept == {name for name, _ in whole.module.named_parameters()} - large
    with torch.no_grad():
        expected, found = tape.run(whole, states, 0), tape.run(stored, states, 0)
    assert expected is not None
    assert found is not None
    # transformers' own forward on the left
    assert torch.equal(found, expected)
    for place in whole.places:
        assert torch.equal(stored.weight(place.part), whole.weight(place.part))
