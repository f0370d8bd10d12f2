"""What the plan refuses of calibration texts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from compressor import data
from compressor.calibration.check import check_calibration, text_sha256
from compressor.calibration.documents import open_documents
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.errors import UserError
from tests.calibration.texts import dataset, words


@pytest.fixture
def spec(tmp_path: Path) -> CalibrationSpec:
    """One dataset with enough in it."""
    return CalibrationSpec((dataset(tmp_path / "t.jsonl", [words("a", 900)]),), 4, 64)


def test_nothing_is_wrong_with_what_is_right(spec: CalibrationSpec, tmp_path: Path) -> None:
    """Enough text, another than the evaluation's, rows as long as the model allows."""
    other = tmp_path / "other.txt"
    other.write_text("other")
    assert check_calibration(spec, {"the evaluation text": other}, 64) == []
    assert check_calibration(spec, {}, None) == []


def test_the_evaluation_text_is_refused(spec: CalibrationSpec, tmp_path: Path) -> None:
    """The file itself, a link to it, and a copy of it."""
    path = spec.datasets[0].path
    assert path is not None
    copy, link = tmp_path / "copy.txt", tmp_path / "link.txt"
    copy.write_bytes(path.read_bytes())
    link.symlink_to(path)
    for text in (path, copy, link):
        (fault,) = check_calibration(spec, {"the evaluation text": text}, None)
        assert "t.jsonl is the evaluation text" in fault.what
        assert fault.where == "calibration.datasets.0"


def test_rows_longer_than_the_model_are_refused(spec: CalibrationSpec) -> None:
    """At the key to change."""
    (fault,) = check_calibration(spec, {}, 63)
    assert fault.where == "calibration.sequence_length"
    assert "64 tokens are longer than the model's context of 63" in fault.what


def test_far_too_little_text_is_seen_without_a_tokenizer(spec: CalibrationSpec) -> None:
    """Blamed on the mixture's file where the recipe lists no datasets."""
    (fault,) = check_calibration(replace(spec, num_samples=1000, mixture=Path("m.yaml")), {}, None)
    assert "its share of the calibration is 64,000 tokens" in fault.what
    assert fault.where == "m.yaml"


def test_a_hundred_million_rows_are_refused_at_once(
    spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the files' sizes: nobody waits until every row has been given to a dataset."""

    def order(_: CalibrationSpec) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(CalibrationSpec, "order", order)
    (fault,) = check_calibration(replace(spec, num_samples=10**8), {}, None)
    assert "its share of the calibration is 6,400,000,000 tokens" in fault.what


def test_a_dataset_too_light_for_a_row_needs_no_text(spec: CalibrationSpec, tmp_path: Path) -> None:
    """A third of two rows is none."""
    small = (dataset(tmp_path / "s.jsonl", ["a"]), dataset(tmp_path / "u.jsonl", ["a"]))
    spec = CalibrationSpec((*spec.datasets, *small), 2, 64)
    assert check_calibration(spec, {}, None) == []
    faults = check_calibration(replace(spec, num_samples=3), {}, None)
    assert [fault.where for fault in faults] == ["calibration.datasets.1", "calibration.datasets.2"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_text_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The hash of any UTF-8 text; the byte at which another file is none, wherever chunks end."""
    monkeypatch.setattr(data, "_CHUNK_BYTES", chunk)
    path = tmp_path / "t"
    path.write_text("aé😀b" * 9, encoding="utf-8")
    assert text_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for raw, byte in ((b"a\xc3\xa9\xff", 3), (b"ab\xf0\x9f\x98", 2), (b"\xc3\xa9\xf0\x9fa", 2)):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {byte}\)"):
            text_sha256(path)


def test_files_that_are_no_texts(tmp_path: Path) -> None:
    """Empty, a folder, missing: each says so."""
    (tmp_path / "empty").touch()
    for name, message in (("empty", "is empty"), (".", "is not a file"), ("none", "is not a file")):
        with pytest.raises(UserError, match=message):
            text_sha256(tmp_path / name)


@pytest.mark.parametrize(
    "name, fix",
    [
        ("t.json", ".jsonl"),
        ("t.CSV", ".jsonl"),
        ("t.parquet", ".jsonl"),
        ("t.jsonl.gz", "unpack"),
        ("t.json.XZ", ".jsonl"),
    ],
)
def test_formats_that_are_not_read(tmp_path: Path, name: str, fix: str) -> None:
    """A table's syntax is no text to calibrate on, although it is UTF-8."""
    (tmp_path / name).write_text('[{"text": "a"}]')
    with pytest.raises(UserError, match="does not read") as caught:
        text_sha256(tmp_path / name)
    assert fix in caught.value.fix
    with pytest.raises(UserError, match="does not read"):
        open_documents(DatasetSpec(name="t", path=tmp_path / name), 1, 0)


def test_content_is_of_the_texts_and_not_of_their_place(tmp_path: Path) -> None:
    """For stage keys: a file that moved is the same, every setting that changes rows is in it."""
    first, second = (dataset(tmp_path / f"{name}.jsonl", ["a"]) for name in "ab")
    spec = CalibrationSpec((first,))
    assert spec.content == CalibrationSpec((second,), mixture=tmp_path).content
    changed = [
        replace(spec, num_samples=1),
        replace(spec, sequence_length=2),
        replace(spec, seed=1),
        replace(spec, datasets=(first, second)),
        *(
            replace(spec, datasets=(replace(first, **{key: value}),))
            for key, value in (
                ("sha256", "0"), ("weight", 2.0), ("template", "chat"), ("field", "x"), ("hub", "a/b"),
                ("subset", "s"), ("revision", "r"), ("split", "s"),
            )
        ),
    ]  # fmt: skip
    contents = [repr(one.content) for one in (spec, *changed)]
    assert len(set(contents)) == len(contents)
