"""Perplexity, KL and top-1 agreement of a result against its source on one text.

Legend: T tokens of the text or of a window, P scored positions of a window, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from compressor.data import text_chunks, text_suffix
from compressor.errors import CheckpointError, UserError
from compressor.evals.base import TextResult
from compressor.evals.head import LogitsAt, logits_at, plain_head
from compressor.evals.units import Passage
from compressor.evals.windows import Window, check_finite, split_windows, summary
from compressor.model.quiet import quiet
from compressor.model.reach import reach

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

# All float32 [P, V] tensors alive at once: logits and log-probabilities of two models, and their product.
LOGIT_BYTES = 256 * 2**20
LIVE_LOGITS = 5

# Characters that surely hold one token, so that a long text need not be tokenized to its end.
CHARS_PER_TOKEN = 16
_JOINT = "\n\n"


@quiet()
def compare_on_text(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    ids_T: torch.Tensor,
    *,
    context: int,
    progress: Progress,
    first: int | None = None,
    seed: int = 0,
    passage: Passage | None = None,
) -> TextResult:
    """Both models on non-overlapping windows of ``context`` tokens; all but a window's first token scored.

    Args:
        source_model: in evaluation mode, on its device, in the dtype to compute in.
        result_model: the same.
        ids_T: token ids of the text.
        context: tokens of a window, ``first`` included; the last window may be shorter.
        progress: told the tokens done.
        first: a token put before every window, for models trained always to see one (``<bos>``).
        seed: of the intervals.
        passage: where the tokens come from; without it nothing is said of documents.

    Raises:
        UserError: fewer than two tokens in a window, or more than the result's positions.
        CheckpointError: the vocabularies differ, or a model's logits are NaN or infinite.
    """

    _check_pair(source_model, result_model)
    # The result may be made to read further than its source.
    check_context(result_model, context)
    windows = split_windows(ids_T, context, first)
    tokens = sum(map(len, windows)) - len(windows) * (first is not None)
    plain = (plain_head(source_model, ids_T), plain_head(result_model, ids_T))
    done = []
    progress.start("perplexity", len(ids_T), "tokens")
    for number, window_T in enumerate(windows):
        source_at = logits_at(source_model, window_T, plain=plain[0])
        result_at = logits_at(result_model, window_T, plain=plain[1])
        done.append(_compare_window(source_at, result_at, window_T, vocabulary_size(source_model)))
        check_finite(done[-1], number)
        progress.advance(len(window_T) - (first is not None), f"window {number + 1} of {len(windows)}")
    progress.finish()
    return summary(done, tokens=tokens, context=context, seed=seed, passage=passage, first=first is not None)


def _compare_window(source_at: LogitsAt, result_at: LogitsAt, ids_T: torch.Tensor, vocabulary: int) -> Window:
    """One window, in chunks of positions so that the logits stay within ``LOGIT_BYTES``."""
    import torch

    chunk = max(1, LOGIT_BYTES // (LIVE_LOGITS * 4 * vocabulary))
    window = Window()
    with torch.inference_mode():
        for positions_P in torch.split(torch.arange(len(ids_T) - 1), chunk):
            source_PV = source_at(positions_P).log_softmax(-1)
            result_PV = result_at(positions_P).to(source_PV.device).log_softmax(-1)
            window.add(source_PV, result_PV, ids_T[positions_P + 1])
    return window


def _check_pair(source_model: PreTrainedModel, result_model: PreTrainedModel) -> None:
    source_words, result_words = vocabulary_size(source_model), vocabulary_size(result_model)
    if source_words != result_words:
        raise CheckpointError(
            f"the source has {source_words} tokens in its vocabulary and the result {result_words}",
            fix="compare a result with the model that it was made from",
        )


def check_context(model: PreTrainedModel, context: int) -> None:
    """Refuses windows that score nothing or are longer than the model's positions.

    Raises:
        UserError: with both numbers.
    """
    if context < 2:
        raise UserError(f"a window of {context} token(s) scores nothing", fix="use a context of 2 or more")
    longest = reach(model.config.get_text_config().to_dict())
    if longest is not None and context > longest:
        raise UserError(f"a context of {context} tokens is longer than the model's {longest}")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Words that the model gives logits for."""
    return int(model.config.get_text_config().vocab_size)


