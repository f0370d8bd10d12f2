"""What a checkpoint folder holds, read from headers and JSON; every file is taken for a stranger's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.folder import file_inside, small_file
from compressor.checkpoint.layout import load_config, parse_index, weight_files
from compressor.checkpoint.safetensors_file import (
    FileHeader,
    load_json,
    read_header,
    read_into,
    read_tensor,
)
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError
from compressor.report.words import short_name
from compressor.spec import TensorHeader
from compressor.verify.structure.findings import Findings

if TYPE_CHECKING:
    import torch

# DeepSeek-V3 with separate NVFP4 experts has about 180,000 tensors.
MAX_TENSORS = 2_000_000
# Weights in Mistral's own layout lie beside the others; engines pass them over.
_OTHER_LAYOUT = "consolidated"
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Contents:
    """A checkpoint folder.

    Attributes:
        folder: where it lies.
        names: of the files in it, sorted.
        config: contents of config.json, or None where it cannot be read.
        headers: every tensor by name.
        homes: tensor name -> its file.
        offsets: tensor name -> first byte of its data in that file.
        complete: whether the headers of all weight files could be read.
    """

    folder: Path
    names: tuple[str, ...]
    config: dict[str, Any] | None
    headers: Mapping[str, TensorHeader] = field(default_factory=dict)
    homes: Mapping[str, Path] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    complete: bool = False

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file became unreadable.
        """
        return read_tensor(self.homes[name], self.headers[name], self.offsets[name])

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's bytes as uint8 vectors of at most 64 MiB.

        Raises:
            CheckpointError: the file became unreadable.
        """
        import torch

        left, offset = self.headers[name].nbytes, self.offsets[name]
        while left:
            chunk = torch.empty(min(left, _CHUNK_BYTES), dtype=torch.uint8)
            read_into(self.homes[name], chunk.numpy().data, offset, name)
            yield chunk
            left, offset = left - len(chunk), offset + len(chunk)


def open_contents(folder: Path) -> tuple[Contents, Findings]:
    """The folder's contents, and what is wrong with its files.

    Raises:
        CheckpointError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder))
    try:
        names = tuple(sorted(os.listdir(folder)))
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}", where=str(folder)) from error
    folder = folder.resolve()
    found = Findings("files")
    config = None
    try:
        config = load_config(small_file(folder, "config.json", ""), "config.json")
    except CheckpointError as error:
        found.add(told(error))
    try:
        lead = weight_files(names, "")
        weight_map = parse_index(small_file(folder, lead, ""), "") if lead == INDEX_NAME else {}
    except CheckpointError as error:
        found.add(told(error))
        return Contents(folder, names, config), found
    shards = list(dict.fromkeys(weight_map.values())) or [lead]
    _add_strays(names, shards, found)
    files = _read_headers(folder, shards, found)
    headers, homes = _merged(files, found)
    if len(files) == len(shards):
        _compare(weight_map, homes, found)
    paths = {shard: file_inside(folder, shard, "") for shard in files}
    return Contents(
        folder,
        names,
        config,
        headers,
        {name: paths[home] for name, home in homes.items()},
        {name: files[home].offsets[name] for name, home in homes.items()},
        complete=len(files) == len(shards),
    ), found


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of ``folder``.

    Raises:
        CheckpointError: missing, unreadable, outside the folder, too large, or not a JSON object.
    """
    found = load_json(small_file(folder, name, ""), "", name)
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return found


def told(error: CheckpointError) -> str:
    """A fault of a file in one line."""
    return f"{error.what} ({error.fix})" if error.fix else error.what


def _add_strays(names: Sequence[str], shards: Sequence[str], found: Findings) -> None:
    """Safetensors files beside the named ones: some engines read every file of a folder."""
    strays = [
        name
        for name in names
        if name.endswith(".safetensors") and name not in shards and not name.startswith(_OTHER_LAYOUT)
    ]
    if strays:
        found.add(
            "not named by the index: some engines read it all the same, others never; remove it or index it",
            *strays,
        )


def _read_headers(folder: Path, shards: Sequence[str], found: Findings) -> dict[str, FileHeader]:
    """The headers of the shards that can be read, at most ``MAX_TENSORS`` of them."""
    files: dict[str, FileHeader] = {}
    tensors = 0
    for shard in shards:
        try:
            path = file_inside(folder, shard, "")
        except CheckpointError as error:
            found.add(told(error))
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            found.add(told(error), shard)
            continue
        tensors += len(header.headers)
        if tensors > MAX_TENSORS:
            found.add(f"more than {MAX_TENSORS:,} tensors: no model has so many", shard)
            break
        files[shard] = header
    return files


def _merged(
    files: Mapping[str, FileHeader], found: Findings
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Every tensor and the shard that it lies in."""
    headers: dict[str, TensorHeader] = {}
    homes: dict[str, str] = {}
    for shard, file in files.items():
        for name, header in file.headers.items():
            if name in headers:
                found.add("lies in two files: write the shards again", name)
            headers[name], homes[name] = header, shard
    return headers, homes


def _compare(weight_map: Mapping[str, str], homes: Mapping[str, str], found: Findings) -> None:
    """The index against the files; without an index there is nothing to compare."""
    for name, shard in weight_map.items():
        if name not in homes:
            found.add("named by the index but in no file: download or write the shards again", name)
        elif homes[name] != shard:
            found.add("not in the file that the index names: write the index again", name)
    if weight_map:
        for name in homes.keys() - weight_map.keys():
            found.add("in a file, but the index does not name it: write the index again", name)


def dumped(value: object) -> str:
    """A few characters of a value from a config, for a message."""
    return short_name(json.dumps(value, default=str)[:80])
