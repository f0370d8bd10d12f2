"""Reads GGUF headers strictly: every count, length and offset is held against the file before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` library's own reader checks
little, and takes seconds over a vocabulary; here it only names the tensor types and their block sizes.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compressor.checkpoint.safetensors_file import AGAIN, checked_header
from compressor.errors import CheckpointError, UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 512_000_000
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65_535
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
# gguf_metadata_value_type -> struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor: ``kind`` is the ggml type (``Q4_1``), ``shape`` is row-major as torch has it,
    ``offset`` counts bytes from the start of the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata (numbers, strings, lists of them) and the tensors in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    file_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """The checked header of a GGUF file.

    Raises:
        UserError: the ``gguf`` library is not installed.
        CheckpointError: not a GGUF file, truncated, or a header that cannot be true.
    """
    sizes = _type_sizes()
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, str(path))
            tensor_count, entry_count = _preamble(cursor)
            metadata: dict[str, Any] = {}
            for _ in range(entry_count):
                key = cursor.text(MAX_KEY_BYTES)
                if key in metadata:
                    raise cursor.fault(f"metadata key {key[:80]!r} occurs twice")
                metadata[key] = _value(cursor, cursor.number("I"))
            found = [_tensor_info(cursor, sizes) for _ in range(tensor_count)]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.fault(f"impossible general.alignment {str(alignment)[:40]}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata, _placed(found, data_start, cursor), cursor.file_bytes)


class _Cursor:
    """Reads forward through a header and never past the file's end or the cap."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self.where = file, where
        self.position = 0
        self.file_bytes = os.fstat(file.fileno()).st_size
        self._limit = min(self.file_bytes, MAX_HEADER_BYTES)

    @property
    def left(self) -> int:
        """Bytes that the header may still take."""
        return self._limit - self.position

    def fault(self, what: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(f"malformed GGUF: {what}", where=self.where, fix=AGAIN)

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > self.left:
            raise self.fault(f"truncated or corrupt: byte {self.position:,} asks for {count:,} more")
        self.position += count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        """One little-endian number of struct type ``code``."""
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """A count of things of which each takes at least ``least_bytes``."""
        found = int(self.number("Q"))
        if found > self.left // least_bytes:
            raise self.fault(f"it claims {found:,} {what}, more than it has room for")
        return found

    def text(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        """A UTF-8 string behind its length."""
        length = int(self.number("Q"))
        if length > max_bytes:
            raise self.fault(f"a string of {length:,} bytes")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self.fault("a string is not UTF-8") from error


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version; returns the counts of tensors and of metadata entries."""
    if cursor.left < len(MAGIC) or cursor.bytes(len(MAGIC)) != MAGIC:
        raise cursor.fault("it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise cursor.fault(f"version {version}; known: {', '.join(map(str, VERSIONS))} (little-endian)")
    return cursor.count(24, "tensors"), cursor.count(13, "metadata entries")


def _value(cursor: _Cursor, kind: int) -> Any:
    """One metadata value; arrays may hold numbers or strings, not arrays."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise cursor.fault(f"metadata of unknown type {kind}")
    item_kind = cursor.number("I")
    if item_kind == _STRING:
        return [cursor.text() for _ in range(cursor.count(8, "strings"))]
    if item_kind not in _SCALARS:
        raise cursor.fault(f"an array of items of type {item_kind}")
    code = _SCALARS[item_kind]
    count = cursor.count(struct.calcsize("<" + code), "numbers")
    return list(struct.unpack(f"<{count}{code}", cursor.bytes(count * struct.calcsize("<" + code))))


def _tensor_info(cursor: _Cursor, sizes: dict[int, tuple[str, int, int]]) -> GgufTensor:
    """One tensor's entry, its offset still counted from the start of the data."""
    name = cursor.text(MAX_KEY_BYTES)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fault(f"tensor {name[:80]!r} has {dimensions} dimensions")
    fastest_first = [int(cursor.number("Q")) for _ in range(dimensions)]
    # BF16 stands for any type: name and shape are what is checked here.
    header = checked_header(name, "BF16", fastest_first[::-1], cursor.where)
    kind = cursor.number("I")
    if kind not in sizes:
        raise cursor.fault(f"tensor {name} is of unknown ggml type {kind}; a newer gguf library may know it")
    type_name, block, block_bytes = sizes[kind]
    if 0 in header.shape or fastest_first[0] % block:
        raise cursor.fault(
            f"tensor {name}: shape {list(header.shape)} does not fit {type_name} blocks of {block}"
        )
    return GgufTensor(
        name, type_name, header.shape, int(cursor.number("Q")), header.numel // block * block_bytes
    )


def _placed(found: list[GgufTensor], data_start: int, cursor: _Cursor) -> dict[str, GgufTensor]:
    """The tensors by name in file order with absolute offsets, which lie inside the file and apart."""
    placed: dict[str, GgufTensor] = {}
    end = data_start
    for tensor in sorted(found, key=lambda tensor: tensor.offset):
        offset = data_start + tensor.offset
        if offset < end:
            raise cursor.fault(f"tensor {tensor.name} overlaps the one before it")
        end = offset + tensor.nbytes
        if end > cursor.file_bytes:
            raise cursor.fault(
                f"truncated: tensor {tensor.name} ends at byte {end:,}, the file at {cursor.file_bytes:,}"
            )
        if tensor.name in placed:
            raise cursor.fault(f"tensor {tensor.name} occurs twice")
        placed[tensor.name] = GgufTensor(tensor.name, tensor.kind, tensor.shape, offset, tensor.nbytes)
    return placed


def _type_sizes() -> dict[int, tuple[str, int, int]]:
    """ggml type number -> name, values in a block, bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ModuleNotFoundError as error:
        raise UserError(
            "reading GGUF needs the gguf library", fix="pip install 'compressor[demo]'"
        ) from error
    return {int(kind): (kind.name, block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()}
