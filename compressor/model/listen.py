"""In which order a block's matrices are used and which share an input; and listening to those inputs.

The order is found once for each kind of block, by a rehearsal: a few tokens through the block with parameters
that are one number each and take no memory. Real runs then hear what the rehearsal has named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.model.routed import DOWN, UP, Listener, Rounding, heard_forward, is_expert_owner
from compressor.model.stubs import Call


@dataclass(frozen=True)
class Ear:
    """A place where an input is heard.

    Attributes:
        owners: modules that read the same input, relative to the block; the first one is heard.
        phase: "" for linear layers, "up" or "down" for experts in one module.
        first: position of its first call in the rehearsal.
        last: position of its last call.
        once: called once only.
    """

    owners: tuple[str, ...]
    phase: str
    first: int
    last: int
    once: bool


@dataclass(frozen=True)
class Layout:
    """The ears of a kind of block, step by step; the ears of one step do not depend on one another.

    Attributes:
        steps: in the order of the forward pass.
        unused: linear layers of interest that are never called.
    """

    steps: tuple[tuple[Ear, ...], ...]
    unused: frozenset[str]

    @property
    def repeated(self) -> frozenset[str]:
        """Modules that one pass calls several times."""
        ears = (ear for step in self.steps for ear in step if not ear.once)
        return frozenset(owner for ear in ears for owner in ear.owners)


# Address, elements, version, width and last stride: equal for two uses of the same rows.
_Input = tuple[int, ...]


@dataclass(frozen=True)
class _Use:
    """One use of a matrix in the rehearsal, and what its input was."""

    owner: str
    phase: str
    input: _Input


def rehearse(
    module: nn.Module, call: Call, hidden: torch.Tensor, linear: Set[str], experts: Set[str]
) -> Layout:
    """The layout of a block, from one pass of ``hidden`` through it.

    Args:
        module: with parameters that can be computed with; their values do not matter.
        call: how the model calls it.
        hidden: [B, T, H].
        linear: the linear layers of interest, relative to the block.
        experts: the modules of experts of interest; no experts are computed.
    """
    uses: list[_Use] = []
    alive: list[torch.Tensor] = []  # else an address could be given to another tensor

    def note(owner: str, phase: str, x: torch.Tensor) -> None:
        alive.append(x)
        uses.append(_Use(owner, phase, (x.data_ptr(), x.numel(), x._version, x.shape[-1], x.stride(-1))))

    handles = [
        module.get_submodule(name).register_forward_pre_hook(_noting(name, note)) for name in sorted(linear)
    ]
    replaced = [(name, inner) for name, inner in module.named_modules() if is_expert_owner(inner)]
    for name, inner in replaced:
        inner.forward = _experts_noting(name, note if name in experts else None)
    try:
        with torch.no_grad():
            call.replay(module, hidden)
    finally:
        for handle in handles:
            handle.remove()
        for _, inner in replaced:
            del inner.forward
    return _layout(uses, linear)


def _noting(
    name: str, note: Callable[[str, str, torch.Tensor], None]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        note(name, "", args[0])

    return hook


def _experts_noting(
    name: str, note: Callable[[str, str, torch.Tensor], None] | None
) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if note is not None:
            note(name, UP, hidden)
            note(name, DOWN, torch.zeros(1))
        return torch.zeros_like(hidden)

    return forward


def _layout(uses: Sequence[_Use], linear: Set[str]) -> Layout:
    """Groups uses of one input into ears, and ears into steps."""
    groups: dict[tuple[_Input, str, str], list[str]] = defaultdict(list)
    first: dict[tuple[str, str], int] = {}
    last: dict[tuple[str, str], int] = {}
    for position, use in enumerate(uses):
        last[use.owner, use.phase] = position
        if (use.owner, use.phase) not in first:
            first[use.owner, use.phase] = position
            # Experts hear their own tokens only, whatever else reads the same tensor.
            groups[use.input, use.owner if use.phase else "", use.phase].append(use.owner)
    times = Counter((use.owner, use.phase) for use in uses)
    ears = []
    for (x, _, phase), owners in groups.items():
        heard = (owners[0], phase)
        ear = Ear(tuple(owners), phase, first[heard], last[heard], times[heard] == 1)
        ears.append((ear, x))
    return Layout(_steps(ears), frozenset(linear - {owner for owner, _ in first}))


def _steps(ears: Sequence[tuple[Ear, _Input]]) -> tuple[tuple[Ear, ...], ...]:
    """Ears that hear the same memory share a step: none of them can depend on another."""
    steps: dict[_Input, list[Ear]] = defaultdict(list)
    for ear, x in ears:
        steps[x].append(ear)
    return tuple(tuple(step) for step in steps.values())


class _Enough(BaseException):
    """Leaves a block's forward when the wanted step was heard."""


