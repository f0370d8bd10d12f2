"""What is gathered from a whole model and block by block, against plain sums.

Legend: N sequences, T tokens, H KV heads, D head_dim, E = H * D.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.kv.fitted_rotary import turned
from compressor.kv.formats import FORMATS
from compressor.model.attention_heard import HeardAttention, heard_attention
from compressor.progress import Silent
from compressor.stages.kv_gather import Wanted, gather_blocks, gather_whole
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
IDS_NT = torch.arange(96).reshape(4, 24) * 11 % 250
HEADS, HEAD_DIM = 2, 16
FREQUENCIES_P = 10000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))


def wanted(*names: str, sink: int = 0, most_rows: int = 1000) -> Wanted:
    """Two layers; codecs of these formats."""
    keys, values = {}, {}
    for name in names:
        make = FORMATS[name].make
        assert make is not None
        keys[name], values[name] = make()
    return Wanted((0, 1), sink, most_rows, (keys, values), tried=2, frequencies_P=FREQUENCIES_P)


def heard_plainly(folder: Path) -> dict[int, HeardAttention]:
    """All sequences at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heard: dict[int, HeardAttention] = {}
    with torch.no_grad(), heard_attention(model, lambda call: heard.update({call.layer: call})):
        model(IDS_NT, use_cache=False)
    return heard


@pytest.mark.parametrize("whole", [True, False])
def test_sums(whole: bool, tmp_path: Path) -> None:
    """Second moments and kept tokens are those of all sequences."""
    source = FolderSource(tiny_llama(tmp_path))
    gather = gather_whole if whole else gather_blocks
    gathered = gather(source, IDS_NT, wanted(sink=2), CPU, Silent())
    assert gathered.gradients == whole
    assert gathered.tokens == 96
    for index, call in heard_plainly(tmp_path).items():
        layer = gathered.layers[index]
        rows_NE = call.key_BHTD[:, :, 2:].transpose(1, 2).flatten(2).flatten(0, 1)
        # Kept in float16.
        torch.testing.assert_close(layer.keys.rows_NE, rows_NE, rtol=1e-3, atol=1e-3)
        assert layer.turned_keys is not None
        back = turned(call.key_BHTD, FREQUENCIES_P, 0, back=True)[:, :, 2:]
        back_NE = back.transpose(1, 2).flatten(2).flatten(0, 1)
        torch.testing.assert_close(layer.turned_keys.rows_NE, back_NE, rtol=1e-3, atol=1e-3)
        if whole:
            # Turning changes the metric's axes, not how much it counts in all.
            traces = [side.metric_EE.trace() for side in (layer.keys, layer.turned_keys)]
            torch.testing.assert_close(*traces, rtol=1e-5, atol=0)
        for head in range(HEADS):
            queries = call.query_BQTD[:, 2 * head : 2 * head + 2].reshape(-1, HEAD_DIM).double()
            torch.testing.assert_close(layer.query_HDD[head], queries.T @ queries, rtol=1e-4, atol=1e-4)


def test_gradients_tell_what_errors_do(tmp_path: Path) -> None:
    """The metric's and the codecs' errors are of the size of the loss that small errors cause.

    With labels drawn by the model the expected gradient is zero and the Fisher information its Hessian; with
    few tokens and labels, a factor of two either way must do.
    """
    source = FolderSource(tiny_llama(tmp_path, vocab=256))
    ids_NT = torch.randint(0, 250, (24, 32), generator=torch.Generator().manual_seed(0))
    gathered = gather_whole(source, ids_NT, wanted(), CPU, Silent())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    made = torch.Generator().manual_seed(1)
    size = 0.05

    def noisy(call: HeardAttention) -> tuple[torch.Tensor, torch.Tensor] | None:
        if call.layer != 1:
            return None
        noise = size * torch.randn(call.value_BHTD.shape, generator=made)
        return call.key_BHTD, call.value_BHTD + noise

    with torch.no_grad():
        plain = model(ids_NT, use_cache=False).logits.log_softmax(-1)
        with heard_attention(model, noisy):
            moved = model(ids_NT, use_cache=False).logits.log_softmax(-1)
    measured = float((plain.exp() * (plain - moved)).sum(-1).mean())
    side = gathered.layers[1].values
    expected = 0.5 * size**2 * float(side.metric_EE.trace()) / side.tokens
    assert 0.5 < measured / expected < 2.0


@pytest.mark.parametrize("whole", [True, False])
def test_better_formats_have_smaller_errors(whole: bool, tmp_path: Path) -> None:
    """Eight bits before four before three, keys and values alike."""
    source = FolderSource(tiny_llama(tmp_path))
    gather = gather_whole if whole else gather_blocks
    names = ("int8_per_token_head", "turboquant_4bit_nc", "turboquant_3bit_nc")
    gathered = gather(source, IDS_NT, wanted(*names), CPU, Silent())
    for layer in gathered.layers.values():
        for side in (layer.keys, layer.values):
            assert 0 < side.errors[names[0]] < 0.2 * side.errors[names[1]]
            assert side.errors[names[1]] < side.errors[names[2]]


def test_bounded_rows(tmp_path: Path) -> None:
    """No more tokens are kept than asked for, from all sequences."""
    source = FolderSource(tiny_llama(tmp_path))
    gathered = gather_whole(source, IDS_NT, wanted(most_rows=20), CPU, Silent())
    all_of = gather_whole(source, IDS_NT, wanted(), CPU, Silent())
    rows_NE = gathered.layers[0].values.rows_NE
    assert 15 < len(rows_NE) <= 20
    assert torch.equal(rows_NE, all_of.layers[0].values.rows_NE[::5][: len(rows_NE)])


def test_deterministic(tmp_path: Path) -> None:
    """Labels are drawn alike."""
    source = FolderSource(tiny_llama(tmp_path))
    one, other = (gather_whole(source, IDS_NT, wanted(), CPU, Silent()) for _ in range(2))
    assert torch.equal(one.layers[0].keys.metric_EE, other.layers[0].keys.metric_EE)


def test_attention_that_is_not_heard(tmp_path: Path) -> None:
    """A family with attention of its own is refused by name of the layer."""
    source = FolderSource(FAMILIES["falcon"](tmp_path))
    with pytest.raises(CheckpointError, match="cannot be heard"):
        gather_whole(source, IDS_NT, wanted(), CPU, Silent())
