"""The model that llm-compressor works on: where each claim lies in it, before and after.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.errors import CheckpointError
from compressor.model.load import load_source_model
from compressor.model.names import extract, insert
from compressor.model.skeleton import build_skeleton, library_faults
from compressor.model.tensor_map import Piece, TensorMap
from compressor.schemes.base import Scales
from compressor.spec import LinearPart, TensorHeader
from compressor.stages.base import Claim
from compressor.stages.oneshot_checks import STAYS, checked, fitted
from compressor.stages.receipts import PartError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedModel

_EXPERTS = ".experts."
_OURS = "use a solver of this tool: gptq, smooth+gptq"
# What a quantized module holds begins so.
_STORED = ("weight", "input_")


@dataclass
class OneshotModel:
    """A model of transformers and the claims on its source's tensors.

    Attributes:
        source: the checkpoint.
        claims: of all its tensors.
        model: the library changes it in place.
        dtype: of its parameters.
    """

    source: Source
    claims: Sequence[Claim]
    model: PreTrainedModel
    dtype: torch.dtype
    _map: TensorMap
    _owners: dict[str, list[tuple[str, Piece]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parameter, pieces in self._map.pieces.items():
            for piece in pieces:
                self._owners.setdefault(piece.tensor, []).append((parameter, piece))

    @classmethod
    def on_meta(cls, source: Source, claims: Sequence[Claim]) -> Self:
        """From headers alone: to see whether everything has a place."""
        return cls._of(source, claims, build_skeleton(source), torch.float32)

    @classmethod
    def loaded(cls, source: Source, claims: Sequence[Claim]) -> Self:
        """The source as transformers loads it, in the 16-bit dtype in which its result is stored."""
        half = any(claim.tensor.dtype == "F16" for claim in claims if claim.scheme is not None)
        dtype = torch.float16 if half else torch.bfloat16
        return cls._of(source, claims, load_source_model(source, dtype).eval(), dtype)

    @classmethod
    def _of(cls, source: Source, claims: Sequence[Claim], model: PreTrainedModel, dtype: torch.dtype) -> Self:
        return cls(source, claims, model, dtype, TensorMap.of(model, source.headers, source.label))

    def split_experts(self, split: Callable[[Any], Any]) -> None:
        """Replaces experts that lie in 3-D parameters by linear layers, as ``split`` does.

        Raises:
            CheckpointError: it fails.
        """
        what = "llm-compressor cannot take the experts apart"
        with library_faults(self.source.label, what, fix=_OURS):
            split(self.model)

    def check(self, *, experts: bool) -> None:
        """Refuses claims that are no linear layer of the model, or (``experts``) one with other weights.

        Raises:
            CheckpointError: with the reason.
        """
        for claim, part in self._parts():
            split = _EXPERTS in part.module and self._is_fused(claim)
            if split and not experts:
                continue
            path = self.path(claim, part)
            module = self._module(path)
            if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != (
                part.out_features,
                part.in_features,
            ):
                raise CheckpointError(
                    f"llm-compressor has no linear layer of this shape for it (looked for {path})",
                    where=part.module,
                    fix=STAYS,
                )
            if split and not torch.equal(self.weight(path), self._source_weight(claim, part).to(self.dtype)):
                raise CheckpointError(
                    "llm-compressor takes the layer's experts apart in another way than the checkpoint",
                    where=part.module,
                    fix=STAYS,
                )

    def path(self, claim: Claim, part: LinearPart) -> str:
        """The module of the model that holds the matrix, once fused experts are taken apart.

        Raises:
            CheckpointError: transformers does not load it, or llm-compressor sees it as part of another.
        """
        owners = self._owners.get(claim.tensor.name)
        if not owners:
            raise CheckpointError(
                "transformers does not load this tensor as it is, so llm-compressor never sees it",
                where=claim.tensor.name,
                fix=STAYS,
            )
        parameter = owners[0][0]
        if _EXPERTS in part.module and _EXPERTS in parameter:
            return parameter[: parameter.rindex(_EXPERTS)] + part.module[part.module.rindex(_EXPERTS) :]
        if len(claim.role.parts) > 1 or part.transposed:
            raise CheckpointError(
                "llm-compressor would quantize this tensor as one matrix, the checkpoint stores its parts",
                where=claim.tensor.name,
                fix=STAYS,
            )
        return parameter.removesuffix(".weight")

    def targets(self) -> list[str]:
        """The modules of all quantized matrices."""
        return [self.path(claim, part) for claim, part in self._parts()]

    def schemes(self) -> dict[str, QuantizationScheme]:
        """Label -> compressed-tensors' description of a scheme, targeting its modules by name."""
        grouped: dict[Any, list[str]] = {}
        for claim, part in self._parts():
            grouped.setdefault(claim.scheme, []).append(self.path(claim, part))
        labels = [scheme.label for scheme in grouped]
        return {
            scheme.label if labels.count(scheme.label) == 1 else f"{scheme.label} {number}": scheme.ct_scheme(
                paths
            )
            for number, (scheme, paths) in enumerate(grouped.items())
        }

    def weight(self, path: str) -> torch.Tensor:
        """A module's weight, on the CPU."""
        return _state(self._module(path))["weight"]

    def outputs(self, claim: Claim) -> list[TensorHeader]:
        """What is stored of a quantized claim, as its scheme says."""
        assert claim.scheme is not None
        return [
            output
            for part in claim.role.parts
            for output in claim.scheme.outputs(
                part.module, part.out_features, part.in_features, dtype=claim.tensor.dtype
            )
        ]

    def packed(
        self, claim: Claim, before: Mapping[str, torch.Tensor] | None, tokens: int
    ) -> Iterator[tuple[LinearPart, dict[str, torch.Tensor], PartError]]:
        """The stored tensors of a quantized claim and their errors, one matrix after another.

        ``before``: module -> weight that was rounded; None: the source's. ``tokens``: all that were shown;
        the library has every expert compute with all of them.

        Raises:
            CheckpointError: see ``oneshot``.
        """
        for part in claim.role.parts:
            path = self.path(claim, part)
            weight_OI = self._source_weight(claim, part) if before is None else before[path]
            tensors = self._packed(claim, part, path)
            yield part, tensors, checked(claim, part, tensors, weight_OI.float(), tokens)

    def _packed(self, claim: Claim, part: LinearPart, path: str) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.config import CompressionFormat

        assert claim.scheme is not None
        scheme = claim.scheme.ct_scheme([path])
        packer = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format).value)
        # Beside the bias, AutoRound leaves scales of its own there.
        state = {name: t for name, t in _state(self._module(path)).items() if name.startswith(_STORED)}
        with library_faults(part.module, "compressed-tensors cannot pack what llm-compressor left"):
            made = packer.compress(state, scheme)
        headers = claim.scheme.outputs(
            part.module, part.out_features, part.in_features, dtype=claim.tensor.dtype
        )
        tensors = fitted(made, {header.name.rpartition(".")[2]: header for header in headers}, part.module)
        return tensors | self._shared(claim, part, path)

    def _shared(self, claim: Claim, part: LinearPart, path: str) -> dict[str, torch.Tensor]:
        """What of a matrix is stored otherwise, so that what an engine fuses shares a tensor-level scale.

        The library gives each FP8 matrix its own. vLLM keeps the largest and rounds the others again as it
        loads them; it is done here, so that what is measured is what is served.

        Raises:
            CheckpointError: tensor-level scales of NVFP4 differ, which no engine makes good for.
        """
        scheme = claim.scheme
        assert scheme is not None
        if not scheme.shares_tensor_scale or part.fuse_group is None:
            return {}
        states = [_state(self._module(other)) for other in self._fused[part.fuse_group, scheme]]
        local = "weight_global_scale" if "weight_global_scale" in states[0] else "weight_scale"
        scales = torch.stack([state[local] for state in states])
        if bool((scales == scales[0]).all()):
            return {}
        if local == "weight_global_scale":
            raise CheckpointError(
                "llm-compressor gave matrices that the engine fuses other tensor-level scales",
                where=part.module,
                fix=STAYS,
            )
        return scheme.encode(self.weight(path).float(), Scales(scales.amax(dim=0)))

    @cached_property
    def _fused(self) -> dict[tuple[str | None, Any], list[str]]:
        """(fuse group, scheme) -> modules."""
        found: dict[tuple[str | None, Any], list[str]] = defaultdict(list)
        for claim, part in self._parts():
            found[part.fuse_group, claim.scheme].append(self.path(claim, part))
        return found

    def header(self, claim: Claim) -> TensorHeader:
        """How a tensor is stored that stays in 16 bit."""
        return TensorHeader(claim.tensor.name, claim.outputs[0].dtype, claim.tensor.shape)

    def changed(self, claim: Claim) -> torch.Tensor | None:
        """A tensor that stays in 16 bit as the library left it, as it is stored; None if it is as it was.

        Raises:
            CheckpointError: it was changed, and cannot be told from the model; or it is not finite.
        """
        values = [self._now(claim, *owner) for owner in self._owners.get(claim.tensor.name, ())]
        if not values:
            return None
        was = self.source.read(claim.tensor.name)
        if any(not torch.equal(value, values[0]) for value in values):
            raise CheckpointError(
                "llm-compressor changed this tensor differently in the two places where the model uses it",
                where=claim.tensor.name,
                fix="use other modifiers",
            )
        if torch.equal(values[0], was.to(values[0].dtype)):
            return None
        if not bool(values[0].isfinite().all()):
            raise CheckpointError("llm-compressor left values that are not finite", where=claim.tensor.name)
        return values[0].to(torch_dtype(claim.outputs[0].dtype)).contiguous()

    def _now(self, claim: Claim, parameter: str, piece: Piece) -> torch.Tensor:
        """The source tensor as the model holds it now, if need be put together from its parts."""
        module, _, local = parameter.rpartition(".")
        owner = self._module(module)
        state = {} if owner is None else _state(owner)
        if local in state:
            return piece.of(state[local])
        if not claim.role.parts:
            raise CheckpointError(
                "llm-compressor takes it apart, so that one cannot tell whether it was changed",
                where=claim.tensor.name,
                fix="use modifiers that only quantize",
            )
        parts = [(part, self.weight(self.path(claim, part))) for part in claim.role.parts]
        return insert(parts, claim.tensor.shape)

    def check_rebuilt(self) -> None:
        """Refuses a change of what transformers rebuilds from the checkpoint's tensors: they are gone.

        Raises:
            CheckpointError: there is one.
        """
        for name in self._map.converted:
            module, _, local = name.rpartition(".")
            owner = self._module(module)
            now = None if owner is None else _state(owner).get(local)
            was = None if now is None else torch.empty_like(now)
            if was is not None:
                self._map.fill(self.source, {name: was})
            if now is None or was is None or not torch.equal(now, was):
                raise CheckpointError(
                    "llm-compressor changed what transformers loads in another form than the checkpoint's",
                    where=name,
                    fix="use modifiers that only quantize",
                )

    def check_offline(self) -> None:
        """Refuses a model that rotates as it computes: the checkpoint has no place for that.

        Raises:
            CheckpointError: it does.
        """
        config = getattr(self.model, "transform_config", None)
        groups = {} if config is None else config.config_groups
        online = [name for name, group in groups.items() if any(args.is_online() for args in group.apply)]
        if online:
            raise CheckpointError(
                f"llm-compressor's rotations {', '.join(online)} act as the model computes, which the stored "
                "checkpoint cannot say",
                where=self.source.label,
            )

    def _parts(self) -> Iterator[tuple[Claim, LinearPart]]:
        for claim in self.claims:
            if claim.scheme is not None:
                for part in claim.role.parts:
                    yield claim, part

    def _is_fused(self, claim: Claim) -> bool:
        """Whether the model as loaded holds the tensor in a 3-D parameter."""
        return any(
            piece.expert is not None or len(claim.tensor.shape) == 3
            for _, piece in self._owners.get(claim.tensor.name, ())
        )

    def _module(self, path: str) -> nn.Module | None:
        try:
            found: nn.Module = self.model.get_submodule(path)
        except AttributeError:
            return None
        return found

    def _source_weight(self, claim: Claim, part: LinearPart) -> torch.Tensor:
        return extract(self.source.read(claim.tensor.name, part.expert), part)


def _state(module: nn.Module | None) -> dict[str, torch.Tensor]:
    """A module's own tensors on the CPU; offloaded ones are where the library keeps them."""
    from compressed_tensors.utils import get_direct_state_dict

    assert module is not None, "checked before"
    return {
        name: tensor.detach().cpu()
        for name, tensor in get_direct_state_dict(module).items()
        if tensor is not None
    }
