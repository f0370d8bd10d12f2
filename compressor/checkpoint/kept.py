"""A compressed source whose compressed tensors go into the result as they lie (``model.from: keep``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.layout import stated_quantization
from compressor.checkpoint.packed import Packed, check_finite
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

_FIX = "set `model.from: dequantize`"


@dataclass(frozen=True)
class KeptScheme:
    """How a source stores some of its modules.

    Attributes:
        label: for people.
        stated: the group of its ``quantization_config``, as JSON, without the targets.
    """

    label: str
    stated: str

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The library's description of it, for other targets."""
        from compressed_tensors.quantization import QuantizationScheme

        return QuantizationScheme.model_validate({**json.loads(self.stated), "targets": targets})


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as the source stores it.

    Attributes:
        scheme: how that is.
        outputs: the stored tensors, scales and those of inputs included.
    """

    scheme: KeptScheme
    outputs: tuple[TensorHeader, ...]


class KeptSource(DequantizedSource):
    """A compressed-tensors source: read as bfloat16, and beside it as it lies.

    Attributes:
        kept: plain name -> what is carried for it.

    Raises:
        CheckpointError: as ``DequantizedSource``; another method, or a quantized KV cache.
    """

    def __init__(self, stored: Source) -> None:
        super().__init__(stored, how="keep")
        layout = self._layout
        if layout.schemes is None:
            raise CheckpointError(
                f"model.from: keep carries compressed-tensors weights; this source is {layout.described}",
                where=self.label,
                fix=_FIX,
            )
        description = stated_quantization(stored.config)
        if isinstance(description, dict) and description.get("kv_cache_scheme"):
            raise CheckpointError(
                "model.from: keep does not carry a kv_cache_scheme", where=self.label, fix=_FIX
            )
        if layout.dropped:
            name = min(layout.dropped)
            raise CheckpointError(
                f"model.from: keep does not carry scales of a KV cache: {name}", where=self.label, fix=_FIX
            )
        if self._fused:
            raise CheckpointError(
                f"model.from: keep does not carry experts one by one, such as {min(self._fused)}",
                where=self.label,
                fix=_FIX,
            )
        described = {name: _described(scheme) for name, scheme in layout.schemes.items()}
        self.kept: Mapping[str, Kept] = {
            name: Kept(
                described[name],
                tuple(stored.headers[part] for part in (*packed.parts.values(), *packed.beside)),
            )
            for name, packed in layout.tensors.items()
        }
        self.note = f"read as bfloat16 from {layout.described}; {len(self.kept)} matrices stay stored so"

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """Stored name -> tensor of everything that is carried for the plain tensor ``name``.

        Raises:
            CheckpointError: a file has become unreadable, or a scale is not finite.
        """
        packed: Packed = self._layout.tensors[name]
        names = (*packed.parts.values(), *packed.beside)
        found = {part: self.inner.read(part) for part in names}
        # A module may be called a scale as well.
        leaves = {part.rpartition(".")[2]: part for part in names}
        check_finite({leaf: found[part] for leaf, part in leaves.items()}, leaves)
        return found


def _described(scheme: QuantizationScheme) -> KeptScheme:
    from compressor.model.decode import format_of

    layout = format_of(scheme)
    stated = scheme.model_dump(mode="json", exclude={"targets"}) | {"format": layout}
    return KeptScheme(f"{_preset(scheme) or layout} (kept)", json.dumps(stated, sort_keys=True))


def _preset(scheme: QuantizationScheme) -> str:
    """The library's preset that stores alike, with the size of integer groups; "" where there is none."""
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    found = _outline(scheme.weights), _outline(scheme.input_activations)
    for name, preset in PRESET_SCHEMES.items():
        if scheme.weights and found == (
            _outline(preset.get("weights")),
            _outline(preset.get("input_activations")),
        ):
            size = scheme.weights.group_size
            return f"{name} g{size}" if size and scheme.weights.type == "int" else name
    return ""


def _outline(args: QuantizationArgs | None) -> tuple[object, ...]:
    """What tells presets apart; integers come with groups of any size or one for each row."""
    if args is None:
        return ()
    strategy = args.strategy if args.type == "float" else None
    return args.num_bits, args.type, args.symmetric, bool(args.dynamic), strategy
