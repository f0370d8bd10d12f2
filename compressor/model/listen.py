"""In which order a block's matrices are used and which share an input; and listening to those inputs.

The order is found once for each kind of block, by a rehearsal: a few tokens through the block with parameters
that are one number each and take no memory. Real runs then hear what the rehearsal has named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compressor.errors import CheckpointError
from compressor.model.routed import (
    DOWN,
    UP,
    Choice,
    Listener,
    Rounding,
    Share,
    heard_forward,
    is_expert_owner,
)
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

    @property
    def waits_well(self) -> bool:
        """Whether a pass can wait at each step: before it multiplies what the step hears by anything."""
        firsts = [step[0].first for step in self.steps]
        return firsts == sorted(firsts) and all(len(step) == 1 and step[0].once for step in self.steps)


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


class Enough(BaseException):
    """Leaves a block's forward when the wanted step was heard."""


# Ear, expert (None for linear layers), rows [N, I], and what else is known of an expert's.
Heard = Callable[[Ear, int | None, torch.Tensor, Share | None], None]


# Waits until the next wish: the step to hear next, or None for the block's end.
Wait = Callable[[], "int | None"]


class Listening:
    """What one pass hears, and how far it goes: counts the ears of the wanted step.

    Attributes:
        heard: told the inputs.

    Args:
        layout: of the block.
        heard: told the inputs.
        until: the step after which the pass stops; None for none.
        wait: called in place of stopping; the pass goes on when it returns.
    """

    def __init__(self, layout: Layout, heard: Heard, until: int | None, wait: Wait | None = None) -> None:
        self.heard = heard
        self._layout = layout
        self._wait = wait
        self._choice = Choice() if any(ear.phase for step in layout.steps for ear in step) else None
        self._done: set[Ear] = set()
        self._want(until)

    @property
    def never(self) -> list[str]:
        """The modules that this pass ought to have used and did not."""
        return sorted(ear.owners[0] for ear in self._missing)

    def routers(self) -> AbstractContextManager[object]:
        """Within it, in the thread of the pass, routers are heard."""
        return self._choice or nullcontext()

    def scores(self, chosen_NE: torch.Tensor) -> torch.Tensor | None:
        """What the last router chose these by: see ``Choice.take``."""
        return None if self._choice is None else self._choice.take(chosen_NE)

    def before(self, ear: Ear) -> None:
        """Called when a pass comes to an ear."""
        while self._last is not None and ear.first > self._last:
            self._reached()

    def after(self, ear: Ear) -> None:
        """Called when all of it was heard."""
        self._done.add(ear)
        self._missing.discard(ear)
        if self._last is not None and not self._missing and not self._again:
            self._reached()

    def _want(self, until: int | None) -> None:
        wanted = self._layout.steps[until] if until is not None else ()
        self._last = max((ear.last for ear in wanted), default=None)
        every = {ear for step in self._layout.steps for ear in step}
        self._missing = (every if until is None else set(wanted)) - self._done
        self._again = not all(ear.once for ear in wanted)

    def _reached(self) -> None:
        if self._wait is None:
            raise Enough
        self._want(self._wait())


class Ears:
    """The ears of a block, put up for as long as the context lasts.

    Attributes:
        listening: the pass that computes now; several may be under way by turns.

    Args:
        module: the block.
        layout: its.
        rounding: module of experts and phase -> what is done to inputs after they were heard; what is added
            while a pass waits counts from there on.
    """

    listening: Listening

    def __init__(
        self, module: nn.Module, layout: Layout, rounding: Mapping[tuple[str, str], Rounding]
    ) -> None:
        self._module = module
        self._rounding = rounding
        self._by_owner: dict[str, list[Ear]] = defaultdict(list)
        for step in layout.steps:
            for ear in step:
                self._by_owner[ear.owners[0]].append(ear)
        self._handles: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Ears:
        try:
            for name, ears in self._by_owner.items():
                owner = self._module.get_submodule(name)
                if ears[0].phase:
                    owner.forward = heard_forward(
                        owner, self._expert_ear(ears), _OfModule(self._rounding, name), self._scores
                    )
                    self._replaced.append(owner)
                else:
                    self._handles.append(owner.register_forward_pre_hook(self._linear_ear(ears[0])))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for owner in self._replaced:
            del owner.forward
        self._handles, self._replaced = [], []

    def _linear_ear(self, ear: Ear) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], Any]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            known = set(module._forward_pre_hooks)
            listening = self.listening
            listening.before(ear)
            listening.heard(ear, None, args[0].reshape(-1, args[0].shape[-1]), None)
            listening.after(ear)
            # torch has listed the hooks of this call already: those that came while the pass waited, which
            # round the input, are not among them
            for key, late in list(module._forward_pre_hooks.items()):
                if key not in known:
                    args = late(module, args)
            return args

        return hook

    def _scores(self, chosen_NE: torch.Tensor) -> torch.Tensor | None:
        return self.listening.scores(chosen_NE)

    def _expert_ear(self, ears: Sequence[Ear]) -> Listener:
        of_phase = {ear.phase: ear for ear in ears}

        def listener(phase: str, shares: Sequence[Share]) -> None:
            ear = of_phase.get(phase)
            if ear is None:
                return
            listening = self.listening
            listening.before(ear)
            for expert, share in enumerate(shares):
                listening.heard(ear, expert, share.x_MI, share)
            listening.after(ear)

        return listener


class _OfModule(Mapping[str, Rounding]):
    """Phase -> rounding of one module, as it is when it is looked up."""

    def __init__(self, rounding: Mapping[tuple[str, str], Rounding], name: str) -> None:
        self._rounding = rounding
        self._name = name

    def __getitem__(self, phase: str) -> Rounding:
        return self._rounding[self._name, phase]

    def __iter__(self) -> Iterator[str]:
        return (phase for name, phase in self._rounding if name == self._name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
    listening = Listening(layout, heard, until)
    with Ears(module, layout, rounding) as ears:
        ears.listening = listening
        try:
            with listening.routers():
                made = call.replay(module, hidden)
        except Enough:
            return None
    check_heard(listening)
    return None if until is not None else made


def check_heard(listening: Listening) -> None:
    """Raises CheckpointError where a pass came to its end without what it ought to have heard."""
    if listening.never:
        raise CheckpointError(
            "the block passes this layer by, so that its input cannot be heard", where=listening.never[0]
        )
