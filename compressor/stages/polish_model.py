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
from compressor.model.routed import Rounding, heard_forward
from compressor.model.stubs import Stub
from compressor.model.whole import WholeModel
from compressor.stages.base import Claim
from compressor.stages.polish_scales import Assembled, Knob, Knobs, Matrix, straight
from compressor.stages.walked import WalkedTensors

if TYPE_CHECKING:
    from compressor.model.blocks import Place
    from compressor.schemes.base import Scheme

# Gives a parameter's value as it is now, with a gradient.
_Made = Callable[[], torch.Tensor]


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
        made: list[dict[str, _Made]] = []
        for index, path in enumerate(whole.blocks):
            matrices = self._matrices(path, whole.places[index], walked, constants)
            made.append({})
            for name, value in (constants | vectors | matrices).items():
                if name.startswith(f"{path}."):
                    made[-1][name.removeprefix(f"{path}.")] = value
        inside = tuple(f"{path}." for path in whole.blocks)
        for name, value in (constants | vectors).items():
            if not name.startswith(inside):
                self._rest[name] = value
        for path, values in zip(whole.blocks, made, strict=True):
            self._wrap(path, values)
        self.knobs = Knobs(self._found, device)

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
        return lambda: knob.value().to(self._dtype)

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

    def _matrices(
        self, path: str, places: Sequence[Place], walked: WalkedTensors, constants: Mapping[str, _Made]
    ) -> dict[str, _Made]:
        """Parameter -> its value, for those of a block with matrices that were walked."""
        inside: dict[str, list[tuple[Place, _Made]]] = {}
        rounding: dict[tuple[str, str], Rounding] = {}
        for place in places:
            scheme = self._by_tensor[place.piece.tensor].scheme
            if scheme is None or place.part.module not in walked:
                continue
            tensors = walked.local(place.part.module)
            inside.setdefault(place.parameter, []).append((place, self._matrix(scheme, place, tensors)))
            if scheme.rounds_inputs:
                rounding.setdefault((place.owner, place.phase), _rounding(scheme, tensors))
        block = self._model.get_submodule(path)
        self._round(block, rounding)
        found: dict[str, _Made] = {}
        for name, members in inside.items():
            parameter = block.get_parameter(name.removeprefix(f"{path}."))
            base = constants[name]() if name in constants else parameter.detach()
            found[name] = _whole(base, members)
        return found

    def _matrix(self, scheme: Scheme, place: Place, tensors: dict[str, torch.Tensor]) -> _Made:
        part = place.part
        free = scheme.free_scales(tensors, part.out_features, part.in_features)
        if free is None:
            weight_OI = scheme.decode(tensors, part.out_features, part.in_features)
            return _constant(weight_OI.to(self._device, self._dtype))
        knob = Knob(f"{part.module}.{free.local}", free.scale_BC, 0.0, self._device)
        self._found.append(knob)
        matrix = Matrix(free, knob, self._device)
        return lambda: matrix.weight(self._dtype)

    def _round(self, block: nn.Module, rounding: Mapping[tuple[str, str], Rounding]) -> None:
        """Has the layers of a block round their inputs as an engine does."""
        experts: dict[str, dict[str, Rounding]] = {}
        for (owner, phase), rounded in rounding.items():
            if phase:
                experts.setdefault(owner, {})[phase] = rounded
            else:
                block.get_submodule(owner).register_forward_pre_hook(_hook(rounded))
        for owner, phases in experts.items():
            module = block.get_submodule(owner)
            module.forward = heard_forward(module, lambda _phase, _rows: None, phases)

    def _wrap(self, path: str, values: Mapping[str, _Made]) -> None:
        """Puts a stub in the place of a block, which computes with ``values`` and keeps its inputs only."""
        block = self._model.get_submodule(path)

        def compute(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, {name: value() for name, value in values.items()}, args, kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute(*args, **kwargs)
            return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        parent, _, leaf = path.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, Stub(block, called))


def _constant(value: torch.Tensor) -> _Made:
    return lambda: value


def _whole(base: torch.Tensor, members: Sequence[tuple[Place, _Made]]) -> _Made:
    """The parameter of which ``members`` are parts and ``base`` the rest."""
    place, alone = members[0]
    view = place.view(base)
    if view.shape == base.shape and view.stride() == base.stride():
        return alone
    views = [place.view for place, _ in members]

    def made() -> torch.Tensor:
        weights_OI = (weight() for _, weight in members)
        assembled: torch.Tensor = Assembled.apply(base, views, *weights_OI)  # type: ignore[no-untyped-call]
        return assembled

    return made


def _rounding(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Rounding:
    """What an engine makes of rows of inputs; the gradient passes as if they were not rounded."""
    inputs = {name: tensor for name, tensor in tensors.items() if name.startswith("input_")}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = scheme.round_inputs(x.detach().reshape(-1, x.shape[-1]), inputs).view(x.shape)
        return straight(made, x)

    return rounded


def _hook(rounding: Rounding) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    return lambda _, args: (rounding(args[0]), *args[1:])
