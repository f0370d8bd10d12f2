"""The result's model while it is polished: blocks compute with weights made of codes and movable scales.

Every block is computed again on the way back (``torch.utils.checkpoint``), so that the weights of one block
at a time exist. Everything that is not moved is shared with the source's model.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.model.routed import Rounding, round_inputs
from compressor.model.stubs import Stub
from compressor.model.whole import WholeModel
from compressor.stages.base import Claim
from compressor.stages.polish_scales import Knob, Knobs
from compressor.stages.polish_weights import Assembled, Free, Stack, stacked
from compressor.stages.training import RoundedOnce, input_scales, rounding
from compressor.stages.walked import WalkedTensors

if TYPE_CHECKING:
    from compressor.model.blocks import Place
    from compressor.schemes.base import Scheme

# Gives a parameter's value as it is now, with a gradient.
_Made = Callable[[], torch.Tensor]
# Name -> all such values of a block, and of the model, once the knobs are known.
_Values = Callable[[], dict[str, torch.Tensor]]
_Assembly = Callable[[Knobs], _Values]
# A parameter of the matrices that lie in it.
_Whole = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class PolishedModel:
    """The result with everything that a walk left behind, and knobs on it.

    Matrices that no walk solved (outside of blocks, or where inputs cannot be heard) compute with the
    source's weights.

    Attributes:
        knobs: what may be moved.
        vectors: the names of norms and biases among them.

    Args:
        source: the checkpoint.
        whole: its model.
        claims: of all its tensors.
        walked: what the walk made.
        dtype: of the parameters.
        device: that computes.
    """

    def __init__(
        self,
        source: Source,
        whole: WholeModel,
        claims: Sequence[Claim],
        walked: WalkedTensors,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = whole.twin()
        self._dtype, self._device = dtype, device
        self._by_tensor = {claim.tensor.name: claim for claim in claims}
        self._found: list[Knob] = []
        self.vectors: set[str] = set()
        self._rest: dict[str, _Made] = {}
        constants = self._changed(whole, walked)
        vectors = self._vectors(source, whole, walked)
        made: list[_Assembly] = []
        once: list[list[RoundedOnce]] = []
        for index, path in enumerate(whole.blocks):
            places = [place for place in whole.places[index] if self._is_walked(place, walked)]
            made.append(self._matrices(path, places, walked, constants))
            once.append(self._round(path, places, walked))
        self.knobs = Knobs(self._found, device)
        inside = tuple(f"{path}." for path in whole.blocks)
        for name, value in (constants | vectors).items():
            if not name.startswith(inside):
                self._rest[name] = value
        for path, assembly, rounded in zip(whole.blocks, made, once, strict=True):
            others = _below(path, constants | vectors)
            self._wrap(path, others, assembly(self.knobs), rounded)

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, vocabulary] of the result as it would be stored now."""
        values = {name: value() for name, value in self._rest.items()}
        made: torch.Tensor = functional_call(
            self._model, values, kwargs={"input_ids": ids_BT, "use_cache": False}
        ).logits
        return made

    def _changed(self, whole: WholeModel, walked: WalkedTensors) -> dict[str, _Made]:
        """Parameter -> value, for those with a 16-bit tensor that the walk changed."""
        found: dict[str, _Made] = {}
        for name, parameter in whole.model.named_parameters():
            base = None
            for piece in whole.tensors.pieces.get(name, ()):
                claim = self._by_tensor[piece.tensor]
                changed = walked.changed(piece.tensor) if claim.scheme is None else None
                if changed is not None:
                    base = parameter.detach().clone() if base is None else base
                    piece.of(base).copy_(changed)
            if base is not None:
                found[name] = _constant(base)
        return found

    def _vectors(self, source: Source, whole: WholeModel, walked: WalkedTensors) -> dict[str, _Made]:
        """Parameter -> moved value, for the norms and biases of the decoder that are tensors of their own."""
        offsets = self._offsets(whole)
        decoder = set(whole.model.get_decoder().modules())
        found: dict[str, _Made] = {}
        for path, module in whole.model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}"
                pieces = whole.tensors.pieces.get(name, ())
                norm = leaf == "weight" and "norm" in type(module).__name__.lower()
                if module not in decoder or not (norm or leaf == "bias") or parameter.dim() != 1:
                    continue
                claim = self._by_tensor[pieces[0].tensor] if len(pieces) == 1 else None
                if claim is None or claim.scheme is not None or claim.tensor.shape != tuple(parameter.shape):
                    continue
                changed = walked.changed(claim.tensor.name)
                value = source.read(claim.tensor.name) if changed is None else changed
                stored = value.to(torch_dtype(claim.outputs[0].dtype))
                offset = offsets.get(type(module), 0.0) if norm else 0.0
                knob = Knob(claim.tensor.name, stored, offset, self._device)
                self._found.append(knob)
                self.vectors.add(knob.name)
                found[name] = self._cast(knob)
        return found

    def _cast(self, knob: Knob) -> _Made:
        return lambda: knob.value.to(self._dtype)

    def _offsets(self, whole: WholeModel) -> dict[type[nn.Module], float]:
        """Class of norms -> what it adds to its weight, as the family knows of those before matrices."""
        norms = {claim.role.input_norm for claim in self._by_tensor.values()}
        offsets = {norm.tensor: norm.offset for norm in norms if norm is not None}
        return {
            type(whole.model.get_submodule(name.rpartition(".")[0])): offsets[piece.tensor]
            for name, pieces in whole.tensors.pieces.items()
            for piece in pieces
            if piece.tensor in offsets
        }

    def _is_walked(self, place: Place, walked: WalkedTensors) -> bool:
        return self._by_tensor[place.piece.tensor].scheme is not None and place.part.module in walked

    def _scheme(self, place: Place) -> Scheme:
        scheme = self._by_tensor[place.piece.tensor].scheme
        assert scheme is not None
        return scheme

    def _matrices(
        self, path: str, places: Sequence[Place], walked: WalkedTensors, constants: Mapping[str, _Made]
    ) -> _Assembly:
        """What assembles a block's parameters with matrices that were walked."""
        free: list[tuple[int, Free]] = []
        fixed: dict[int, torch.Tensor] = {}
        inside: dict[str, list[int]] = {}
        for number, place in enumerate(places):
            inside.setdefault(place.parameter, []).append(number)
            matrix = self._matrix(place, walked.local(place.part.module))
            if isinstance(matrix, Free):
                free.append((number, matrix))
            else:
                fixed[number] = matrix
        stacks = stacked(free)
        self._found += [matrix.knob for _, members in stacks for matrix in members]
        block = self._model.get_submodule(path)
        wholes: dict[str, tuple[list[int], _Whole]] = {}
        for name, numbers in inside.items():
            local = name.removeprefix(f"{path}.")
            base = constants[name]() if name in constants else block.get_parameter(local).detach()
            wholes[local] = numbers, _whole(base, [places[number] for number in numbers])

        def assembly(knobs: Knobs) -> _Values:
            made = [(numbers, Stack(members, knobs)) for numbers, members in stacks]
            stacks.clear()  # their codes are in ``made`` now
            return lambda: _assembled(made, fixed, wholes, self._dtype)

        return assembly

    def _matrix(self, place: Place, tensors: dict[str, torch.Tensor]) -> Free | torch.Tensor:
        """The matrix taken apart, or as it is if nothing about it can move."""
        scheme, part = self._scheme(place), place.part
        free = scheme.free_scales(tensors, part.out_features, part.in_features)
        if free is None:
            weight_OI = scheme.decode(tensors, part.out_features, part.in_features)
            return weight_OI.to(self._device, self._dtype)
        knob = Knob(f"{part.module}.{free.local}", free.scale_BC, 0.0, self._device)
        return Free(free, knob, self._device)

    def _round(self, path: str, places: Sequence[Place], walked: WalkedTensors) -> list[RoundedOnce]:
        """Has the layers of a block round their inputs as an engine does, equal inputs once."""
        block = self._model.get_submodule(path)
        alike: dict[object, RoundedOnce] = {}
        found: dict[tuple[str, str], Rounding] = {}
        for place in places:
            scheme, owner = self._scheme(place), (place.owner, place.phase)
            if not scheme.rounds_inputs or owner in found:
                continue
            scales = input_scales(walked.local(place.part.module))
            key = scheme, tuple((name, tuple(scale.tolist())) for name, scale in sorted(scales.items()))
            found[owner] = alike.setdefault(key, RoundedOnce(rounding(scheme, scales)))
        round_inputs(block, found)
        return list(alike.values())

    def _wrap(
        self, path: str, others: Mapping[str, _Made], matrices: _Values, rounded: Sequence[RoundedOnce]
    ) -> None:
        """Puts a stub in the place of a block, which computes with values made anew, and keeps its inputs.

        Args:
            path: of the block.
            others: parameter -> its value, for norms and biases.
            matrices: gives those of matrices.
            rounded: rounds inputs of several matrices.
        """
        block = self._model.get_submodule(path)

        def compute(*args: Any, **kwargs: Any) -> Any:
            values = {name: value() for name, value in others.items()} | matrices()
            try:
                return functional_call(block, values, args, kwargs)
            finally:
                for rounding_once in rounded:
                    rounding_once.forget()

        def called(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute(*args, **kwargs)
            return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        parent, _, leaf = path.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, Stub(block, called))


