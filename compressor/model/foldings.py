"""What feeds what in a block: where per-channel scales can move from an input's readers to what makes it.

Nothing is told from names. One small pass shows which modules read the very tensor that a norm gives; every
fold that looks possible is then tried: with scales folded in, the block must compute what it did before. What
only larger values meet, such as a clamp, takes real tokens to see (``stages/smooth_check.py``).

Legend: I channels of an input, K free scales among them, O out_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from compressor.model.blocks import Block, Place
from compressor.model.names import part_view
from compressor.model.routed import DOWN, UP
from compressor.model.tape import Tape

# How far the block's output may be from the one before, over what the block adds to its input. Powers of two
# pass through products, sums and roundings exactly; only a norm that adds 1 to its weight rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
OFFSET_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_SEED = 20
_OFFSETS = (0.0, 1.0)
_OFFSET_TOLERANCE = 1e-3
# Exponents of the scales tried. A norm that adds 1 to its weight cannot give much less in 16 bit: its weight
# would be near -1, and round to so many parts of 1.
_EXPONENTS = (-5, 5)
_LARGEST_OFFSET_EXPONENT = 1


@dataclass(frozen=True)
class Spot:
    """Channels that a fold scales, in a parameter and in the source tensor that fills it.

    Attributes:
        parameter: relative to the block.
        tensor: the source tensor.
        dim: of the matrix (or vector) along which the channels lie: 1 for inputs, 0 for outputs.
        start: the first.
        count: how many.
        place: the matrix inside both; None where the parameter is the tensor.
    """

    parameter: str
    tensor: str
    dim: int
    start: int
    count: int
    place: Place | None = None

    def of_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """The channels as a view of the parameter."""
        found = parameter if self.place is None else self.place.view(parameter)
        return found.narrow(self.dim, self.start, self.count)

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The channels as a view of the source tensor."""
        found = tensor if self.place is None else part_view(tensor, self.place.part)
        return found.narrow(self.dim, self.start, self.count)

    def along(self, scale_K: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """The scales in a shape that multiplies ``view``."""
        return scale_K if self.dim == 1 or view.dim() == 1 else scale_K[:, None]


@dataclass(frozen=True)
class Fold:
    """Scales may go from the columns of all readers of an input to what makes the input.

    Attributes:
        name: the source tensor of what makes it: a norm's weight or a matrix.
        ear: the module whose output the input is (of a norm), or whose input it is, relative to the block.
        norm: the norm's weight; None where a matrix makes the input.
        offset: what the norm adds to its weight.
        divided: divided by the scales: the matrix's rows, biases.
        multiplied: multiplied by them: columns of the readers.
        heads: of the input that share their scales in runs: (channels of one head, heads in a run).
    """

    name: str
    ear: str
    norm: Spot | None
    offset: float
    divided: tuple[Spot, ...]
    multiplied: tuple[Spot, ...]
    heads: tuple[int, int] = (1, 1)

    @property
    def channels(self) -> int:
        """I, of the input."""
        return self.multiplied[0].count

    @property
    def scales(self) -> int:
        """K, how many scales there are."""
        return self.channels // self.heads[1]

    @property
    def spots(self) -> tuple[Spot, ...]:
        """Everything that is changed."""
        norm = () if self.norm is None else (self.norm,)
        return (*norm, *self.divided, *self.multiplied)

    def expand(self, scale_K: torch.Tensor) -> torch.Tensor:
        """The scale of every channel ``[I]``: query heads repeat those of their value head."""
        size, run = self.heads
        return scale_K.view(-1, size).repeat_interleave(run, dim=0).flatten()

    def gather(self, x_I: torch.Tensor) -> torch.Tensor:
        """The mean ``[K]`` of what is known of each channel over those that share a scale."""
        size, run = self.heads
        return x_I.view(-1, run, size).mean(dim=1).flatten()


def tolerance(folds: Sequence[Fold], dtype: torch.dtype) -> float:
    """How far the output of a block of some dtype may be from before, over what it adds to its input."""
    return (OFFSET_TOLERANCE if any(fold.offset for fold in folds) else TOLERANCE)[dtype]


def apply(block: Block, fold: Fold, scale_K: torch.Tensor) -> None:
    """Folds scales into the block's parameters in place; only the results are rounded to its dtype.

    With ``Fold.norm``, the norm gives its outputs divided by the scales.
    """
    scale_I = fold.expand(scale_K)
    for spot in fold.multiplied:
        view = spot.of_parameter(block.parameter(spot.parameter))
        view.copy_(view.float() * spot.along(scale_I.to(view.device), view))
    for spot in fold.divided:
        view = spot.of_parameter(block.parameter(spot.parameter))
        view.copy_(view.float() / spot.along(scale_K.to(view.device), view))
    if fold.norm is not None:
        weight_K = block.parameter(fold.norm.parameter)
        weight_K.copy_((weight_K.double() + fold.offset) / scale_K.to(weight_K.device) - fold.offset)


def find_folds(tape: Tape, block: Block) -> list[Fold]:
    """The folds of a block that hold, tried on a few random rows; the block is as before afterwards.

    Deterministic. Costs a few passes of a few tokens.
    """
    finder = _Finder(tape, block)
    folds = [fold for name in finder.norms() if (fold := finder.first(finder.of_norm(name))) is not None]
    known = {spot.parameter for fold in folds for spot in fold.multiplied}
    for step in block.layout.steps:
        ear = step[0]
        if ear.phase or len(step) > 1 or len(ear.owners) > 1:
            continue
        found = finder.first(finder.of_matrices(ear.owners[0], known))
        if found is not None:
            folds.append(found)
    return folds


_Rows = tuple[int, ...]


class _Finder:
    """Looks at one pass of the block, and tries folds."""

    def __init__(self, tape: Tape, block: Block) -> None:
        self._tape, self._block = tape, block
        self._modules = dict(block.module.named_modules())
        self._read: dict[str, set[_Rows]] = defaultdict(set)
        self._made: dict[str, list[_Rows]] = defaultdict(list)
        self._arguments: dict[str, int] = {}
        self._by_owner: dict[tuple[str, str], list[Place]] = defaultdict(list)
        for place in block.places:
            self._by_owner[place.owner, place.phase].append(place)
        self._generator = torch.Generator().manual_seed(_SEED)
        like = tape.small_hidden
        self._hidden = torch.randn(like.shape, generator=self._generator).to(like)
        self._output = self._observe()

    def norms(self) -> list[str]:
        """Modules that scale each channel of their only input by a weight."""
        return [
            name
            for name, module in self._modules.items()
            if self._arguments.get(name) == 1
            and len(self._made[name]) == 1
            and {"weight"} <= module._parameters.keys() <= {"weight", "bias"}
            and all(p is None or p.dim() == 1 for p in module._parameters.values())
        ]

    def of_norm(self, name: str) -> Iterator[Fold]:
        """The fold of a norm with those that read its output; then with experts that read a part of it."""
        module = self._modules[name]
        weight = self._vector(f"{name}.weight")
        offset = _offset(module, self._block.parameter(f"{name}.weight"))
        if weight is None or offset is None:
            return
        [made] = self._made[name]
        owners = [owner for owner, read in self._read.items() if made in read and owner != name]
        readers = [self._columns(owner, weight.count) for owner in owners]
        spots = [spot for found in readers if found is not None for spot in found]
        if None in readers or not any(spot.place is not None for spot in spots):
            return
        bias = self._vector(f"{name}.bias") if module._parameters.get("bias") is not None else None
        if (bias is None) != (module._parameters.get("bias") is None):
            return
        divided = () if bias is None else (bias,)
        fold = Fold(weight.tensor, name, weight, offset, divided, tuple(spots))
        yield fold
        known = {spot.parameter for spot in spots}
        further = [
            _column(place)
            for (_, phase), places in self._by_owner.items()
            if phase == UP
            for place in places
            if place.part.in_features == weight.count and place.parameter not in known
        ]
        if further:
            yield replace(fold, multiplied=(*fold.multiplied, *further))

    def of_matrices(self, reader: str, known: set[str]) -> Iterator[Fold]:
        """Folds of a linear layer's input into the rows of another layer."""
        places = self._by_owner[reader, ""]
        columns = tuple(_column(place) for place in places)
        if not columns or any(spot.parameter in known for spot in columns):
            return
        wanted = places[0].part.in_features
        parent = self._modules[reader.rpartition(".")[0]]
        size = getattr(parent, "head_dim", None)
        for (owner, phase), made in self._by_owner.items():
            if phase or owner == reader or len(made) != 1:
                continue
            for start, count, run in _row_ranges(made[0].part.out_features, wanted, size):
                rows = replace(_column(made[0]), dim=0, start=start, count=count)
                divided = self._with_bias(owner, rows)
                if divided is not None:
                    heads = (size, run) if run > 1 and isinstance(size, int) else (1, 1)
                    yield Fold(rows.tensor, reader, None, 0.0, divided, columns, heads)

    def first(self, folds: Iterator[Fold]) -> Fold | None:
        """The first that holds."""
        return next((fold for fold in folds if self._holds(fold)), None)

    def _holds(self, fold: Fold) -> bool:
        """Whether the block computes the same with random scales (powers of two) folded in."""
        least, most = _EXPONENTS
        most = _LARGEST_OFFSET_EXPONENT if fold.offset else most
        exponent_K = torch.randint(least, most + 1, (fold.scales,), generator=self._generator)
        scale_K = torch.exp2(exponent_K.double()).to(self._hidden.device)
        with kept(self._block, {spot.parameter for spot in fold.spots}):
            apply(self._block, fold, scale_K)
            output = self._tape.rehearse(self._block, self._hidden)
        added = (self._output - self._hidden).double().norm()
        miss = float((output - self._output).double().norm() / added)
        return miss <= tolerance([fold], self._hidden.dtype)  # NaN compares false

    def _observe(self) -> torch.Tensor:
        """One pass; notes which module reads and makes which tensor."""
        alive: list[Any] = []  # else an address could be given to another tensor
        handles = []

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            alive.extend(given)
            self._read[name] |= {_rows(x) for x in given}
            self._arguments[name] = max(len(given), self._arguments.get(name, 0))

        def after(name: str, made: Any) -> None:
            if isinstance(made, torch.Tensor):
                alive.append(made)
                self._made[name].append(_rows(made))

        for name, module in self._modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _m, _a, made, name=name: after(name, made)))
        try:
            return self._tape.rehearse(self._block, self._hidden)
        finally:
            for handle in handles:
                handle.remove()

    def _columns(self, owner: str, width: int) -> list[Spot] | None:
        """The columns of a reader's own matrices; None where a matrix is not a tensor of the source."""
        found = [_column(place) for place in (*self._by_owner[owner, ""], *self._by_owner[owner, UP])]
        known = {spot.parameter for spot in found}
        known |= {place.parameter.removeprefix(self._prefix) for place in self._by_owner[owner, DOWN]}
        for leaf, parameter in self._modules[owner]._parameters.items():
            name = f"{owner}.{leaf}"
            if name in known or parameter is None or parameter.dim() < 2 or parameter.shape[-1] != width:
                continue
            tensor = self._tape.tensor_of(f"{self._prefix}{name}")
            if tensor is None or parameter.dim() != 2:
                return None
            found.append(Spot(name, tensor, 1, 0, width))
        return found if all(spot.count == width for spot in found) else None

    def _vector(self, name: str) -> Spot | None:
        """All channels of a vector that is a tensor of the source."""
        tensor = self._tape.tensor_of(f"{self._prefix}{name}")
        return None if tensor is None else Spot(name, tensor, 0, 0, len(self._block.parameter(name)))

    def _with_bias(self, owner: str, rows: Spot) -> tuple[Spot, ...] | None:
        """The rows, and what is added to them; None where that is not a tensor of the source."""
        if self._modules[owner]._parameters.get("bias") is None:
            return (rows,)
        bias = self._vector(f"{owner}.bias")
        return None if bias is None else (rows, replace(bias, start=rows.start, count=rows.count))

    @property
    def _prefix(self) -> str:
        return f"{self._block.path}."


