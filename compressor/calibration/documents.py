"""The documents of one dataset, read one by one: plain text, JSON lines, or rows of a dataset on the Hub."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from compressor import data
from compressor.calibration.formats import is_json_lines
from compressor.calibration.spec import DatasetSpec
from compressor.errors import UserError
from compressor.evals.text import CHARS_PER_TOKEN, is_unicode, read_text

Messages = list[dict[str, str]]
Document = str | Messages
# None: a conversation that is not all text, which is left out.
Row = Document | None

_ALONE = "give it a text, or messages with a `role` and a `content` each"
# Rows of the Hub that are drawn from at a time: more is more even, but a row may be a book of megabytes, and
# all of them are in memory and downloaded first.
_SHUFFLE_ROWS = 256


def open_documents(dataset: DatasetSpec, tokens: int, seed: int) -> Sequence[Row]:
    """The dataset's documents; each is read, and checked, when it is asked for.

    A conversation with tool calls instead of a text, or with images, is None.

    Args:
        dataset: which.
        tokens: how many will be wanted; of a Hub dataset no more is downloaded than surely holds them.
        seed: which rows of a Hub dataset these are.

    Raises:
        UserError: it cannot be read, is of a format that is not, or the Hub cannot be reached.
    """
    if dataset.hub is not None:
        return _from_hub(dataset, tokens, seed)
    assert dataset.path is not None
    if is_json_lines(dataset.path):
        found = _JsonLines(dataset.path, dataset.field)
        return _WithoutEvery(found, dataset.held_out_every) if dataset.held_out_every else found
    return [read_text(dataset.path)]


class _WithoutEvery(Sequence[Row]):
    """The documents but for the last of so many."""

    def __init__(self, documents: Sequence[Row], every: int) -> None:
        self._documents = documents
        self._kept = [number for number in range(len(documents)) if number % every != every - 1]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[self._kept[index]]


class _JsonLines(Sequence[Row]):
    """A file of JSON lines of any size: only where its lines begin is kept; one that is packed, whole."""

    def __init__(self, path: Path, field: str | None) -> None:
        self._path, self._field = path, field
        self._starts, self._numbers = array("Q"), array("Q")
        start = 0
        self._unpacked = b"".join(data.text_chunks(path)) if data.is_packed(path) else None
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if self._unpacked is None else BytesIO(self._unpacked)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        with self._open() as file:
            file.seek(self._starts[index])
            line = file.readline()
        where = f"{self._path}:{self._numbers[index]}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            fix = "write one JSON object a line, with a field `text` or `messages`"
            raise UserError(f"not JSON: {error}", where=where, fix=fix) from error
        return _document(record, self._field, where)


def _document(record: object, field: str | None, where: str) -> Row:
    """The text or the conversation in a record; None where that is not all text.

    Raises:
        UserError: there is none, or it is something else.
    """
    if not isinstance(record, dict):
        raise UserError("not an object with fields", where=where, fix='write {"text": "..."}')
    if field is None:
        field = "text" if "text" in record else "messages"
    value = record.get(field)
    texts = [value]
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        if not all(isinstance(message.get("content"), str) for message in value):
            return None
        value = [{"role": message["role"], "content": message["content"]} for message in value]
        texts = [message["content"] for message in value]
    if not all(is_unicode(text) for text in texts):
        others = ", ".join(str(name) for name in record if name != field)[:200]
        raise UserError(
            f"the field {field!r} holds no text and no list of messages {{role, content}}",
            where=where,
            fix=f"set the dataset's `field`; there are {others}" if others else _ALONE,
        )
    return value


def _is_message(message: object) -> bool:
    """Of chat templates: its content is a text, a list of parts, or nothing beside tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    if "content" not in message:
        return "tool_calls" in message
    return message["content"] is None or isinstance(message["content"], str | list)


def _from_hub(dataset: DatasetSpec, tokens: int, seed: int) -> list[Row]:
    """Documents of a Hub dataset, streamed in a seeded order until they surely hold ``tokens``.

    Nothing is written to the disk. ``datasets`` runs no code of a repository since its version 4.
    """
    name = dataset.name
    assert dataset.hub is not None
    if Path(dataset.hub).exists():
        raise UserError(f"{dataset.hub} is a local folder", where=name, fix="name files of it with `path`")
    try:
        rows: Iterable[object] = _stream(dataset).shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
        found: list[Row] = []
        characters = 0
        for number, row in enumerate(rows):
            document = _document(row, dataset.field, f"{name}, row {number} as drawn")
            found.append(document)
            turns = [{"content": document}] if isinstance(document, str) else document or []
            characters += sum(len(turn["content"]) for turn in turns)
            if characters >= tokens * CHARS_PER_TOKEN:
                break
    except UserError:
        raise
    except Exception as error:  # whatever datasets, the Hub's client or the network raise
        raise UserError(
            f"the dataset cannot be read from the Hub: {str(error)[:300] or type(error).__name__}",
            where=name,
            fix="check its id, subset, revision, split and the connection, or use a file with `path`",
        ) from error
    return found


def _stream(dataset: DatasetSpec) -> Any:
    from datasets import load_dataset

    return load_dataset(
        dataset.hub, dataset.subset, split=dataset.split, revision=dataset.revision, streaming=True
    )
