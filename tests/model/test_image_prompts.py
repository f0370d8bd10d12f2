"""Prompts with images through the tape: bit-equal to the ordinary forward pass, towers and all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForImageTextToText

from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.hidden import HiddenStates
from compressor.model.load import set_dtype
from compressor.model.tape import Tape

from .wrappers import image_prompt

Open = Callable[[str], FolderSource]
CPU = torch.device("cpu")
IDS = torch.arange(3, 27)[None]


def _replayed(
    source: FolderSource, prompt: dict[str, torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    states = HiddenStates(CPU)
    tape = Tape.record(source, [IDS], dtype=dtype, device=CPU, states=states, prompts=[prompt])
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        for batch in range(len(states)):
            out = tape.run(block, states, batch)
            assert out is not None
            states.put(batch, out)
    return [tape.finish(states.get(batch)) for batch in range(len(states))]


@pytest.mark.filterwarnings("ignore:.*ComplexHalf|.*complex:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma3_with_tower", "mistral3", "qwen2_5_vl", "llama4_with_tower"])
@torch.no_grad()
def test_replay_is_the_ordinary_forward_pass(name: str, dtype: torch.dtype, family: Open) -> None:
    """A row of text and a prompt with an image, in one tape."""
    source, prompt = family(name), image_prompt(name)
    model = set_dtype(AutoModelForImageTextToText.from_pretrained(source.model_dir()), dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    given = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in prompt.items()
    }
    ordinary = [model(input_ids=IDS, use_cache=False).logits, model(**given, use_cache=False).logits]
    for ours, theirs in zip(_replayed(source, prompt, dtype), ordinary, strict=True):
        assert torch.equal(ours, theirs)


def test_features_between_blocks_are_refused(family: Open) -> None:
    """Qwen3-VL adds features of the image to the hidden states of its first blocks."""
    with pytest.raises(CheckpointError, match="computes something between its blocks"):
        _replayed(family("qwen3_vl"), image_prompt("qwen3_vl"), torch.float32)
