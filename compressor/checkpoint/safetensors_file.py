"""Reads safetensors files: headers without torch, tensors without mmap. Nothing in a file is trusted.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON, tensor data).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError
from compressor.spec import DTYPE_BYTES, TensorHeader

if TYPE_CHECKING:
    import torch

# huggingface/safetensors safetensors/src/tensor.rs, MAX_HEADER_SIZE
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32
MAX_NAME_CHARS = 1024
MAX_ELEMENTS = 2**53
AGAIN = "download the file again"

# safetensors dtype -> name of the torch dtype; uint16 and wider unsigned exist in torch since 2.3
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}
_TORCH_TO_SAFETENSORS = {f"torch.{theirs}": ours for ours, theirs in _TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What the header of one safetensors file says, checked against the file.

    Attributes:
        headers: every tensor by name, in the order of their data.
        offsets: name -> first byte of the tensor's data, counted from the start of the file.
        metadata: the ``__metadata__`` strings.
        file_bytes: size of the file.
    """

    headers: dict[str, TensorHeader]
    offsets: dict[str, int]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> FileHeader:
    """The checked header of the safetensors file ``path``; reads nothing behind it and needs no torch.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not what the format allows.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), file_bytes, str(path))
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return parse_header(raw, 8 + length, file_bytes, str(path))


def header_length(first_bytes: bytes, file_bytes: int, where: str) -> int:
    """The header's length in bytes from the first 8 bytes of a file of ``file_bytes``.

    Raises:
        CheckpointError: it is impossible or beyond the library's cap.
    """
    if len(first_bytes) < 8:
        raise CheckpointError("truncated shard: no room for a safetensors header", where=where, fix=AGAIN)
    length = int.from_bytes(first_bytes, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"not a safetensors file: a header of {length:,} bytes, the format allows {MAX_HEADER_BYTES:,}",
            where=where,
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"truncated shard: the header claims {length:,} bytes, the file has {file_bytes:,}",
            where=where,
            fix=AGAIN,
        )
    return length


def parse_header(raw: bytes, data_start: int, file_bytes: int, where: str) -> FileHeader:
    """Checks the header's JSON text ``raw`` of a file whose data begins at ``data_start``.

    Raises:
        CheckpointError: bad JSON, repeated names, unknown dtypes, absurd shapes, offsets that overlap, leave
            gaps or leave the file, or sizes that do not match the shapes.
    """
    entries = _parse_json(raw, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("header: __metadata__ must map strings to strings", where=where)
    spans = []
    for name, entry in entries.items():
        header = _tensor_header(name, entry, where)
        begin, end = _data_offsets(name, entry, where)
        if end - begin != header.nbytes:
            raise CheckpointError(
                f"tensor {name}: {header.dtype} {list(header.shape)} needs {header.nbytes:,} bytes, "
                f"the header gives it {end - begin:,}",
                where=where,
            )
        spans.append((begin, end, header))
    spans.sort(key=lambda span: span[:2])
    _check_layout(spans, file_bytes - data_start, where)
    return FileHeader(
        headers={header.name: header for _, _, header in spans},
        offsets={header.name: data_start + begin for begin, _, header in spans},
        metadata=metadata,
        file_bytes=file_bytes,
    )


def checked_header(name: str, dtype: object, shape: object, where: str) -> TensorHeader:
    """A tensor header from values that somebody else wrote.

    Raises:
        CheckpointError: unprintable name, unknown dtype, or a shape that is not a short list of sizes.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise CheckpointError(f"tensor name {name[:80]!r} is empty, too long or unprintable", where=where)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"tensor {name}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPE_BYTES)}", where=where
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise CheckpointError(f"tensor {name}: the shape must be a list of at most {MAX_RANK}", where=where)
    # bool is a subclass of int, so compare the type itself
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise CheckpointError(f"tensor {name}: impossible shape {str(shape)[:80]}", where=where)
    header = TensorHeader(name, dtype, tuple(shape))
    if header.numel >= MAX_ELEMENTS:
        raise CheckpointError(f"tensor {name}: impossible shape {str(shape)[:80]}", where=where)
    return header


