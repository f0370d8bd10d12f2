"""Where shipped recipes, header sets and texts are: the same relative path works from any folder.

In an installed wheel they lie in ``compressor/_data``; in a checkout beside the package. Texts may be packed
by xz, as the long documents that ship with the package are.
"""

from __future__ import annotations

import codecs
import hashlib
import lzma
from collections.abc import Iterator
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path

from compressor.errors import UserError

_PACKED = ".xz"
_CHUNK_BYTES = 1 << 20
# A few kilobytes of xz can unpack to any size, and ask for any dictionary: xz -9 needs 65 MiB.
MAX_UNPACKED_BYTES = 1 << 30
_MAX_DICTIONARY_BYTES = 128 << 20


def shipped_root() -> Path:
    """The folder that holds ``recipes/`` and ``calibration/``."""
    packaged = files("compressor") / "_data"
    if packaged.is_dir():
        with as_file(packaged) as folder:
            return folder
    return Path(__file__).resolve().parent.parent


def find(path: str, *, beside: Path | None = None, what: str = "file") -> Path:
    """The file or folder that ``path`` names.

    Looked for as given (absolute, or from the current folder), then from ``beside`` (the folder of the
    recipe that names it), then among the shipped files.

    Raises:
        UserError: it is in none of these places.
    """
    # "~" is not expanded: recipes come from strangers, and shells expand it for those who type it.
    asked = Path(path)
    places = [asked] if asked.is_absolute() else [asked, *([beside / asked] if beside else [])]
    if not asked.is_absolute() and ".." not in asked.parts:
        places.append(shipped_root() / asked)
    places = list(dict.fromkeys(place.absolute() for place in places))
    for place in places:
        try:
            if place.exists():
                return place.resolve()
        except OSError as error:
            raise UserError(f"no usable path of a {what}: {error.strerror}", where=path[:200]) from error
    looked = ", ".join(map(str, places))
    raise UserError(f"no such {what}: {path}", fix=f"looked for {looked}")


def is_packed(path: Path) -> bool:
    """Whether the text must be unpacked: its name ends in ``.xz``."""
    return path.suffix.lower() == _PACKED


def text_suffix(path: Path) -> str:
    """The suffix of a text in lower case; of a text packed by xz the one before: ``a.JSONL.xz`` is .jsonl."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def text_bytes(path: Path) -> int:
    """Bytes of a text, unpacked; errors as ``text_chunks``."""
    return sum(map(len, text_chunks(path))) if is_packed(path) else path.stat().st_size


def text_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a text, some at a time; one that ends in ``.xz`` is unpacked.

    Raises:
        UserError: broken xz data or several streams of it, or more than ``MAX_UNPACKED_BYTES`` of text in it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        packed: Iterator[bytes] = iter(lambda: file.read(_CHUNK_BYTES), b"")
        yield from _unpacked(packed, path) if is_packed(path) else packed


def scan_text(path: Path) -> tuple[str, int]:
    """Hex sha256 and bytes of a text, which is read through once; of a packed one as it unpacks.

    Raises:
        UserError: it is not UTF-8, cannot be read, or as ``text_chunks``.
    """
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    position, chunk = 0, b""
    try:
        for chunk in chain(text_chunks(path), [b""]):
            digest.update(chunk)
            decoder.decode(chunk, final=not chunk)
            position += len(chunk)
    except UnicodeDecodeError as error:
        # Counted from what the decoder had held back of the chunk before.
        begin = position - (len(error.object) - len(chunk))
        what = f"not UTF-8 text (byte {begin + error.start})"
        raise UserError(what, where=str(path), fix="convert it, with iconv for example") from error
    except OSError as error:
        what = f"the text cannot be read: {error.strerror}"
        raise UserError(what, where=str(path), fix="name a text or .jsonl file that you may read") from error
    return digest.hexdigest(), position


def _unpacked(packed: Iterator[bytes], path: Path) -> Iterator[bytes]:
    stream = lzma.LZMADecompressor(memlimit=_MAX_DICTIONARY_BYTES)
    given = 0
    try:
        for part in packed:
            while part or not (stream.needs_input or stream.eof):
                if stream.eof:
                    raise UserError("something follows the xz stream", where=str(path), fix="pack one text")
                chunk = stream.decompress(part, _CHUNK_BYTES)
                part = stream.unused_data
                given += len(chunk)
                if given > MAX_UNPACKED_BYTES:
                    most = f"{MAX_UNPACKED_BYTES >> 20:,} MiB"
                    raise UserError(f"the packed text is larger than {most}", where=str(path))
                if chunk:
                    yield chunk
    except lzma.LZMAError as error:
        raise UserError(f"not a text packed by xz: {error}", where=str(path)) from error
    if not stream.eof:
        raise UserError("the packed text is cut off", where=str(path), fix="copy it again")
