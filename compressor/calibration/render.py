"""Documents -> text: conversations and chat-formatted datasets through the tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.calibration.documents import Document, Row
from compressor.calibration.spec import DatasetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Turns the documents of one dataset into text, and remembers what it could not do as asked."""

    def __init__(self, dataset: DatasetSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer
        self._has_template = tokenizer.chat_template is not None
        self._refused: dict[int, str] = {}
        self._without = False
        self._skipped: set[int] = set()

    def text(self, index: int, document: Row) -> str:
        """The document's text, with the template's special tokens where it has passed through one.

        That of a row which is left out is "".
        """
        if document is None:
            self._skipped.add(index)
            return ""
        is_chat = self._dataset.template == "chat"
        if self._dataset.template is None:
            is_chat = not isinstance(document, str)
        if not is_chat:
            return _plain(document)
        if not self._has_template:
            self._without = True
            return _plain(document)
        messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            self._refused[index] = str(error) or type(error).__name__
            return _plain(document)

    @property
    def warnings(self) -> list[str]:
        """What was left out, or read as plain text although it was to be chat-formatted."""
        found = []
        if self._skipped:
            found.append(
                f"calibration: {len(self._skipped)} conversations of {self._dataset.name} are left out: "
                "they hold messages without a text (tool calls, images)"
            )
        if self._without:
            found.append(
                f"calibration: the tokenizer has no chat template: {self._dataset.name} is plain text"
            )
        if self._refused:
            reason = next(iter(self._refused.values()))[:200]
            found.append(
                f"calibration: the chat template refuses {len(self._refused)} documents of "
                f"{self._dataset.name}, which are plain text: {reason}"
            )
        return found


def _plain(document: Document) -> str:
    if isinstance(document, str):
        return document
    return "\n\n".join(message["content"] for message in document)
