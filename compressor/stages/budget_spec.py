"""What the stages ``sensitivity`` and ``budget`` are told: groups, how each may be stored, the goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.schemes.base import Scheme
from compressor.solvers.base import Solver
from compressor.stages.base import Claim
from compressor.stages.walk import WalkSpec

COPY = "copy"


@dataclass(frozen=True)
class Stored:
    """One way to store a group.

    Attributes:
        name: the scheme as recipes spell it, with what differs from its defaults; ``copy`` for 16 bit.
        scheme: None for 16 bit.
        nbytes: of the group's tensors in the result, scales included.
    """

    name: str
    scheme: Scheme | None
    nbytes: int


@dataclass(frozen=True)
class Group:
    """Source tensors that must be stored alike, because the engine fuses them.

    Attributes:
        name: of what they are fused into, or of the only matrix.
        block: number of the block that they lie in; None outside of all.
        claims: copies of 16 bit, as long as nothing is chosen.
        options: fewest bytes first.
    """

    name: str
    block: int | None
    claims: tuple[Claim, ...]
    options: tuple[Stored, ...]

    @property
    def parameters(self) -> int:
        """Weights of the group."""
        return sum(claim.tensor.numel for claim in self.claims)

    @property
    def content(self) -> list[Any]:
        """JSON-able, for a stage's key."""
        schemes = [
            None if option.scheme is None else option.scheme.model_dump(mode="json")
            for option in self.options
        ]
        return [self.name, [[claim.tensor.name, asdict(claim.role)] for claim in self.claims], schemes]


@dataclass(frozen=True)
class CacheOption:
    """One format of the KV cache in a joint choice.

    Attributes:
        format: its name.
        nbytes: of the whole cache, at the stated context and users.
        layers: that have the format; the others stay in 16 bit.
    """

    format: str
    nbytes: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Goal:
    """What the choice must keep to: bytes, or a loss.

    Attributes:
        said: the recipe's words for it (``bits_per_target_weight: 4.75``).
        group_bytes: for all groups, or with ``caches`` for them and the KV cache; None with a loss.
        max_increase: of the perplexity, relative; None with bytes.
        target_parameters: weights that ``bits_per_target_weight`` is over.
        target_bytes: of those among them that are stored as rules say, whatever is chosen.
        fixed_bytes: of everything that is not chosen, these included.
        caches: formats of the KV cache that are chosen together with the weights; none unless joint.
    """

    said: str
    group_bytes: int | None
    max_increase: float | None
    target_parameters: int
    target_bytes: int
    fixed_bytes: int
    caches: tuple[CacheOption, ...] = ()

    def bits(self, group_bytes: int) -> float:
        """``bits_per_target_weight`` where the groups take so many bytes."""
        return 8 * (self.target_bytes + group_bytes) / max(1, self.target_parameters)


@dataclass(frozen=True)
class SensitivityJob:
    """What the stage ``sensitivity`` is told.

    Attributes:
        groups: in the order of the checkpoint.
        solver: chooses the values that are tried; needs no calibration.
        calibration: texts, of whose rows ``heard`` are listened to and the others kept for judging.
        walk: how passes compute.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        seed: of what is drawn.
        caches: formats of the KV cache that are tried in every block.
    """

    groups: tuple[Group, ...]
    solver: Solver
    calibration: CalibrationSpec
    walk: WalkSpec
    device: Literal["cpu", "cuda"]
    seed: int
    caches: tuple[str, ...] = ()

    @property
    def heard(self) -> int:
        """Rows that sensitivities are measured on: a quarter, one at least."""
        return max(1, self.calibration.num_samples // 4)

    @property
    def content(self) -> Mapping[str, Any]:
        """JSON-able, for the stage's key."""
        return {
            "groups": [group.content for group in self.groups],
            "solver": self.solver.model_dump(mode="json"),
            "calibration": self.calibration.content,
            "dtype": self.walk.dtype,
            "batch_tokens": self.walk.batch_tokens,
            "device": self.device,
            "seed": self.seed,
            "caches": list(self.caches),
        }
