"""A source whose weights are stored quantized, read as bfloat16 (``model.from: dequantize``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind, Source
from compressor.checkpoint.layout import stated_quantization, without_quantization
from compressor.checkpoint.packed import SIXTEEN_BIT, Layout, Packed, check_finite
from compressor.checkpoint.packed_fp8 import fp8_layout
from compressor.checkpoint.packed_modules import module_layout
from compressor.checkpoint.packed_mxfp4 import mxfp4_layout
from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.checkpoint.wrapping import Wrapping
from compressor.errors import CheckpointError
from compressor.model.unfused import Fused, fused_experts
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

# Of what is decoded to which bits: part of the fingerprint.
VERSION = 1


class DequantizedSource(Wrapping):
    """A quantized source with its weights decoded to bfloat16, tensor by tensor, under their plain names.

    Attributes as ``Source`` describes them. ``config`` has no ``quantization_config``; scales are no tensors
    of their own any more, and experts that were written one by one are fused again where their family's are.

    Attributes:
        inner: the same source as it lies.
        stored_bytes: of all its tensors.

    Args:
        stored: the same source, opened as it lies.
        how: the recipe's ``model.from``, for fingerprint and messages.

    Raises:
        CheckpointError: it is not quantized, or in a way that is not read here, or its tensors do not fit.
    """

    def __init__(self, stored: Source, *, how: str = "dequantize") -> None:
        self.inner = stored
        self.kind: Kind = "headers" if stored.kind == "headers" else "dequantized"
        self.label, self.revision, self.license = stored.label, stored.revision, stored.license
        self._layout = layout = _layout_of(stored, how).checked(stored.headers)
        self.config: dict[str, Any] = without_quantization(stored.config)
        self.stored_bytes = sum(header.nbytes for header in stored.headers.values())
        self._single = _plain_headers(stored.headers, layout)
        self._fused = {fused.header.name: fused for fused in fused_experts(self._single, self.config)}
        self.headers: Mapping[str, TensorHeader] = _with_fused(self._single, self._fused.values())
        left = "; its KV-cache scales are left out" if layout.dropped else ""
        note = f"dequantized from {layout.described} to bfloat16{left}"
        self.note = f"{stored.note}; {note}" if stored.note else note
        self.fingerprint = hashlib.sha256(f"{how} {VERSION} {stored.fingerprint}".encode()).hexdigest()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``: bf16 where the tensor is stored quantized, else as it lies."""
        if name in self._fused:
            return self._read_fused(self._fused[name], index)
        packed = self._layout.tensors.get(name)
        if packed is None:
            return self.inner.read(name, index)
        alone = index is not None and packed.by_expert
        decoded = self._decoded(packed, index if alone else None)
        return decoded if index is None or alone else decoded[index].clone()

    def stored_names(self, name: str) -> set[str]:
        """The tensors of ``inner`` that are read for the tensor ``name``, or carried with it."""
        if name in self._fused:
            parts = (part for expert in self._fused[name].parts for part in expert)
            return set[str]().union(*(self.stored_names(f"{part.module}.weight") for part in parts))
        packed = self._layout.tensors.get(name)
        return {name} if packed is None else {*packed.parts.values(), *packed.beside}

    def _read_fused(self, fused: Fused, index: int | None) -> torch.Tensor:
        """Experts that are stored one by one, or one of them as it lies in the fused tensor."""
        import torch

        if index is not None:
            weights_OI = [self.read(f"{part.module}.weight") for part in fused.parts[index]]
            return fused.expert(index, weights_OI)
        found = torch.empty(fused.header.shape, dtype=torch_dtype(fused.header.dtype))
        for number in range(len(found)):
            found[number] = self._read_fused(fused, number)
        return found

    def _decoded(self, packed: Packed, expert: int | None) -> torch.Tensor:
        parts = {local: self.inner.read(name, expert) for local, name in packed.parts.items()}
        check_finite(parts, packed.parts)
        decoded = packed.decode(parts)
        if not _is_finite(decoded):
            raise CheckpointError(
                "the tensor has non-finite values (NaN or infinite) once it is dequantized",
                where=packed.header.name,
                fix="the source is damaged or was saved wrongly: fetch it again",
            )
        return decoded


def _is_finite(tensor: torch.Tensor) -> bool:
    """Looked at in pieces: torch would take twice the tensor's memory for it."""
    from compressor.numerics.groups import CHUNK_VALUES

    flat = tensor.view(-1)
    starts = range(0, flat.numel(), CHUNK_VALUES)
    return all(bool(flat[start : start + CHUNK_VALUES].isfinite().all()) for start in starts)


def _layout_of(stored: Source, how: str) -> Layout:
    """The quantized tensors of a source.

    Raises:
        CheckpointError: not quantized, by an unknown method, or inconsistent.
    """
    description = stated_quantization(stored.config)
    if description is None:
        raise CheckpointError(
            f"model.from: {how}, but config.json has no quantization_config",
            where=stored.label,
            fix="remove it",
        )
    if not isinstance(description, dict):
        raise CheckpointError("config.json: quantization_config is not an object", where=stored.label)
    default = "compressed-tensors" if "config_groups" in description else ""
    method = str(description.get("quant_method", default))
    headers = stored.headers
    if method == "fp8":
        return fp8_layout(headers, description, stored.label)
    if method == "mxfp4":
        return mxfp4_layout(headers, stored.label)
    if method == "compressed-tensors" or method.startswith("modelopt"):
        return module_layout(headers, description, method, stored.read, stored.label)
    raise CheckpointError(
        f"quantized with {method[:40]!r}; fp8, mxfp4, compressed-tensors and modelopt are dequantized",
        where=stored.label,
        fix=f"use the {SIXTEEN_BIT}",
    )


def _plain_headers(headers: Mapping[str, TensorHeader], layout: Layout) -> dict[str, TensorHeader]:
    """In file order; a quantized tensor stands where its codes do."""
    by_codes = {next(iter(packed.parts.values())): packed for packed in layout.tensors.values()}
    gone = set(layout.dropped)
    for packed in layout.tensors.values():
        gone.update(packed.parts.values(), packed.beside)
    found: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        if name in by_codes:
            plain = by_codes[name].header
            found[plain.name] = plain
        elif name not in gone:
            found[name] = header
    return found


def _with_fused(headers: Mapping[str, TensorHeader], fused: Iterable[Fused]) -> dict[str, TensorHeader]:
    """In file order; a fused tensor stands where its first part does."""
    of_member = {name: one.header for one in fused for name in one.members()}
    listed = [of_member.get(name, header) for name, header in headers.items()]
    return {header.name: header for header in listed}
