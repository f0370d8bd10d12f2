"""Rows of tokens: read back byte by byte, whole, spread out, shared as asked, the same every time.

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, normalizers
from transformers import PreTrainedTokenizerBase

from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.calibration.tokens import load_tokens
from compressor.errors import UserError
from compressor.evals.run import leading_token
from compressor.progress import Silent
from tests.calibration.texts import byte_tokenizer, dataset, with_bos, words
from tests.tiny import BOS_ID, EOS_ID


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Bytes, with a chat template."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _rows(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return load_tokens(spec, tokenizer, Silent()).ids_NT


def _stretches(ids_NT: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts between end-of-text tokens; the last is cut where the rows end."""
    stream = ids_NT.flatten().tolist()
    found: list[list[int]] = [[]]
    for token in stream:
        if token == EOS_ID:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found if ids]


def test_rows_are_the_documents_joined(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """All of a dataset: every stretch stands in its document, none twice, and together they are all."""
    texts = [words("a", 50), words("b", 400), words("c", 3), "é😀\n\n" * 40, words("d", 150)]
    given = dataset(tmp_path / "t.jsonl", texts)
    # Each token is a byte, and a stretch of 4 * 64 characters has its end-of-text token.
    size = sum(len(text.encode()) for text in texts)
    spec = CalibrationSpec((given,), num_samples=size // 64, sequence_length=64)
    ids_NT = _rows(spec, tokenizer)
    assert ids_NT.shape == (size // 64, 64)
    assert ids_NT.dtype == torch.int64
    found = _stretches(ids_NT, tokenizer)
    assert all(any(stretch in text for text in texts) for stretch in found)
    assert all(len(stretch) <= 4 * 64 for stretch in found)
    numbered = [word for stretch in found[:-1] for word in stretch.split() if word[1:].isdigit()]
    assert max(Counter(numbered).values()) == 1, "a stretch came twice"
    everything = {word for text in texts for word in text.split() if word[1:].isdigit()}
    # The last row may leave out what fits into no row, and the end-of-text tokens' room.
    assert len(everything - set(numbered)) < 0.2 * len(everything)


def test_every_document_gives_one_stretch_before_any_gives_two(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A hundred long documents: the first hundred stretches are of a hundred documents."""
    texts = [words(f"d{number}x", 300) for number in range(100)]
    spec = CalibrationSpec((dataset(tmp_path / "t.jsonl", texts),), num_samples=430, sequence_length=64)
    found = _stretches(_rows(spec, tokenizer), tokenizer)[:100]
    assert len(found) == 100
    assert len({next(text[: text.index("x")] for text in texts if stretch in text) for stretch in found}) > 95
    starts = [
        min(text.index(stretch) for text in texts if stretch in text) / len(texts[50]) for stretch in found
    ]
    # Not just beginnings: the stretches' places in their documents are even.
    assert 0.4 < sum(starts) / len(starts) < 0.6


def test_documents_come_from_all_over_the_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tenth of a file of short documents is not its first tenth."""
    texts = [f"d{number:03d}x" * 8 for number in range(500)]
    spec = CalibrationSpec((dataset(tmp_path / "t.jsonl", texts),), num_samples=32, sequence_length=64)
    found = [int(stretch[1:4]) for stretch in _stretches(_rows(spec, tokenizer), tokenizer)]
    assert len(found) > 45
    assert 200 < sum(found) / len(found) < 300


def test_one_long_file_is_taken_from_everywhere(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain text is one document; a tenth of it comes from its beginning, middle and end."""
    path = tmp_path / "long.txt"
    path.write_text(words("w", 20_000), encoding="utf-8")
    spec = CalibrationSpec((DatasetSpec(name="long", path=path),), num_samples=100, sequence_length=128)
    text = path.read_text()
    starts = [text.index(stretch) / len(text) for stretch in _stretches(_rows(spec, tokenizer), tokenizer)]
    thirds = Counter(int(3 * start) for start in starts)
    assert min(thirds[third] for third in range(3)) > len(starts) / 6
    # Cut between words: no stretch but the last begins or ends inside of one.
    known = set(text.split())
    assert all(
        set(stretch.split()) <= known for stretch in _stretches(_rows(spec, tokenizer), tokenizer)[:-1]
    )


def test_the_seed_decides_and_nothing_else(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Same texts and seed: the same rows, wherever the file lies; another seed: others."""
    texts = [words(f"d{number}x", 100) for number in range(30)]
    first = dataset(tmp_path / "a.jsonl", texts)
    second = dataset(tmp_path / "b.jsonl", texts)
    rows = [
        _rows(CalibrationSpec((given,), num_samples=20, sequence_length=50, seed=seed), tokenizer)
        for given, seed in ((first, 0), (first, 0), (second, 0), (first, 1))
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[3])
    # Fewer samples are the first of more.
    fewer = _rows(CalibrationSpec((first,), num_samples=7, sequence_length=50), tokenizer)
    assert torch.equal(fewer, rows[0][:7])


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 0.5), (0.2, 0.7, 0.1), (1e-3, 1, 1)])
def test_every_prefix_has_the_shares(weights: tuple[float, ...]) -> None:
    """To within a row or so, at any length; and all rows by the largest remainders."""
    datasets = tuple(DatasetSpec(name=str(weight), hub="a/b", weight=weight) for weight in weights)
    order = CalibrationSpec(datasets, num_samples=500).order()
    for length in range(1, 501):
        counts = Counter(order[:length])
        for index, weight in enumerate(weights):
            assert abs(counts[index] - length * weight / sum(weights)) < 1.2


def test_counts_and_rows_agree(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The report's tokens by dataset are those in the rows; a dataset without a row is warned of."""
    given = [
        dataset(tmp_path / f"{name}.jsonl", [words(name, 500)] * 3, weight=weight)
        for name, weight in (("a", 2.0), ("b", 1.0), ("c", 0.001))
    ]
    made = load_tokens(CalibrationSpec(tuple(given), 30, 40), tokenizer, Silent())
    assert made.counts == {"a.jsonl": 800, "b.jsonl": 400, "c.jsonl": 0}
    rows = [tokenizer.decode(row) for row in made.ids_NT]
    assert [sum(name in row for row in rows) for name in "abc"] == [20, 10, 0]
    assert made.warnings == ("calibration: c.jsonl gets none of the 30 samples",)


def test_rows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    """A leading token stands at the start of each row, nowhere else, and within its length."""
    tokenizer = with_bos(byte_tokenizer(tmp_path / "tokenizer"))
    tokenizer.chat_template = "<s>" + str(tokenizer.chat_template)
    chat = [[{"role": "user", "content": words("q", 5)}, {"role": "assistant", "content": words("a", 9)}]] * 9
    given = (
        dataset(tmp_path / "t.jsonl", [words("t", 90)] * 3),
        dataset(tmp_path / "c.jsonl", chat),
    )
    ids_NT = _rows(CalibrationSpec(given, num_samples=10, sequence_length=50), tokenizer)
    assert ids_NT.shape == (10, 50)
    assert (ids_NT[:, 0] == BOS_ID).all()
    assert not (ids_NT[:, 1:] == BOS_ID).any()


def test_conversations_pass_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Conversations by default, texts where asked for; `plain` leaves the template out."""
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    expected = {
        (None, "chat"): "user: How?\nassistant: So.\n",
        ("plain", "chat"): "How?\n\nSo.",
        (None, "text"): "How?",
        ("chat", "text"): "user: How?\n",
    }
    for (template, kind), text in expected.items():
        given = dataset(tmp_path / "t.jsonl", [turns if kind == "chat" else "How?"] * 20, template=template)
        made = load_tokens(CalibrationSpec((given,), 2, 40), tokenizer, Silent())
        assert _stretches(made.ids_NT, tokenizer)[0] == text
        assert made.warnings == ()


def test_an_end_of_text_token_is_not_doubled(tmp_path: Path) -> None:
    """Chat templates that end a conversation themselves, and perhaps the line, get no second end."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}"
    given = dataset(tmp_path / "t.jsonl", ["abc"] * 30, template="chat")
    stream = _rows(CalibrationSpec((given,), 4, 20), tokenizer).flatten().tolist()
    assert stream[:10] == [
        *tokenizer.encode("abc"),
        EOS_ID,
        *tokenizer.encode("\nabc"),
        EOS_ID,
        tokenizer.encode("\n")[0],
    ]


def test_no_template_and_a_template_that_refuses_are_warned_of(tmp_path: Path) -> None:
    """The texts are used plain then, and the user hears of it."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    given = dataset(tmp_path / "t.jsonl", [system] * 30)
    heard: list[str] = []

    class Ear(Silent):
        def warn(self, text: str) -> None:
            heard.append(text)

    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    refused = load_tokens(CalibrationSpec((given,), 2, 40), tokenizer, Ear())
    tokenizer.chat_template = None
    without = load_tokens(CalibrationSpec((given,), 2, 40), tokenizer, Ear())
    assert torch.equal(refused.ids_NT, without.ids_NT)
    assert _stretches(without.ids_NT, tokenizer)[0] == "Be brief.\n\nHow?"
    assert "the chat template refuses 30 documents of t.jsonl" in refused.warnings[0]
    assert "no system role" in refused.warnings[0]
    assert "the tokenizer has no chat template: t.jsonl is plain text" in without.warnings[0]
    assert heard == [*refused.warnings, *without.warnings]


def test_conversations_that_are_left_out_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The rows are those of the other documents; where none remains, the error says why."""
    call: list[dict[str, object]] = [{"role": "assistant", "content": None, "tool_calls": []}]
    given = dataset(tmp_path / "t.jsonl", [call, *["abc"] * 20, call])
    made = load_tokens(CalibrationSpec((given,), 4, 20), tokenizer, Silent())
    assert set(_stretches(made.ids_NT, tokenizer)) == {"abc"}
    (warning,) = made.warnings
    assert "2 conversations of t.jsonl are left out" in warning
    with pytest.raises(UserError, match=r"holds 0 tokens; .* \(9 conversations of c\.jsonl are left out"):
        _rows(CalibrationSpec((dataset(tmp_path / "c.jsonl", [call] * 9),), 4, 20), tokenizer)


@pytest.mark.parametrize("begins", [False, True])
def test_a_tokenizer_that_makes_nothing(tmp_path: Path, begins: bool) -> None:
    """Rows of ends alone are refused; so is a tokenizer that makes nothing but its leading token."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    if begins:
        with_bos(tokenizer)
    assert leading_token(tokenizer) == (BOS_ID if begins else None)
    given = dataset(tmp_path / "t.jsonl", ["abc"] * 50)
    with pytest.raises(UserError, match=r"the tokenizer makes no tokens of the texts of t\.jsonl"):
        _rows(CalibrationSpec((given,), 2, 20), tokenizer)


def test_stretches_of_no_tokens_leave_no_ends(tmp_path: Path) -> None:
    """Among others they are nothing."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("x"), "")
    given = dataset(tmp_path / "t.jsonl", ["abc", "xxx"] * 20)
    stream = _rows(CalibrationSpec((given,), 4, 20), tokenizer).flatten().tolist()
    assert stream == [*tokenizer.encode("abc"), EOS_ID] * 20


def test_too_little_text_is_an_error_with_the_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """No row is left out silently, and none is filled up."""
    given = dataset(tmp_path / "t.jsonl", ["abcd" * 5] * 3)
    load_tokens(CalibrationSpec((given,), 3, 21), tokenizer, Silent())
    with pytest.raises(UserError, match=r"t\.jsonl holds 63 tokens; its share of the calibration is 66"):
        load_tokens(CalibrationSpec((given,), 3, 22), tokenizer, Silent())


def test_a_template_that_is_not_there_is_refused_where_asked_for(tmp_path: Path) -> None:
    """At the dataset that asks for it; the default falls back, as above."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = None
    plain = dataset(tmp_path / "p.jsonl", ["abc"] * 90)
    chat = dataset(tmp_path / "c.jsonl", ["abc"] * 90, template="chat")
    with pytest.raises(UserError, match=r"c\.jsonl is to pass through the chat template") as caught:
        load_tokens(CalibrationSpec((plain, chat), 4, 20), tokenizer, Silent())
    assert caught.value.where == "calibration.datasets.1"
    load_tokens(CalibrationSpec((plain, replace(chat, template="plain")), 4, 20), tokenizer, Silent())


def test_too_little_text_is_blamed_on_its_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """By its key, or by the file of the mixture."""
    given = (dataset(tmp_path / "a.jsonl", [words("a", 90)]), dataset(tmp_path / "b.jsonl", ["b"]))
    spec = CalibrationSpec(given, 4, 20)
    for tried, where in (
        (spec, "calibration.datasets.1"),
        (replace(spec, mixture=tmp_path / "m.yaml"), str(tmp_path / "m.yaml")),
    ):
        with pytest.raises(UserError, match=r"b\.jsonl holds 2 tokens") as caught:
            load_tokens(tried, tokenizer, Silent())
        assert caught.value.where == where
