"""Which source tensors fill which parameter, and where inside it: the mapping of transformers' own loader.

transformers 5.17 renames checkpoint tensors and rebuilds some (``conversion_mapping.py``; matched as in
``core_model_loading.py`` convert_and_load_state_dict_in_model): experts stored one by one become one 3-D
parameter. Where a parameter is only put together from tensors, each tensor is a view of it (``Piece``), so
that it can be loaded, read and overwritten in place; other conversions run as the library runs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.errors import CheckpointError
from compressor.model.skeleton import library_faults
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    from compressor.checkpoint.base import Source


@dataclass(frozen=True)
class Piece:
    """One source tensor inside a parameter.

    Attributes:
        tensor: the source tensor's name.
        expert: index along the parameter's first dimension, which the tensor lacks; None where it has all.
        dim: along which pieces follow one another (in the parameter, or in the entry ``expert`` of it).
        start: where this one begins.
        size: its length along ``dim``; None for all.
    """

    tensor: str
    expert: int | None = None
    dim: int = 0
    start: int = 0
    size: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of the parameter that has the source tensor's shape."""
        found = parameter if self.expert is None else parameter[self.expert]
        return found if self.size is None else found.narrow(self.dim, self.start, self.size)


@dataclass(frozen=True)
class _Conversion:
    """The tensors that fill a parameter.

    Attributes:
        first: the parameter (the first of several, where the tensors are split).
        converter: what rebuilds them; None for one tensor as it is.
        collected: (tensor, the converter's pattern for it), in order.
    """

    first: str
    converter: WeightConverter | None
    collected: tuple[tuple[str, str], ...]


@dataclass
class TensorMap:
    """How the parameters and stored buffers of a model are filled from a checkpoint.

    Attributes:
        pieces: parameter -> the source tensors that it consists of.
        converted: parameter -> the conversion that makes it, where it is not just put together.
    """

    model: PreTrainedModel
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    converted: dict[str, _Conversion] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, headers: Mapping[str, TensorHeader], where: str) -> TensorMap:
        """Maps every parameter and stored buffer that the checkpoint has tensors for; reads headers only.

        Raises:
            CheckpointError: a tensor has another shape than the model, or a conversion fails on the shapes.
        """
        made = cls(model)
        for conversion in _matched(model, headers, where):
            pieces = _pieces(conversion, headers)
            if pieces is None or not _fit(model, conversion.first, pieces, headers):
                made._convert_on_meta(conversion, headers, where)
            else:
                made.pieces[conversion.first] = pieces
        made._follow_ties()
        return made

    @property
    def filled(self) -> set[str]:
        """The parameters and buffers that the checkpoint has tensors for."""
        return {*self.pieces, *self.converted}

    def sources(self, names: Iterable[str]) -> tuple[str, ...]:
        """The source tensors that the parameters ``names`` are filled from, sorted."""
        found = set()
        for name in names:
            found |= {piece.tensor for piece in self.pieces.get(name, ())}
            if name in self.converted:
                found |= {tensor for tensor, _ in self.converted[name].collected}
        return tuple(sorted(found))

    def fill(self, source: Source, targets: Mapping[str, torch.Tensor]) -> None:
        """Reads the source tensors of ``targets`` (parameter or buffer name -> real tensor) into them.

        Values are cast to the targets' dtypes. Peak memory is one source tensor more than the targets, or all
        tensors of one parameter where transformers rebuilds it. May run in any thread.
        """
        done: set[str] = set()
        with torch.no_grad():
            for name, target in targets.items():
                for piece in self.pieces.get(name, ()):
                    piece.of(target).copy_(source.read(piece.tensor))
                if name in self.converted and name not in done:
                    made = _convert(
                        self.model,
                        self.converted[name],
                        {tensor: source.read(tensor) for tensor, _ in self.converted[name].collected},
                    )
                    for other in made.keys() & targets.keys():
                        targets[other].copy_(made[other])
                        done.add(other)

    def has_entries(self, name: str) -> bool:
        """Whether each entry along the parameter's first dimension can be read alone."""
        pieces = self.pieces.get(name, ())
        return bool(pieces) and all(piece.expert is not None or piece.size is None for piece in pieces)

    def fill_entry(self, source: Source, name: str, index: int, target: torch.Tensor) -> None:
        """Reads entry ``index`` of the parameter ``name``, which ``has_entries``, into ``target``."""
        with torch.no_grad():
            for piece in self.pieces[name]:
                if piece.expert is None:
                    target.copy_(source.read(piece.tensor, index))
                elif piece.expert == index:
                    replace(piece, expert=None).of(target).copy_(source.read(piece.tensor))

    def _convert_on_meta(
        self, conversion: _Conversion, headers: Mapping[str, TensorHeader], where: str
    ) -> None:
        expected = self.model.state_dict()
        with library_faults(
            where, f"transformers cannot make {conversion.first} of the checkpoint's tensors"
        ):
            made = _convert(
                self.model,
                conversion,
                {name: _meta(headers[name]) for name, _ in conversion.collected},
            )
        for name, tensor in made.items():
            if name not in expected:
                continue
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"the checkpoint gives {name} the shape {list(tensor.shape)}, its config "
                    f"{list(expected[name].shape)}",
                    where=where,
                )
            self.converted[name] = conversion

    def _follow_ties(self) -> None:
        """A parameter without a tensor that is tied to one with a tensor is filled from that one's."""
        for target, tied in self.model.all_tied_weights_keys.items():
            for lacking, having in ((target, tied), (tied, target)):
                if lacking not in self.filled and having in self.pieces:
                    self.pieces[lacking] = self.pieces[having]