def _constant(value: torch.Tensor) -> _Made:
    return lambda: value


def _below(path: str, values: Mapping[str, _Made]) -> dict[str, _Made]:
    """Those of parameters in the module at ``path``, by their names there."""
    prefix = f"{path}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _whole(base: torch.Tensor, places: Sequence[Place]) -> _Whole:
    """What makes the parameter of its matrices at ``places``; ``base`` is the rest."""
    view = places[0].view(base)
    if view.shape == base.shape and view.stride() == base.stride():
        return lambda weights_OI: weights_OI[0]
    views = [place.view for place in places]

    def whole(weights_OI: Sequence[torch.Tensor]) -> torch.Tensor:
        made: torch.Tensor = Assembled.apply(base, views, *weights_OI)  # type: ignore[no-untyped-call]
        return made

    return whole


def _assembled(
    stacks: Sequence[tuple[Sequence[int], Stack]],
    fixed: Mapping[int, torch.Tensor],
    wholes: Mapping[str, tuple[Sequence[int], _Whole]],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Parameter -> its value, from numbered matrices in stacks and fixed ones."""
    weights = dict(fixed)
    for numbers, stack in stacks:
        weights.update(zip(numbers, stack.weights(dtype), strict=True))
    return {name: whole([weights[n] for n in numbers]) for name, (numbers, whole) in wholes.items()}
