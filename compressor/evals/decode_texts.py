"""Prompts of one domain: the beginnings of documents, and of conversations through the chat template.

Legend: T tokens of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.data import find, text_chunks, text_suffix
from compressor.errors import UserError
from compressor.evals.decode_spec import HELD_OUT_EVERY, SHIPPED_DOMAINS
from compressor.evals.text import first_tokens, read_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Where a text has too few documents, prompts of one document begin so many prompts apart, so many at most.
_APART, _STRETCHES = 4, 16


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, path: Path, count: int, tokens: int, *, first: int | None = None
) -> list[torch.Tensor]:
    """The first ``tokens`` ids [T] of ``count`` documents, in their order; shorter documents are passed over.

    All are of one length, so that they share batches. Of the shipped texts that serve calibration, only
    those documents that are held out of it (``HELD_OUT_EVERY``). Where there are fewer, further stretches of
    the plain ones follow, from all of them by turns.

    Args:
        tokenizer: of the target.
        path: a plain text, or JSON lines with a ``text`` or with ``messages``, which go through the chat
            template, or stand one after another where the tokenizer has none.
        count: of prompts.
        tokens: of each, ``first`` included.
        first: a token before each plain text.

    Raises:
        UserError: unreadable, or fewer documents that are long enough.
    """
    import torch

    found: list[torch.Tensor] = []
    for stretch in range(_STRETCHES):
        for number, document in enumerate(_documents(path)):
            if _serves_calibration(path) and number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1:
                continue
            ids = _ids(tokenizer, document, tokens, first, stretch * _APART * tokens)
            if len(ids) == tokens:
                found.append(torch.tensor(ids))
            if len(found) == count:
                return found
    raise UserError(
        f"{len(found)} stretches for measuring have {tokens} tokens, fewer than the {count} asked for",
        where=str(path),
        fix="ask for fewer or shorter prompts",
    )


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    document: str | list[Any],
    tokens: int,
    first: int | None,
    skipped: int = 0,
) -> list[int]:
    if isinstance(document, str):
        ahead = [] if first is None else [first]
        return [*ahead, *first_tokens(tokenizer, document, skipped + tokens - len(ahead))[skipped:]]
    if tokenizer.chat_template is None:
        joined = "\n\n".join(str(part["content"]) for part in document)
        return _ids(tokenizer, joined, tokens, first, skipped)
    # A conversation begins at its beginning.
    if skipped:
        return []
    text = tokenizer.apply_chat_template(document, tokenize=False)
    # The template writes the special tokens, a first one among them.
    return first_tokens(tokenizer, str(text), tokens)


def _documents(path: Path) -> Iterator[str | list[Any]]:
    if text_suffix(path) == ".jsonl":
        lines = b"".join(text_chunks(path)).decode("utf-8-sig", errors="replace").split("\n")
        if "messages" in _object(next((line for line in lines if line.strip()), "")):
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _messages(line, path, number)
            return
    for _, text in read_documents(path):
        yield text


def _messages(line: str, path: Path, number: int) -> list[Any]:
    found = _object(line).get("messages")
    if not isinstance(found, list) or not all(isinstance(part, dict) and "content" in part for part in found):
        raise UserError("no list of `messages` with a `content` each", where=f"{path}:{number}")
    return found


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _serves_calibration(path: Path) -> bool:
    return path in {find(SHIPPED_DOMAINS[domain]) for domain in ("chat", "code")}
