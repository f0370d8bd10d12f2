"""What a stage is told: the claims to fulfil and the files to write. Stages never see the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compressor.checkpoint.kept import KeptScheme
from compressor.schemes.base import Scheme
from compressor.solvers.base import Solver
from compressor.spec import FLOAT_DTYPES, LinearPart, Role, TensorHeader

if TYPE_CHECKING:
    import torch

# The rule of tensors that no pattern claims; copies by it were chosen to stay in 16 bit.
AUTO_RULE = "weights.scheme"


@dataclass(frozen=True)
class Claim:
    """What happens to one source tensor.

    Attributes:
        tensor: the source tensor.
        role: what it is to the model.
        action: ``quantize``, ``copy``, or ``keep``: the source stores it compressed, and so does the result.
        rule: the recipe's key that decided (``weights.scheme``, ``weights.rules.0``...), or ``default``.
        reason: why it stays as it is; "" when quantized.
        scheme: how it is stored, when quantized.
        solver: how its values are chosen, when quantized.
        outputs: the exact tensors written.
        kept: how it is stored, when kept; ``tensor`` is then what it decodes to.
    """

    tensor: TensorHeader
    role: Role
    action: Literal["quantize", "copy", "keep"]
    rule: str
    reason: str
    scheme: Scheme | None
    solver: Solver | None
    outputs: tuple[TensorHeader, ...]
    kept: KeptScheme | None = None

    @property
    def stored(self) -> Scheme | KeptScheme | None:
        """How it is stored, by whoever's doing; None in 16 bit."""
        return self.scheme or self.kept

    @property
    def is_target(self) -> bool:
        """Whether the tensor is quantized, or could have been: what ``bits_per_target_weight`` is over."""
        return self.scheme is not None or self.rule == AUTO_RULE

    @property
    def result_bytes(self) -> int:
        """Bytes of everything written for this tensor."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def bytes_16bit(self) -> int:
        """Bytes of the tensor as a 16-bit checkpoint stores it (integers count as they are)."""
        return self.tensor.numel * 2 if self.tensor.dtype in FLOAT_DTYPES else self.tensor.nbytes


@dataclass(frozen=True)
class Started:
    """A matrix as a solver stored it, to be learned together with the others of its block.

    Attributes:
        claim: of the source tensor that holds it.
        part: the matrix.
        tensors: local name -> stored tensor.
    """

    claim: Claim
    part: LinearPart
    tensors: dict[str, torch.Tensor]


def needs_moments(claim: Claim) -> bool:
    """Whether the claim's solver must hear its inputs."""
    return claim.solver is not None and claim.solver.needs_moments


def needs_calibration(claim: Claim) -> bool:
    """Whether the claim's solver needs the states that the result computes so far."""
    return claim.solver is not None and claim.solver.needs_calibration


def needs_range(claim: Claim) -> bool:
    """Whether the claim's scheme stores something measured on its inputs."""
    return claim.scheme is not None and claim.scheme.static_inputs


def needs_data(claim: Claim) -> bool:
    """Whether the claim must be walked, not streamed."""
    return needs_calibration(claim) or needs_range(claim)


@dataclass(frozen=True)
class Unit:
    """Claims that must be solved together."""

    claims: tuple[Claim, ...]

    @property
    def result_bytes(self) -> int:
        """Bytes written for the unit."""
        return sum(claim.result_bytes for claim in self.claims)

    @property
    def source_bytes(self) -> int:
        """Bytes read for the unit, as stored."""
        return sum(claim.tensor.nbytes for claim in self.claims)


@dataclass(frozen=True)
class Shard:
    """One output file's units."""

    units: tuple[Unit, ...]

    @property
    def result_bytes(self) -> int:
        """Tensor bytes of the file."""
        return sum(unit.result_bytes for unit in self.units)

    @property
    def source_bytes(self) -> int:
        """Bytes read to write the file."""
        return sum(unit.source_bytes for unit in self.units)
