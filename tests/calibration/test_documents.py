"""Documents of files and of the Hub: the field, the line that is wrong, and what strangers may send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from compressor.calibration.documents import open_documents
from compressor.calibration.spec import DatasetSpec
from compressor.errors import UserError
from tests.calibration.texts import dataset

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _read(given: DatasetSpec, tokens: int = 1) -> list[Any]:
    documents = open_documents(given, tokens, 0)
    return [documents[index] for index in range(len(documents))]


def test_text_else_messages_else_the_field_asked_for(tmp_path: Path) -> None:
    """Other keys of a message are left out: templates give them a meaning."""
    rows = [
        {"id": 1, "text": "a"},
        {"messages": [{**turn, "tool_calls": []} for turn in TURNS]},
        {"text": "é", "messages": TURNS},
    ]
    assert _read(dataset(tmp_path / "t.jsonl", rows)) == ["a", TURNS, "é"]
    assert _read(dataset(tmp_path / "t.jsonl", [{"body": "x", "text": 3}], field="body")) == ["x"]


def test_conversations_that_are_not_all_text_are_none(tmp_path: Path) -> None:
    """Tool calls without a content, or with null; parts of which some may be images."""
    calls = [{"type": "function"}]
    turns: list[dict[str, object]] = [
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": calls},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    rows: list[Any] = [[TURNS[0], turn] for turn in turns]
    assert _read(dataset(tmp_path / "t.jsonl", [*rows, TURNS])) == [None, None, None, TURNS]


@pytest.mark.parametrize("name", ["t.JSONL", "t.ndjson", "t.NDJson"])
def test_json_lines_by_any_name(tmp_path: Path, name: str) -> None:
    """Their syntax is nothing to calibrate on."""
    assert _read(dataset(tmp_path / name, ["a", "b"])) == ["a", "b"]


def test_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    """Editors and other systems leave them."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert _read(DatasetSpec(name="t", path=path)) == ["a", "b"]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    """Whatever it looks like: the suffix decides."""
    path = tmp_path / "t.txt"
    path.write_text('{"text": 1}\nb')
    assert _read(DatasetSpec(name="t", path=path)) == ['{"text": 1}\nb']


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b"[]", "not an object"),
        (b'{"title": "a"}', "'messages' holds no text and no list of messages"),
        (b'{"text": 3}', "'text' holds no text"),
        (b'{"text": []}', "'text' holds no text"),
        (b'{"text": "\\ud800"}', "'text' holds no text"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "'messages' holds no text"),
        (b'{"messages": [{"role": "user", "text": "a"}]}', "'messages' holds no text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "'messages' holds no text"),
        (b'{"messages": [{"from": "human", "value": "a"}]}', "'messages' holds no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    """By its number in the file, blank lines counted."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        _read(DatasetSpec(name="t", path=path))
    assert caught.value.where == f"{path}:3"


def test_advice_names_other_fields_only(tmp_path: Path) -> None:
    """The field just refused is no advice; without others, what the line must hold is."""
    bad = {"messages": [{"role": "user"}]}
    for row, fix in (
        (bad, "give it a text, or messages with a `role` and a `content` each"),
        (bad | {"body": "a"}, "set the dataset's `field`; there are body"),
    ):
        with pytest.raises(UserError, match="'messages' holds no text") as caught:
            _read(dataset(tmp_path / "t.jsonl", [row]))
        assert caught.value.fix == fix


HUB = DatasetSpec(name="a/b", hub="a/b", revision="0" * 40, split="train", subset="en", field="body")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Puts rows, or an error, in the place of the Hub; gives the calls."""
    calls: list[tuple[Any, ...]] = []

    def serve(rows: Any) -> list[tuple[Any, ...]]:
        def load(*args: Any, **kwargs: Any) -> Any:
            calls.append((*args, kwargs))
            if isinstance(rows, Exception):
                raise rows
            return datasets.Dataset.from_list(rows).to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return serve


def test_the_hub_is_streamed_until_there_is_enough(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """The commit, the split and the subset asked for; shuffled; no more rows than needed."""
    calls = hub([{"body": f"{number:03d}" * 8} for number in range(500)])
    found = _read(HUB, tokens=30)
    expected = {"split": "train", "revision": "0" * 40, "streaming": True}
    assert calls == [("a/b", "en", expected)]
    # 16 characters surely hold a token.
    assert len(found) == 20
    assert len(set(found)) == 20
    assert found != sorted(found)
    assert found == _read(HUB, tokens=30)
    assert _read(HUB, tokens=10**9)
    other = open_documents(HUB, 30, 1)
    assert list(other) != found


def test_rows_of_the_hub_that_are_not_all_text(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """They count for nothing."""
    hub([{"body": [{"role": "user", "content": None}]}] * 3 + [{"body": TURNS}] * 2)
    found = _read(HUB, tokens=10**9)
    assert found.count(None) == 3
    assert found.count(TURNS) == 2


def test_few_rows_of_the_hub_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may be books."""
    drawn = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(5000):
            drawn.append(number)
            yield {"body": "a" * 16}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert len(_read(HUB, tokens=20)) == 20
    assert len(drawn) < 300


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Bad split"), RuntimeError()])
def test_a_hub_that_does_not_answer(hub: Callable[[Any], list[tuple[Any, ...]]], error: Exception) -> None:
    """One sentence, with the reason and what to do."""
    hub(error)
    with pytest.raises(UserError, match="cannot be read from the Hub") as caught:
        _read(HUB)
    assert str(error) in str(caught.value)
    assert "`path`" in caught.value.fix


def test_rows_of_the_hub_without_the_field(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    """The fields that are there are named."""
    hub([{"text": "a"}])
    with pytest.raises(UserError, match=r"'body' holds no text.*\n.*there are text"):
        _read(HUB)


def test_a_local_folder_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would load it; what is local is read by us, from `path`."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a/b is a local folder"):
        _read(HUB)


def test_documents_that_are_held_out(tmp_path: Path) -> None:
    """The last of so many is left out, and the dataset is another one to every key."""
    whole = dataset(tmp_path / "t.jsonl", [str(number) for number in range(10)])
    some = replace(whole, held_out_every=4)
    assert _read(some) == [str(number) for number in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert "held_out_every" not in whole.content
    assert some.content == {**whole.content, "held_out_every": 4}