def _matched(model: PreTrainedModel, headers: Mapping[str, TensorHeader], where: str) -> list[_Conversion]:
    """What the loader would collect for each parameter, by its matching of names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    with library_faults(where, "the checkpoint's names cannot be matched"):
        transforms = get_model_conversion_mapping(model)
        renamings = [found for found in transforms if isinstance(found, WeightRenaming)]
        converters = [found for found in transforms if isinstance(found, WeightConverter)]
        by_pattern = {pattern: found for found in converters for pattern in found.source_patterns}
        expected = model.state_dict()
        plain: dict[str, str] = {}
        rebuilt: dict[str, list[tuple[str, str]]] = defaultdict(list)
        prefix = model.base_model_prefix
        for name in sorted(headers, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if renamed not in expected and name in expected:
                renamed, pattern = rename_source_key(name, [], [], prefix, expected)
            if renamed not in expected:
                continue
            if pattern is None:
                plain.setdefault(renamed, name)
            else:
                rebuilt[renamed].append((name, pattern))
        return [
            *(_Conversion(target, None, ((name, ""),)) for target, name in plain.items()),
            *(
                _Conversion(target, by_pattern[collected[0][1]], tuple(collected))
                for target, collected in rebuilt.items()
                if target not in plain
            ),
        ]


def _pieces(conversion: _Conversion, headers: Mapping[str, TensorHeader]) -> tuple[Piece, ...] | None:
    """The parameter as views, or None where it is more than tensors stacked and put side by side."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if conversion.converter is None:
        return (Piece(conversion.collected[0][0]),)
    operations = conversion.converter.operations
    kinds = [type(operation) for operation in operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate], [Concatenate]):
        return None
    stacked = kinds[0] is MergeModulelist
    if stacked and operations[0].dim != 0:
        return None
    dim = operations[-1].dim if kinds[-1] is Concatenate else None
    if dim is not None and stacked:
        dim -= 1  # within one expert
        if dim < 0:
            return None
    return _laid_out(conversion.converter.source_patterns, conversion.collected, headers, dim, stacked)


def _laid_out(
    patterns: Sequence[str],
    collected: Sequence[tuple[str, str]],
    headers: Mapping[str, TensorHeader],
    dim: int | None,
    stacked: bool,
) -> tuple[Piece, ...]:
    """The pieces pattern after pattern: side by side along ``dim``, or one expert each where ``stacked``."""
    pieces: list[Piece] = []
    start = 0
    for pattern in patterns:
        size: int | None = None
        for index, name in enumerate(name for name, matched in collected if matched == pattern):
            shape = headers[name].shape
            size = None if dim is None or dim >= len(shape) else shape[dim]
            pieces.append(Piece(name, index if stacked else None, dim or 0, start, size))
            if not stacked:
                start += size or 0
        if stacked:
            start += size or 0
    return tuple(pieces)


def _fit(
    model: PreTrainedModel, name: str, pieces: Sequence[Piece], headers: Mapping[str, TensorHeader]
) -> bool:
    """Whether the pieces have their tensors' shapes and fill the parameter."""
    parameter = model.get_parameter_or_buffer(name).to("meta")
    try:
        views = [tuple(piece.of(parameter).shape) for piece in pieces]
    except (IndexError, RuntimeError):
        return False
    shapes = [headers[piece.tensor].shape for piece in pieces]
    return views == shapes and sum(headers[piece.tensor].numel for piece in pieces) == parameter.numel()


def _meta(header: TensorHeader) -> torch.Tensor:
    return torch.empty(header.shape, dtype=torch_dtype(header.dtype), device="meta")


def _convert(
    model: PreTrainedModel, conversion: _Conversion, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameter -> its value, by the library's own operations."""
    if conversion.converter is None:
        return {conversion.first: tensors[conversion.collected[0][0]]}
    # Converters collect tensors in themselves: each run needs its own.
    converter: Any = deepcopy(conversion.converter)
    for name, pattern in conversion.collected:
        converter.add_tensor(conversion.first, name, pattern, tensors[name])
    made = converter.convert(conversion.first, model=model, config=model.config)
    return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}
