"""What the parts of a verification say to each other: checks, and an engine's questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]
# What was done to weights in 16 bit before they were quantized: rows and columns multiplied, or all mixed.
Transform = Literal["scaled", "rotated"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the check, e.g. ``tensors``.
        status: ``skipped`` where it could not be made, and ``detail`` says why.
        detail: one sentence a finding, or what was found to be right.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is asked about one model; written as JSON for a process of the engine's own.

    Attributes:
        model: the folder to load.
        dtype: ``float32``, ``float16`` or ``bfloat16``: what it computes in; ``auto`` is bfloat16, or
            float32 for an unquantized model on a CPU.
        windows: token ids whose log-probabilities are wanted, one prompt a window; each shorter than the
            longest sequence that the model takes.
        prompts: token ids that are continued greedily.
        new_tokens: how many tokens each continuation gets; an end token does not end it.
    """

    model: str
    dtype: str
    windows: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As the engine's process reads it."""
        return asdict(self)


@dataclass(frozen=True)
class EngineAnswer:
    """What the engine said.

    Attributes:
        engine: its name, ``vllm``.
        version: of the engine's package.
        device: what it ran on: ``cpu`` or the accelerator's name; empty if it did not get to know.
        dtype: what it computed in, or as requested if it did not get to decide.
        plugins: general plug-ins of other packages that the engine loads; any may have replaced its kernels.
        quantization: the method by which the engine says it loaded the weights, or None.
        logprobs: for each window, log p(token t | tokens before t) in nats for t = 1, 2, ...; as the engine
            says, so NaN and infinities are possible.
        greedy: for each prompt, the token ids that followed.
        error: None, or why it did not finish: the engine's own exception on one line.
        stage: how far it got: ``import``, ``load``, ``score`` or ``done``.
        seconds: wall-clock of the stages that were finished, ``import``, ``load`` and ``score``.
    """

    engine: str
    version: str
    device: str
    dtype: str
    plugins: tuple[str, ...]
    quantization: str | None
    logprobs: tuple[tuple[float, ...], ...]
    greedy: tuple[tuple[int, ...], ...]
    error: str | None
    stage: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """What a result's own report and recipe say of values that data chose, not the nearest rounding.

    Attributes:
        calibrated: modules where a weight that is not the nearest is no fault.
        moved: vectors that a polish may have moved a little.
        trained: whether scales of matrices were trained, by a polish or block by block.
        changed: tensors in 16 bit that a transform may have changed.
        transform: what it does to matrices, or None without one.
        named: all that the report says was changed, be there anything in the recipe that does so or not.
        adapted: tensors of the source that were trained on long documents, before all else.
        predicting: whether prediction layers were trained on the result, after all else.
    """

    calibrated: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()
    trained: bool = False
    changed: frozenset[str] = frozenset()
    transform: Transform | None = None
    named: frozenset[str] = frozenset()
    adapted: frozenset[str] = frozenset()
    predicting: bool = False
