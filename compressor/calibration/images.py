"""Conversations with images -> prompts, by the source's own processor; what a plan can check of them before.

A file of JSON lines: ``messages`` of {role, content}, a content being a text or a list of parts, ``{"type":
"text", "text": ...}`` or ``{"type": "image", "path": ...}`` with a path below the file's folder.

Legend: T tokens of a prompt, features of images included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from random import Random
from typing import TYPE_CHECKING, Any

from compressor.calibration.formats import is_json_lines
from compressor.calibration.spec import ImagesSpec
from compressor.data import is_packed
from compressor.errors import UserError
from compressor.workspace import file_sha256

if TYPE_CHECKING:
    import torch

    from compressor.progress import Progress

Messages = list[dict[str, Any]]
Prompt = dict[str, "torch.Tensor"]

_WHERE = "calibration.images"
_SHAPE = '{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, ...]}]}'


def images_sha256(path: Path) -> tuple[str, int]:
    """Hex sha256 over the file and every image that it names, in order; and how many conversations it has.

    Raises:
        UserError: it is not such a file, or an image is missing or lies elsewhere.
    """
    digest = hashlib.sha256(file_sha256(path).encode())
    count = 0
    for messages in conversations(path):
        count += 1
        for part in _image_parts(messages):
            digest.update(file_sha256(path.parent / part["path"]).encode())
    if count == 0:
        raise UserError("it holds no conversations", where=str(path), fix=f"write {_SHAPE}")
    return digest.hexdigest(), count


def conversations(path: Path) -> Iterator[Messages]:
    """The checked ``messages`` of every line that is not empty.

    Raises:
        UserError: as ``images_sha256``.
    """
    if not is_json_lines(path) or is_packed(path):
        raise UserError(
            "conversations with images are read from JSON lines", where=str(path), fix="use .jsonl"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
                    raise UserError(f"not JSON: {error}", where=where, fix=f"write {_SHAPE}") from error
                yield _checked(record, path.parent, where)


def image_prompts(
    spec: ImagesSpec, processor: Any, longest: int, seed: int, progress: Progress
) -> tuple[list[Prompt], list[str]]:
    """``num_samples`` prompts of at most ``longest`` tokens, in a seeded order; and warnings.

    Each is what the processor makes of a conversation: ``input_ids`` [1, T], ``pixel_values`` and whatever
    else the model takes, but for a mask that hides nothing.

    Raises:
        UserError: an image or a conversation cannot be read, or there are too few of that length.
    """
    drawn = list(conversations(spec.path))
    order = Random(f"{seed} {spec.sha256}")
    found: list[Prompt] = []
    long = 0
    progress.start("calibration images", spec.num_samples, "items")
    for messages in sorted(drawn, key=lambda _: order.random()):
        if len(found) == spec.num_samples:
            break
        prompt = _prompt(messages, processor, spec)
        if prompt["input_ids"].shape[1] > longest:
            long += 1
            continue
        found.append(prompt)
        progress.advance(1)
    progress.finish()
    if len(found) < spec.num_samples:
        raise UserError(
            f"{spec.name} holds {len(found)} conversations of at most {longest} tokens and {long} longer; "
            f"{spec.num_samples} are wanted",
            where=_WHERE,
            fix="lower calibration.images.num_samples, or raise calibration.sequence_length",
        )
    return found, [f"calibration: {long} conversations of {spec.name} are longer than a row"] if long else []


def _checked(record: object, folder: Path, where: str) -> Messages:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError("not an object with a list of `messages`", where=where, fix=f"write {_SHAPE}")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not isinstance(message.get("role"), str):
            raise UserError("a message has no role, or no content", where=where, fix=f"write {_SHAPE}")
        if not all(isinstance(part, dict) and _is_part(part) for part in parts):
            what = "a part of a message is neither a text nor an image with a `path`"
            raise UserError(what, where=where, fix=f"write {_SHAPE}")
    for part in _image_parts(messages):
        path = PurePosixPath(part["path"])
        if path.is_absolute() or ".." in path.parts:
            raise _outside(part["path"], where)
        try:
            found = (folder / path).resolve()
            there = found.is_file()
        except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
            there = False
        if not there:
            raise UserError(
                f"there is no image {part['path'][:200]!r}", where=where, fix="put it beside the file"
            )
        if not found.is_relative_to(folder.resolve()):
            raise _outside(part["path"], where)
    return messages


def _outside(path: str, where: str) -> UserError:
    what = f"the image {path[:200]!r} lies outside of the file's folder"
    return UserError(what, where=where, fix="put it beside the file, and name it relative to that")


def _is_part(part: dict[str, Any]) -> bool:
    key = {"text": "text", "image": "path"}.get(str(part.get("type")))
    return key is not None and isinstance(part.get(key), str)


def _image_parts(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] == "image")


def _prompt(messages: Messages, processor: Any, spec: ImagesSpec) -> Prompt:
    """One conversation through the processor's chat template and image processor."""
    shown = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        opened = [
            {"type": "image", "image": _opened(spec.path.parent / part["path"])}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"]}
            for part in parts
        ]
        shown.append({"role": message["role"], "content": opened})
    try:
        made = processor.apply_chat_template(shown, tokenize=True, return_dict=True, return_tensors="pt")
        prompt = dict(made.items())
        ids = prompt["input_ids"]
        assert ids.dim() == 2
        assert ids.shape[0] == 1
    except Exception as error:  # a template is a program, and processors raise what they like
        raise UserError(
            f"the source's processor refuses a conversation of {spec.name}: {type(error).__name__}: "
            f"{str(error)[:200]}",
            where=_WHERE,
        ) from error
    if "attention_mask" in prompt and bool(prompt["attention_mask"].all()):
        del prompt["attention_mask"]
    return prompt


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # broken files raise anything
        raise UserError(f"the image cannot be read: {error}", where=str(path), fix="replace it") from error