def read_tensor(path: Path, header: TensorHeader, offset: int, index: int | None = None) -> torch.Tensor:
    """The tensor (or its entry ``index`` along the first dimension) read into fresh memory.

    Raises:
        CheckpointError: the file has become unreadable or shorter.
    """
    import torch

    assert index is None or 0 <= index < header.shape[0], f"{header.name}[{index}] of {header.shape}"
    shape = header.shape if index is None else header.shape[1:]
    if index is not None:
        offset += index * prod(shape) * DTYPE_BYTES[header.dtype]
    # Engines have the accelerator as default device while they build a model.
    tensor = torch.empty(shape, dtype=torch_dtype(header.dtype), device="cpu")
    if tensor.numel():
        read_into(path, tensor.view(-1).view(torch.uint8).numpy().data, offset, header.name)
    return tensor


def read_into(path: Path, target: memoryview, offset: int, name: str) -> None:
    """Fills ``target`` with the bytes of ``path`` from ``offset`` on; ``name`` is the tensor, for messages.

    Raises:
        CheckpointError: the file cannot be read or ends too soon.
    """
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < len(target):
                # Linux reads at most 2 GiB at a time
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"truncated shard: it ends inside tensor {name}", where=str(path), fix=AGAIN
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot read tensor {name}: {error.strerror}", where=str(path)) from error


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    found = getattr(torch, _TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return _TORCH_TO_SAFETENSORS[str(dtype)]


def load_json(raw: bytes | str, where: str, what: str) -> Any:
    """JSON from outside: repeated keys, endless nesting and giant numbers are faults, not crashes.

    Raises:
        CheckpointError: ``what`` is not JSON or repeats a key.
    """
    try:
        return json.loads(raw, object_pairs_hook=_no_repeats)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error.what}", where=where) from error
    except (ValueError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:120]
        raise CheckpointError(f"{what} is not valid JSON ({reason})", where=where) from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in found if names.count(name) > 1)
        raise CheckpointError(f"duplicate name {repeated[:80]!r}")
    return found


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The header's JSON object; repeated names, deep nesting and non-objects are refused."""
    # The library demands the brace; the padding of spaces comes at the end.
    if not raw.startswith(b"{"):
        raise CheckpointError("not a safetensors file: its header is not a JSON object", where=where)
    entries = load_json(raw, where, "not a safetensors file: its header")
    assert isinstance(entries, dict)
    return entries


def _tensor_header(name: str, entry: object, where: str) -> TensorHeader:
    """The name, dtype and shape of one header entry."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"tensor {name[:80]!r}: the header entry must have dtype, shape and data_offsets", where=where
        )
    return checked_header(name, entry["dtype"], entry["shape"], where)


def _data_offsets(name: str, entry: dict[str, Any], where: str) -> tuple[int, int]:
    """Begin and end of one tensor's data, counted from the end of the header."""
    offsets = entry["data_offsets"]
    if isinstance(offsets, list) and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    raise CheckpointError(f"tensor {name}: impossible data_offsets {str(offsets)[:80]}", where=where)


def _check_layout(spans: list[tuple[int, int, TensorHeader]], data_bytes: int, where: str) -> None:
    """Sorted spans must fill the data exactly: no gap (could hide data), no overlap, nothing left over."""
    expected = 0
    for begin, end, header in spans:
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise CheckpointError(f"tensor {header.name}: its data {kind}", where=where)
        expected = end
    if expected > data_bytes:
        raise CheckpointError(
            f"truncated shard: its tensors need {expected:,} bytes, the file holds {data_bytes:,}",
            where=where,
            fix=AGAIN,
        )
    if expected < data_bytes:
        raise CheckpointError(
            f"{data_bytes - expected:,} bytes after the last tensor", where=where, fix=AGAIN
        )
