"""Inputs rounded as engines round them, in a model whose checkpoint transformers cannot load by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    from compressor.model.blocks import Place
    from compressor.model.decode import StoredWeights
    from compressor.model.load import LoadedCheckpoint
    from compressor.model.routed import Rounding

# Block, module in it, phase.
_Owner = tuple[str, str, str]


def simulate_activations(loaded: LoadedCheckpoint, checkpoint: Path, source: Source) -> LoadedCheckpoint:
    """The same model with inputs rounded as the checkpoint says, where it was loaded without.

    Experts of one layer whose stored ranges differ share the largest, as vLLM 0.32 takes them
    (flashinfer_fp4_moe.py amax_for_moe_activation_quant). Left as it is where the rounding cannot be told of
    every matrix: one outside of the blocks, one whose input cannot be heard, or experts of one layer whose
    inputs are rounded in different ways.

    Args:
        loaded: of the checkpoint; its modules are changed.
        checkpoint: the result's folder.
        source: what the result was made of.
    """
    if loaded.activations_simulated is not False:
        return loaded
    from compressor.model.decode import StoredWeights
    from compressor.model.routed import round_inputs

    weights = StoredWeights(checkpoint)
    found = _roundings(weights, _places(source))
    if found is None:
        return loaded
    for path in {block for block, _, _ in found}:
        of_block = {(owner, phase): made for (block, owner, phase), made in found.items() if block == path}
        round_inputs(loaded.model.get_submodule(path), of_block)
    return replace(loaded, activations_simulated=True)


def _places(source: Source) -> dict[str, tuple[Place, ...]]:
    """Block -> its matrices."""
    from compressor.model.blocks import find_places
    from compressor.model.skeleton import build_skeleton, find_blocks
    from compressor.model.tensor_map import TensorMap

    model = build_skeleton(source)
    tensors = TensorMap.of(model, source.headers, source.label)
    return {
        path: tuple(find_places(model.get_submodule(path), path, tensors, source.headers, source.config)[0])
        for path in find_blocks(model, tensors.filled, source.label)
    }


def _wider_scale(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of scales that inputs are divided by."""
    return one.maximum(other)


def _wider_global_scale(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of scales that inputs are multiplied by."""
    return one.minimum(other)


_WIDER = {"input_scale": _wider_scale, "input_global_scale": _wider_global_scale}


def _roundings(weights: StoredWeights, places: dict[str, tuple[Place, ...]]) -> dict[_Owner, Rounding] | None:
    """What each layer does to its inputs; None where that is not known of all."""
    stored = {module: weights.scheme(module).input_activations for module in weights.modules}
    rounding = {module for module, args in stored.items() if args is not None}
    told: dict[_Owner, tuple[QuantizationArgs, dict[str, torch.Tensor]]] = {}
    reached: dict[_Owner, set[bool]] = {}
    for path, members in places.items():
        for place in members:
            owner, module = (path, place.owner, place.phase), place.part.module
            reached.setdefault(owner, set()).add(module in rounding)
            args = stored.get(module)
            if args is None:
                continue
            rounding.remove(module)
            scales = {name: x for name, x in weights.local(module).items() if name.startswith("input_")}
            first, widest = told.setdefault(owner, (args, scales))
            # Zero points, which some other tool may store, cannot be shared.
            if first != args or not widest.keys() == scales.keys() <= _WIDER.keys():
                return None
            for name, x in scales.items():
                widest[name] = _WIDER[name](widest[name], x)
    if rounding or any(len(answers) > 1 for answers in reached.values()):
        return None
    return {owner: _rounding(args, scales) for owner, (args, scales) in told.items()}


def _rounding(args: QuantizationArgs, scales: dict[str, torch.Tensor]) -> Rounding:
    from compressor.schemes.inputs import round_rows

    @cache
    def there(device: torch.device) -> dict[str, torch.Tensor]:
        return {name: x.to(device) for name, x in scales.items()}

    return lambda x: round_rows(x.reshape(-1, x.shape[-1]), args, there(x.device)).view(x.shape)
