"""Experts that a compressor wrote one by one, put back into the tensors that the model's checkpoints have.

vLLM's loader takes Llama 4's quantized experts apart only (``families.llama4``), transformers' takes them
fused only. Legend: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError
from compressor.model.families import family_for, text_config
from compressor.model.names import insert
from compressor.spec import LinearPart, TensorHeader

if TYPE_CHECKING:
    import torch

_FUSED_FAMILIES = ("llama4",)
# Model types that transformers loads fused only too, in layouts that are not known here.
_FUSED_OTHERWISE = ("gpt_oss",)
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d{1,9})\.(?P<kind>gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Fused:
    """A fused tensor, and the matrices that it consists of.

    Attributes:
        header: of the tensor.
        parts: expert -> its matrices.
    """

    header: TensorHeader
    parts: tuple[tuple[LinearPart, ...], ...]

    def members(self) -> list[str]:
        """The names of the matrices."""
        return [f"{part.module}.weight" for parts in self.parts for part in parts]

    def expert(self, number: int, weights_OI: Sequence[torch.Tensor]) -> torch.Tensor:
        """One entry of the tensor from the expert's matrices, in the order of ``parts``."""
        return insert(zip(self.parts[number], weights_OI, strict=True), self.header.shape[1:])


def fused_experts(headers: Mapping[str, TensorHeader], config: dict[str, Any]) -> list[Fused]:
    """The fused tensors of a checkpoint whose experts were written one by one; none in other families.

    Raises:
        CheckpointError: an expert is missing, or has another shape or dtype than its neighbours.
    """
    family = family_for(config)
    if text_config(config).get("model_type") in _FUSED_OTHERWISE and any(map(_EXPERT.match, headers)):
        raise CheckpointError("experts one by one are not put together for this model")
    if family.name not in _FUSED_FAMILIES:
        return []
    layers: dict[str, set[int]] = defaultdict(set)
    for name in headers:
        if match := _EXPERT.match(name):
            layers[match["experts"]].add(int(match["number"]))
    found = []
    for experts, numbers in layers.items():
        first = {kind: headers.get(f"{experts}.0.{kind}_proj.weight") for kind in ("gate", "down")}
        gate, down = first["gate"], first["down"]
        if gate is None or down is None or len(gate.shape) != 2 or len(down.shape) != 2:
            raise CheckpointError("has experts one by one, and not the first of them", where=experts)
        count, (rows, wide), (out, middle) = len(numbers), gate.shape, down.shape
        for header in (
            TensorHeader(f"{experts}.gate_up_proj", gate.dtype, (count, wide, 2 * rows)),
            TensorHeader(f"{experts}.down_proj", down.dtype, (count, middle, out)),
        ):
            found.append(_checked(header, family.role(header, config).parts, headers))
    return found


def _checked(header: TensorHeader, parts: Sequence[LinearPart], headers: Mapping[str, TensorHeader]) -> Fused:
    """The tensor, once every part of it is there and alike."""
    by_expert: list[list[LinearPart]] = [[] for _ in range(header.shape[0])]
    for part in parts:
        name, shape = f"{part.module}.weight", (part.out_features, part.in_features)
        if headers.get(name) != TensorHeader(name, header.dtype, shape):
            raise CheckpointError(
                f"{name} is missing, or is no {header.dtype} {list(shape)} as those of other experts are",
                where=header.name,
                fix="fetch the checkpoint again",
            )
        assert part.expert is not None
        by_expert[part.expert].append(part)
    return Fused(header, tuple(map(tuple, by_expert)))
