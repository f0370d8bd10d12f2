"""Datasets of a few documents, and a tokenizer whose ids are bytes, so that rows can be read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.calibration.check import text_sha256
from compressor.calibration.spec import DatasetSpec
from tests.tiny import write_byte_tokenizer


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Ids 0 to 253 are the tokenizer's bytes, 255 ends a text; nothing is put before one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, putting ``<s>`` before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def dataset(path: Path, documents: list[Any], **given: Any) -> DatasetSpec:
    """``documents`` written as JSON lines: texts as ``text``, conversations as ``messages``, maps as such."""
    lines = []
    for document in documents:
        key = "text" if isinstance(document, str) else "messages"
        lines.append(json.dumps(document if isinstance(document, dict) else {key: document}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DatasetSpec(name=path.name, path=path, sha256=text_sha256(path), **given)


def words(name: str, count: int) -> str:
    """Text in which every word is another one and names its document."""
    return " ".join(f"{name}{number}" for number in range(count))
