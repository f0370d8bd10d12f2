"""Hidden states between blocks: wherever they wait, they come back as the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.model.hidden import HiddenStates

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_states_come_back_bit_for_bit(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also those that are no contiguous block of memory."""
    states = HiddenStates(
        CPU, keep=CPU if place == "host" else None, folder=tmp_path if place == "disk" else None
    )
    first, second = torch.randn(2, 5, 8).to(dtype), torch.randn(8, 3, 1).to(dtype).transpose(0, 2)
    states.put(0, first)
    states.put(3, second)
    assert torch.equal(states.get(0), first)
    assert torch.equal(states.get(3), second)
    assert states.get(0).dtype == dtype
    assert len(states) == 2
    states.put(0, second)
    assert torch.equal(states.get(0), second)
    with pytest.raises(KeyError):
        states.get(1)


def test_bytes_in_memory() -> None:
    """Of what is held now, not of what was."""
    states = HiddenStates(CPU)
    states.put(0, torch.zeros(10, 10))
    states.put(0, torch.zeros(5, 10))
    assert states.nbytes == 200


def test_a_folder_is_taken_up_again(tmp_path: Path) -> None:
    """What a killed run left whole is there; half a file is not."""
    first = HiddenStates(CPU, folder=tmp_path)
    first.put(7, torch.arange(6.0).reshape(1, 2, 3))
    (tmp_path / "000008.half").write_bytes(b"half")
    again = HiddenStates(CPU, folder=tmp_path)
    assert len(again) == 1
    assert torch.equal(again.get(7), torch.arange(6.0).reshape(1, 2, 3))
    assert again.nbytes == first.nbytes > 24
