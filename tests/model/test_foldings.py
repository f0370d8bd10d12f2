"""What feeds what: folds hold in every family, in the whole model as transformers loads it, and only then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.folder import FolderSource
from compressor.model.blocks import Block
from compressor.model.foldings import Fold, apply, find_folds
from compressor.model.hidden import HiddenStates
from compressor.model.load import load_source_model
from compressor.model.tape import Tape

from .zoo import FAMILIES

Open = Callable[[str], FolderSource]
CPU = torch.device("cpu")
IDS = torch.arange(16).view(2, 8) * 5 % 250
# Whole models are loaded of these: norms of every kind, fused and repeated heads, experts, linear attention.
LOADED = ("llama", "phi3", "gemma3", "stablelm", "llama4", "qwen3_next", "deepseek_v3", "opt")

# Family -> (block, leaf of what makes the input, how many matrices and how many 16-bit tensors read it).
EXPECTED: dict[str, set[tuple[int, str, int, int]]] = {
    "llama": {
        (0, "input_layernorm", 3, 0),
        (0, "post_attention_layernorm", 2, 0),
        (0, "self_attn.v_proj", 1, 0),
        (0, "mlp.up_proj", 1, 0),
    },
    # One matrix holds q, k and v, one gate and up.
    "phi3": {
        (0, "input_layernorm", 1, 0),
        (0, "post_attention_layernorm", 1, 0),
        (0, "self_attn.qkv_proj", 1, 0),
        (0, "mlp.gate_up_proj", 1, 0),
    },
    # Values are clamped before o_proj reads them, norms have no weights.
    "olmo": {(0, "mlp.up_proj", 1, 0)},
    # Outputs are normalised, not inputs.
    "olmo2": {(0, "self_attn.v_proj", 1, 0), (0, "mlp.up_proj", 1, 0)},
    # A norm that reads another norm's output, and one whose output goes on to the next block.
    "gemma2": {
        (0, "input_layernorm", 3, 0),
        (0, "pre_feedforward_layernorm", 2, 0),
        (0, "self_attn.v_proj", 1, 0),
        (0, "mlp.up_proj", 1, 0),
    },
    # Attention and MLP read one norm.
    "cohere": {(0, "input_layernorm", 5, 0), (0, "self_attn.v_proj", 1, 0), (0, "mlp.up_proj", 1, 0)},
    # A shared expert, four others (read through a router's score), and the router.
    "llama4": {
        (1, "input_layernorm", 3, 0),
        (1, "post_attention_layernorm", 10, 1),
        (1, "self_attn.v_proj", 1, 0),
        (1, "feed_forward.shared_expert.up_proj", 1, 0),
    },
    # in_proj_ba; router and the shared expert's gate.
    "qwen3_next": {
        (0, "input_layernorm", 1, 1),
        (0, "post_attention_layernorm", 10, 2),
        (0, "mlp.shared_expert.up_proj", 1, 0),
    },
    # Experts in one tensor whose layout is not known read the second norm.
    "granitemoe": {(0, "input_layernorm", 3, 0), (0, "self_attn.v_proj", 1, 0)},
    # The value heads lie between other rows of kv_b_proj.
    "deepseek_v3": {
        (0, "input_layernorm", 2, 0),
        (0, "self_attn.q_a_layernorm", 1, 0),
        (0, "self_attn.kv_a_layernorm", 1, 0),
        (0, "post_attention_layernorm", 2, 0),
        (0, "mlp.up_proj", 1, 0),
    },
}


def _tape(source: FolderSource, dtype: torch.dtype = torch.float32) -> Tape:
    return Tape.record(source, [IDS], dtype=dtype, device=CPU, states=HiddenStates(CPU), small=IDS)


def _some_scales(fold: Fold, seed: int) -> torch.Tensor:
    """fp32 [K]: from a third to three, no powers of two."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(2.2 * torch.rand(fold.scales, generator=generator) - 1.1)


