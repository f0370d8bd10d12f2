"""Writes the texts of ``calibration/`` from a folder of corpora; same corpora, same bytes.

    python scripts/make_texts.py CORPORA_FOLDER [OUTPUT_FOLDER]

CORPORA_FOLDER holds ``sotu``, ``moby_dick``, ``austen`` and ``python_doc`` as ``NAME.jsonl.xz`` (one
``{"id", "text"}`` a line) and ``piqa.jsonl``. What is taken and why is told in ``calibration/README.md``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

SOTU_SINCE = 2017
MOBY_CHAPTERS = range(41, 61)
CHAPTERS_PER_ADDRESS = 4
AUSTEN_CHAPTERS_PER_NOVEL = 4
PYTHON_DOCS = ("howto/functional", "howto/sorting", "tutorial/controlflow")

Document = dict[str, str]


def read(folder: Path, corpus: str) -> dict[str, str]:
    """Text by document id, in the corpus's order."""
    with lzma.open(folder / f"{corpus}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return {document["id"]: document["text"] for document in map(json.loads, lines)}


def heldout(folder: Path) -> Iterator[Document]:
    """One address, then four chapters, by turns: so that every prefix of the file holds both kinds."""
    sotu = read(folder, "sotu")
    moby = read(folder, "moby_dick")
    addresses = sorted(name for name in sotu if int(Path(name).name[:4]) >= SOTU_SINCE)
    chapters = [f"moby-dick/data/chapter_{number}.txt" for number in MOBY_CHAPTERS]
    assert len(chapters) == CHAPTERS_PER_ADDRESS * len(addresses)
    for turn, address in enumerate(addresses):
        yield {"id": address, "text": sotu[address]}
        for chapter in chapters[turn * CHAPTERS_PER_ADDRESS :][:CHAPTERS_PER_ADDRESS]:
            yield {"id": chapter, "text": moby[chapter]}


def calibration(folder: Path) -> Iterator[Document]:
    """Evenly spaced chapters of every novel, then three pages of Python documentation."""
    for novel, text in read(folder, "austen").items():
        chapters = re.split(r"(?m)^(?=chapter \w+$)", text, flags=re.IGNORECASE)[1:]
        step = len(chapters) // AUSTEN_CHAPTERS_PER_NOVEL
        for index in range(0, step * AUSTEN_CHAPTERS_PER_NOVEL, step):
            yield {"id": f"{novel}/{index + 1}", "text": chapters[index].strip()}
    pages = read(folder, "python_doc")
    for page in PYTHON_DOCS:
        name = f"doc/python3.11/html/_sources/{page}.rst.txt"
        yield {"id": name, "text": pages[name]}


def write(path: Path, documents: Iterator[Document]) -> None:
    """One JSON object a line, keys in the order given."""
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} documents, {path.stat().st_size} bytes")


def main() -> None:
    """Writes the three texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpora", type=Path)
    default = Path(__file__).resolve().parent.parent / "calibration"
    parser.add_argument("output", type=Path, nargs="?", default=default)
    given = parser.parse_args()
    (given.output / "piqa").mkdir(parents=True, exist_ok=True)
    write(given.output / "heldout.jsonl", heldout(given.corpora))
    write(given.output / "calibration.jsonl", calibration(given.corpora))
    shutil.copyfile(given.corpora / "piqa.jsonl", given.output / "piqa" / "piqa.jsonl")


if __name__ == "__main__":
    main()