def _column(place: Place) -> Spot:
    parameter = f"{place.owner}.{place.parameter.rpartition('.')[2]}"
    return Spot(parameter, place.piece.tensor, 1, 0, place.part.in_features, place)


def _rows(x: torch.Tensor) -> _Rows:
    return x.data_ptr(), x.numel(), x._version, x.shape[-1] if x.dim() else 1


def _row_ranges(rows: int, wanted: int, head_dim: Any) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, heads that share a scale) of outputs that may be an input ``wanted`` wide."""
    if rows == wanted:
        yield 0, rows, 1
    if rows == 2 * wanted:  # gate and up in one matrix
        yield wanted, wanted, 1
        yield 0, wanted, 1
    if not isinstance(head_dim, int) or head_dim < 1 or wanted % head_dim:
        return
    if rows < wanted and wanted % rows == 0 and rows % head_dim == 0:
        yield 0, rows, wanted // rows
    values, rest = divmod(rows - wanted, 2)  # q, k and v in one matrix
    if values > 0 and not rest and values % head_dim == 0 and wanted % values == 0:
        yield rows - values, values, wanted // values


def _offset(module: nn.Module, weight_K: torch.Tensor) -> float | None:
    """What a norm adds to its weight; None where its output is not a multiple of the sum."""
    like = torch.arange(3 * len(weight_K), dtype=torch.float32, device=weight_K.device)
    x_NK = (like.sin() + 0.1).view(3, -1)
    zero = {} if module._parameters.get("bias") is None else {"bias": torch.zeros_like(weight_K).float()}
    made = [
        functional_call(module, {"weight": torch.full_like(weight_K, value).float(), **zero}, (x_NK,))
        for value in (0.0, 1.0, 3.0)
    ]
    if any(not isinstance(y, torch.Tensor) or y.shape != x_NK.shape for y in made):
        return None
    unit = made[1] - made[0]
    size = unit.abs().max() * _OFFSET_TOLERANCE
    if not bool((made[2] - made[1] - 2 * unit).abs().max() <= size):
        return None
    fitting = [offset for offset in _OFFSETS if bool((made[0] - offset * unit).abs().max() <= size)]
    return fitting[0] if fitting and float(size) > 0 else None


@contextmanager
def kept(block: Block, names: Iterable[str]) -> Iterator[None]:
    """Within it parameters may be changed in place; afterwards they are as before."""
    before = {name: block.parameter(name).clone() for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            block.parameter(name).copy_(value)