# Ear, expert (None for linear layers), rows [N, I], their tokens (None where all).
Heard = Callable[[Ear, int | None, torch.Tensor, torch.Tensor | None], None]


class _Counting:
    """Tells when the wanted step was heard, or cannot be heard any more."""

    def __init__(self, layout: Layout, until: int | None) -> None:
        wanted = layout.steps[until] if until is not None else ()
        self._last = max((ear.last for ear in wanted), default=None)
        self._missing = {ear for step in layout.steps for ear in step} if until is None else set(wanted)
        self._again = not all(ear.once for ear in wanted)

    @property
    def never(self) -> list[str]:
        """The modules that this pass ought to have used and did not."""
        return sorted(ear.owners[0] for ear in self._missing)

    def before(self, ear: Ear) -> None:
        if self._last is not None and ear.first > self._last:
            raise _Enough

    def after(self, ear: Ear) -> None:
        self._missing.discard(ear)
        if self._last is not None and not self._missing and not self._again:
            raise _Enough


def listen(
    module: nn.Module,
    call: Call,
    hidden: torch.Tensor,
    layout: Layout,
    heard: Heard,
    until: int | None,
    rounding: Mapping[tuple[str, str], Rounding],
) -> torch.Tensor | None:
    """The block's output while ``heard`` is told the inputs, or None where it stopped after step ``until``.

    ``rounding``: module of experts and phase -> what is done to inputs after they were heard.

    Raises:
        CheckpointError: a layer that the rehearsal used was not used now.
    """
    counting = _Counting(layout, until)
    with _ears(module, layout, heard, counting, rounding):
        try:
            made = call.replay(module, hidden)
        except _Enough:
            return None
    if counting.never:
        raise CheckpointError(
            "the block passes this layer by, so that its input cannot be heard", where=counting.never[0]
        )
    return None if until is not None else made


@contextmanager
def _ears(
    module: nn.Module,
    layout: Layout,
    heard: Heard,
    counting: _Counting,
    rounding: Mapping[tuple[str, str], Rounding],
) -> Iterator[None]:
    by_owner: dict[str, list[Ear]] = defaultdict(list)
    for step in layout.steps:
        for ear in step:
            by_owner[ear.owners[0]].append(ear)
    handles = []
    replaced = []
    try:
        for name, ears in by_owner.items():
            owner = module.get_submodule(name)
            if ears[0].phase:
                rounded = {phase: made for (of, phase), made in rounding.items() if of == name}
                owner.forward = heard_forward(owner, _expert_ear(ears, heard, counting), rounded)
                replaced.append(owner)
            else:
                handles.append(owner.register_forward_pre_hook(_linear_ear(ears[0], heard, counting)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner in replaced:
            del owner.forward


def _linear_ear(
    ear: Ear, heard: Heard, counting: _Counting
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counting.before(ear)
        heard(ear, None, args[0].reshape(-1, args[0].shape[-1]), None)
        counting.after(ear)

    return hook


def _expert_ear(ears: Sequence[Ear], heard: Heard, counting: _Counting) -> Listener:
    of_phase = {ear.phase: ear for ear in ears}

    def listener(phase: str, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        ear = of_phase.get(phase)
        if ear is None:
            return
        counting.before(ear)
        for expert, (x, tokens) in enumerate(rows):
            if len(x):
                heard(ear, expert, x, tokens)
        counting.after(ear)

    return listener
