"""One block of the decoder with real weights: its matrices, and the places in it where inputs are heard.

Legend: N tokens that reach a matrix, O out_features, I in_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.families import family_for
from compressor.model.listen import Ear, Layout
from compressor.model.names import part_view
from compressor.model.outside import as_parameter
from compressor.model.routed import UP, Rounding, phase_of
from compressor.model.tensor_map import Piece, TensorMap
from compressor.spec import LinearPart, TensorHeader


@dataclass(frozen=True)
class Site:
    """Matrices that read the same input.

    Attributes:
        name: path of the module that is heard (an expert's with its number and matrix).
        parts: the matrices, as the family's ``Role.parts`` has them.
        tensors: the source tensor of each part.
        in_features: width of the input.
        routed: an expert's: hears only the tokens that are routed to it.
    """

    name: str
    parts: tuple[LinearPart, ...]
    tensors: tuple[str, ...]
    in_features: int
    routed: bool

    @property
    def expert(self) -> str:
        """The expert that a routed site is a product of: ``model.layers.0.mlp.experts.3``."""
        return self.name.rpartition(".")[0]

    @property
    def is_entrance(self) -> bool:
        """Whether it hears what an expert is given, not what the expert makes of that."""
        return self.routed and self.name.endswith(f".{UP}")


@dataclass(frozen=True)
class Place:
    """Where a matrix of a source tensor lies in a module.

    Attributes:
        parameter: full name of the parameter.
        piece: the source tensor inside it.
        part: the matrix inside the source tensor.
        owner: path of the module that multiplies by it, relative to the block.
        phase: which of the module's products it is: "" of a linear layer, "up" or "down" of experts.
        expert: index of the expert in the parameter; None for a linear layer.
    """

    parameter: str
    piece: Piece
    part: LinearPart
    owner: str
    phase: str
    expert: int | None

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix ``[O, I]`` as a view of the parameter."""
        return part_view(self.piece.of(parameter), self.part)


class Block:
    """A block with real weights.

    Attributes:
        path: ``model.layers.3``.
        index: its number.
        module: computes; in evaluation mode, with parameters as the ordinary loader makes them.
        steps: sites in the order of the forward pass; those of one step do not depend on one another.
        layout: where the steps' ears are.
        rounding: module of experts, relative to the block, and phase -> what rounds its inputs.

    Args:
        stored: module of experts whose matrices stay in the source -> what reads one of them.
    """

    def __init__(
        self,
        path: str,
        index: int,
        module: nn.Module,
        layout: Layout,
        steps: tuple[tuple[Site, ...], ...],
        places: Mapping[str, Place],
        stored: Mapping[str, Callable[[Place], torch.Tensor]] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.index = index
        self.module = module
        self.layout = layout
        self.steps = steps
        self._places = places
        self._stored = stored
        self.rounding: dict[tuple[str, str], Rounding] = {}
        self._rounded: set[str] = set()
        self._shared: set[str] = set()

    def twin(self) -> Block:
        """The block once more; both hold the same parameters, until ``put`` gives the twin one of its own."""
        assert not self._stored, "a matrix that is stored cannot be replaced"
        kept = [*self.module.parameters(), *self.module.buffers()]
        kept += [config for inner in self.module.modules() if (config := getattr(inner, "config", None))]
        module = copy.deepcopy(self.module, {id(shared): shared for shared in kept})
        twin = Block(self.path, self.index, module, self.layout, self.steps, self._places)
        twin._shared = {name for name, _ in module.named_parameters()}
        return twin

    def weight(self, part: LinearPart) -> torch.Tensor:
        """The matrix ``[O, I]`` of a part as it is now: a view in the block's dtype, changed by ``put``; of
        an expert that is stored, read anew.
        """
        place = self._places[part.module]
        if place.owner in self._stored:
            return self._stored[place.owner](place)
        return self.matrix_in(part, self.parameter_of(part).detach())

    def parameter_of(self, part: LinearPart) -> nn.Parameter:
        """The parameter that the matrix of a part lies in, perhaps with others."""
        place = self._places[part.module]
        return self.module.get_parameter(place.parameter.removeprefix(f"{self.path}."))

    def matrix_in(self, part: LinearPart, like_parameter: torch.Tensor) -> torch.Tensor:
        """The matrix ``[O, I]`` of a part as a view of a tensor laid out as its parameter."""
        return self._places[part.module].view(like_parameter)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its matrices lie."""
        return tuple(self._places.values())

    def parameter(self, name: str, *, own: bool = False) -> torch.Tensor:
        """A parameter by its name relative to the block, to be changed in place.

        ``own``: not that of the twin, if the two have it in common.
        """
        if own:
            self._own(name)
        return self.module.get_parameter(name).detach()

    def put(self, part: LinearPart, weight_OI: torch.Tensor) -> None:
        """Replaces the matrix of a part by values of any dtype and device."""
        self._own(self._places[part.module].parameter.removeprefix(f"{self.path}."))
        matrix_OI = self.weight(part)
        assert matrix_OI.shape == weight_OI.shape, (
            f"{part.module}: {tuple(weight_OI.shape)} is not {tuple(matrix_OI.shape)}"
        )
        matrix_OI.copy_(weight_OI)

    def drop(self, kept: Sequence[LinearPart]) -> None:
        """Lets go of all parameters but those of some matrices; the block computes no more.

        The twin keeps what it has in common with the block.
        """
        names = {self._places[part.module].parameter.removeprefix(f"{self.path}.") for part in kept}
        for path, inner in self.module.named_modules():
            for leaf, parameter in inner._parameters.items():
                if parameter is not None and ".".join(filter(None, (path, leaf))) not in names:
                    inner._parameters[leaf] = as_parameter(parameter.detach().to("meta"))

    def round_inputs(self, part: LinearPart, rounding: Rounding) -> None:
        """From now on the module of a part multiplies rounded inputs, those of all its matrices.

        ``rounding`` takes and gives rows of any number of leading dimensions; the first one given stays.
        """
        place = self._places[part.module]
        if place.phase:
            self.rounding.setdefault((place.owner, place.phase), rounding)
        elif place.owner not in self._rounded:
            self._rounded.add(place.owner)
            module = self.module.get_submodule(place.owner)
            module.register_forward_pre_hook(lambda _, args: (rounding(args[0]), *args[1:]))

    def _own(self, name: str) -> None:
        """Gives the block a copy of a parameter that it still has in common with its twin."""
        if name in self._shared:
            self._shared.remove(name)
            path, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(path)
            owner._parameters[leaf] = as_parameter(self.module.get_parameter(name).detach().clone())


def find_places(
    block: nn.Module,
    path: str,
    tensors: TensorMap,
    headers: Mapping[str, TensorHeader],
    config: dict[str, object],
) -> tuple[list[Place], dict[str, str]]:
    """The matrices of a meta block, and (source tensor -> reason) for those whose input cannot be heard.

    Raises:
        CheckpointError: the family refuses a tensor's shape.
    """
    family = family_for(config)
    places: list[Place] = []
    unheard: dict[str, str] = {}
    for name, parameter in block.named_parameters():
        full = f"{path}.{name}"
        owner, _, leaf = name.rpartition(".")
        pieces = {piece.tensor: piece for piece in tensors.pieces.get(full, ())}
        for tensor in tensors.sources([full]):
            role = family.role(headers[tensor], config)
            if role.kind != "linear":
                continue
            piece = pieces.get(tensor)
            phase = phase_of(block.get_submodule(owner), leaf)
            if piece is None:
                unheard[tensor] = "transformers rebuilds it while loading"
            elif phase is None:
                kind = type(block.get_submodule(owner)).__name__
                unheard[tensor] = f"{kind} is not a layer whose input can be heard"
            else:
                for part in role.parts:
                    place = Place(full, piece, part, owner, phase, None)
                    places.append(_with_expert(place, parameter) if phase else place)
    return places, unheard


def _with_expert(place: Place, parameter: torch.Tensor) -> Place:
    """The place with the expert's index in the parameter, told from where the view begins."""
    expert = place.view(parameter).storage_offset() // parameter.stride(0)
    return Place(place.parameter, place.piece, place.part, place.owner, place.phase, expert)


def sites_of(path: str, layout: Layout, places: Sequence[Place]) -> tuple[tuple[Site, ...], ...]:
    """The sites of each step of a layout, with the matrices of one block."""
    steps = []
    for step in layout.steps:
        sites: list[Site] = []
        for ear in step:
            sites += _ear_sites(path, ear, places)
        steps.append(tuple(sites))
    return tuple(steps)


def _ear_sites(path: str, ear: Ear, places: Sequence[Place]) -> list[Site]:
    found = [
        place for owner in ear.owners for place in places if (place.owner, place.phase) == (owner, ear.phase)
    ]
    if not ear.phase:
        return [_site(f"{path}.{ear.owners[0]}", found, routed=False)]
    experts = sorted({place.expert for place in found if place.expert is not None})
    return [
        _site(
            site_name(path, ear, expert),
            [place for place in found if place.expert == expert],
            routed=True,
        )
        for expert in experts
    ]


def site_name(path: str, ear: Ear, expert: int) -> str:
    """The name of an expert's site: ``model.layers.0.mlp.experts.3.up``."""
    return f"{path}.{ear.owners[0]}.{expert}.{ear.phase}"


def _site(name: str, places: Sequence[Place], *, routed: bool) -> Site:
    widths = {place.part.in_features for place in places}
    if len(widths) != 1:
        raise CheckpointError(f"matrices of several widths {sorted(widths)} read one input", where=name)
    return Site(
        name,
        tuple(place.part for place in places),
        tuple(place.piece.tensor for place in places),
        widths.pop(),
        routed,
    )