def _folds(tape: Tape) -> list[tuple[int, Block, list[Fold]]]:
    found = []
    for index in range(len(tape.blocks)):
        block = tape.load(index)
        found.append((index, block, find_folds(tape, block)))
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name: str, family: Open) -> None:
    """The inputs of these families, with all that reads them."""
    wanted = {index for index, *_ in EXPECTED[name]}
    found = {
        (
            index,
            fold.name.removesuffix(".weight").partition(f".{index}.")[2],
            sum(spot.place is not None for spot in fold.multiplied),
            sum(spot.place is None for spot in fold.multiplied),
        )
        for index, _, folds in _folds(_tape(family(name)))
        for fold in folds
        if index in wanted
    }
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compute_the_same(name: str, family: Open) -> None:
    """With all folds of a block at once, whatever the scales; finding them leaves the block as it was.

    fp32: products and norms of other magnitudes round differently, by some 1e-7 each.
    """
    tape = _tape(family(name))
    hidden = torch.randn(tape.small_hidden.shape, generator=torch.Generator().manual_seed(3))
    for index, block, folds in _folds(tape):
        before = tape.rehearse(block, hidden)
        untouched = tape.load(index).module.state_dict()
        assert all(torch.equal(value, untouched[key]) for key, value in block.module.state_dict().items())
        for number, fold in enumerate(folds):
            apply(block, fold, _some_scales(fold, number))
        after = tape.rehearse(block, hidden)
        assert float((after - before).norm() / (before - hidden).norm()) < 1e-4


@pytest.mark.parametrize("name", LOADED)
@torch.no_grad()
def test_the_source_tensors_are_the_right_ones(name: str, family: Open, tmp_path: Path) -> None:
    """A folder whose tensors are scaled as the folds say computes the same in transformers."""
    source = family(name)
    folder = Path(shutil.copytree(source.model_dir() or "", tmp_path / "scaled"))
    tensors = load_file(folder / "model.safetensors")
    count = 0
    for _, _, folds in _folds(_tape(source)):
        for number, fold in enumerate(folds):
            scale_K = _some_scales(fold, number)
            for spot in fold.multiplied:
                view = spot.of_tensor(tensors[spot.tensor])
                view.mul_(spot.along(fold.expand(scale_K), view))
            for spot in fold.divided:
                view = spot.of_tensor(tensors[spot.tensor])
                view.div_(spot.along(scale_K, view))
            if fold.norm is not None:
                weight = tensors[fold.norm.tensor]
                weight.copy_((weight + fold.offset) / scale_K - fold.offset)
            count += 1
    assert count
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    logits = [load_source_model(made, torch.float32)(IDS).logits for made in (source, FolderSource(folder))]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 1e-4
    changed = load_file(folder / "model.safetensors")
    assert not all(torch.equal(changed[key], source.read(key)) for key in changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_folds_in_16_bit(dtype: torch.dtype, family: Open) -> None:
    """What is found does not depend on what the walk computes in, with norms that add one as well."""
    for name in ("llama", "gemma2", "qwen3_next", "llama4"):
        names = [fold.name for _, _, folds in _folds(_tape(family(name), dtype)) for fold in folds]
        assert names == [fold.name for _, _, folds in _folds(_tape(family(name))) for fold in folds]


def _reader(block: Block, path: str, added: Callable[[Any], Any]) -> None:
    """Gives a module something more that it does with its input, unseen by any hook."""
    module = block.module.get_submodule(path)
    forward = module.forward
    module.forward = lambda x, *rest: forward(x, *rest) + added(x)


@pytest.mark.parametrize("added", [lambda x: 0.01 * x, lambda x: 0.01 * x.abs().mean(-1, keepdim=True)])
def test_unknown_reader_is_noticed(added: Callable[[Any], Any], family: Open) -> None:
    """A norm whose output something else reads, be it little, is not folded into; the others are."""
    tape = _tape(family("llama"))
    block = tape.load(0)
    _reader(block, "mlp", added)
    leaves = [fold.name.split("layers.0.")[1] for fold in find_folds(tape, block)]
    assert leaves == ["input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"]


def test_what_is_not_linear_is_noticed(family: Open) -> None:
    """Nothing moves through a square: neither from o_proj to v_proj, nor from down_proj to up_proj."""
    tape = _tape(family("llama"))
    block = tape.load(0)
    for path in ("self_attn.v_proj", "mlp.up_proj"):
        module = block.module.get_submodule(path)
        module.register_forward_hook(lambda _module, _args, made: made * made)
    assert [fold.norm is not None for fold in find_folds(tape, block)] == [True, True]