def tokens_from_text(tokenizer: PreTrainedTokenizerBase, path: Path, tokens: int | None) -> torch.Tensor:
    """Ids [T] of the first ``tokens`` tokens of a text (of all where None), without special tokens.

    A ``.jsonl`` file holds one object with the field ``text`` a line, joined by blank lines; any other file
    is plain text. Either may be packed by xz (``.jsonl.xz``).

    Raises:
        UserError: unreadable, not UTF-8, not such JSON lines, empty, or fewer tokens than asked for.
    """
    import torch

    text = read_text(path)
    if tokens is not None and tokens < 2:
        raise UserError(f"{tokens} token(s) of text cannot be scored", fix="use 2 or more")
    ids = first_tokens(tokenizer, text, tokens)
    wanted = tokens or 2
    if len(ids) < wanted:
        raise UserError(
            f"the text has {len(ids)} tokens, fewer than the {wanted} asked for",
            where=str(path),
            fix="ask for fewer tokens or give a longer text",
        )
    return torch.tensor(ids)


def read_passage(tokenizer: PreTrainedTokenizerBase, path: Path, tokens: int | None) -> Passage:
    """The tokens of ``tokens_from_text``, and which document each begins in; errors as of that.

    Nothing is known of documents where a tokenizer does not say which characters a token is made of.
    """
    import torch

    ids_T = tokens_from_text(tokenizer, path, tokens)
    documents = list(read_labelled(path))
    text = _JOINT.join(text for _, text, _ in documents)
    if tokens is not None:
        text = text[: tokens * CHARS_PER_TOKEN + 1024]
    if not tokenizer.is_fast:
        return Passage(ids_T)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if found["input_ids"][: len(ids_T)] != ids_T.tolist():
        return Passage(ids_T)
    starts = torch.tensor([start for start, _ in found["offset_mapping"][: len(ids_T)]])
    ends, end = [], 0
    for _, document, _ in documents:
        end += len(document) + len(_JOINT)
        ends.append(end)
    # What joins two documents belongs to the first.
    document_T = torch.bucketize(starts, torch.tensor(ends), right=True)
    read = documents[: int(document_T[-1]) + 1]
    return Passage(ids_T, tuple(name for name, _, _ in read), tuple(of for _, _, of in read), document_T)


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None) -> list[int]:
    """Ids of the first ``tokens`` tokens of a text, or of all that it has; without special tokens."""
    if tokens is not None:
        # The spare keeps the end of the cut text, where tokens may differ, out of what is used.
        head = text[: tokens * CHARS_PER_TOKEN + 1024]
        ids: list[int] = tokenizer.encode(head, add_special_tokens=False, verbose=False)
        if len(ids) >= tokens + 64 or len(head) == len(text):
            return ids[:tokens]
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids[:tokens]


def read_text(path: Path) -> str:
    """The whole text of a plain or ``.jsonl`` file, packed by xz or not; errors as ``tokens_from_text``."""
    text = _JOINT.join(document for _, document in read_documents(path))
    if not text.strip():
        raise UserError("the text is empty", where=str(path))
    return text


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """The documents of a ``.jsonl`` file, or one plain text: each with its ``id``, or else its line or file.

    Raises:
        UserError: unreadable, not UTF-8, or not such JSON lines.
    """
    return ((name, text) for name, text, _ in read_labelled(path))


def read_labelled(path: Path) -> Iterator[tuple[str, str, str]]:
    """The same with each document's domain: its field ``domain``, else its id up to a slash, else the file.

    Raises:
        UserError: as ``read_documents``.
    """
    try:
        raw = b"".join(text_chunks(path))
    except OSError as error:
        raise UserError(f"the text cannot be read: {error.strerror}", where=str(path)) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}", where=str(path)
        ) from error
    if text_suffix(path) != ".jsonl":
        yield path.name, text, path.name
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _document(line, path, number)


def _document(line: str, path: Path, number: int) -> tuple[str, str, str]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=f"{path}:{number}") from error
    if not isinstance(document, dict) or not is_unicode(document.get("text")):
        raise UserError("no field `text` with a string", where=f"{path}:{number}")
    name, domain = document.get("id"), document.get("domain")
    if not (is_unicode(name) and name):
        name = f"line {number}"
    if not (is_unicode(domain) and domain):
        domain = name.partition("/")[0] if "/" in name else path.name
    return name, document["text"], domain


def is_unicode(text: object) -> TypeGuard[str]:
    r"""Whether it is a whole string: JSON's ``\ud800`` is half a character, which no tokenizer takes."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False
