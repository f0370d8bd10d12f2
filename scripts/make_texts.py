"""Writes the texts of ``calibration/`` from a folder of corpora; same corpora, same bytes.

    python scripts/make_texts.py CORPORA_FOLDER [OUTPUT_FOLDER]

CORPORA_FOLDER holds ``sotu``, ``moby_dick``, ``austen``, ``python_doc`` and ``code_stdlib`` as
``NAME.jsonl.xz`` (one ``{"id", "text"}`` a line), and ``piqa.jsonl`` and ``openbookqa.jsonl``. What is taken
and why is told in ``calibration/README.md``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conversations

SOTU_SINCE = 2017
MOBY_CHAPTERS = range(41, 61)
CHAPTERS_PER_ADDRESS = 4
# Of each novel: chapters for prose, evenly spaced, and as many others for conversations.
PROSE_CHAPTERS, CHAT_CHAPTERS = 4, 2
PROSE_PAGES = (
    *(f"tutorial/{page}" for page in ("appetite", "classes", "controlflow", "datastructures", "errors")),
    *(f"tutorial/{page}" for page in ("floatingpoint", "inputoutput", "introduction", "stdlib")),
    *(f"howto/{page}" for page in ("annotations", "argparse", "descriptor", "enum", "functional")),
    *(f"howto/{page}" for page in ("pyporting", "regex", "sockets", "sorting")),
)
REFERENCE_MODULES = (
    *("collections", "contextlib", "functools", "heapq", "itertools", "math", "random", "statistics"),
    *("shutil", "subprocess", "textwrap", "threading", "typing", "urllib.parse", "zipfile"),
)
# Modules of these sizes, but tables, relics and what names a licence of its own.
MODULE_CHARS = range(5_000, 30_000)
NOT_MODULES = re.compile(
    r"/(distutils|lib2to3|turtledemo|ctypes|curses|idlelib)/|_casefix|stringprep|opcode|html/entities"
)
# Folders of somebody's machine, which are nothing to learn from.
MACHINE_PATH = re.compile(r"(?<![\w./])/(home|root|Users|tmp|opt|usr|work)/")
OWN_LICENCE = re.compile(r"permission|redistribut|warrant|licen[cs]e|copyright|\(c\)", re.IGNORECASE)

# Long documents. For measuring: both halves of Moby Dick and the addresses of a president, in order, as one
# document; the first ones fill 131,072 tokens of SmolLM2's tokenizer, the others 32,768. For training and
# searching: Austen's novels, and the longest pages of Python's documentation and modules of its library.
MOBY_WHOLE = "moby-dick/data/data.txt"
LONGEST = ("theodore_roosevelt", "grover_cleveland")
LONG = ("harry_s_truman", "william_j_clinton", "calvin_coolidge", "jimmy_carter", "ulysses_s_grant")
LONG += ("franklin_d_roosevelt", "james_polk", "william_h_taft")
LONGEST_CHARS, LONG_CHARS = 700_000, 185_000
LONG_PAGE_CHARS = 70_000

Document = dict[str, Any]


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


def chapters(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Chapters of every novel by id: those for prose, and those for conversations."""
    prose: dict[str, str] = {}
    chat: dict[str, str] = {}
    for novel, text in read(folder, "austen").items():
        found = re.split(r"(?m)^(?=chapter \w+$)", text, flags=re.IGNORECASE)[1:]
        for into, count, first in ((prose, PROSE_CHAPTERS, 0), (chat, CHAT_CHAPTERS, 1)):
            step = len(found) // count
            for index in range(first, first + step * count, step):
                into[f"{novel}/{index + 1}"] = found[index].strip()
    assert not prose.keys() & chat.keys()
    return prose, chat


def modules(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Modules of the standard library by id: every second one for code, the others for conversations."""
    fit = {
        name: text
        for name, text in read(folder, "code_stdlib").items()
        if len(text) in MODULE_CHARS and not NOT_MODULES.search(name) and not OWN_LICENCE.search(text)
    }
    names = sorted(fit)
    return {name: fit[name] for name in names[::2]}, {name: fit[name] for name in names[1::2]}


def prose(folder: Path) -> Iterator[Document]:
    """Evenly spaced chapters of every novel, then pages of Python documentation."""
    for name, text in chapters(folder)[0].items():
        yield {"id": name, "text": text}
    pages = read(folder, "python_doc")
    for page in PROSE_PAGES:
        name = f"{conversations.DOCS}{page}.rst.txt"
        yield {"id": name, "text": pages[name]}


def code(folder: Path) -> Iterator[Document]:
    """Modules of the Python standard library."""
    for name, text in modules(folder)[0].items():
        yield {"id": name, "text": text}


def chat(folder: Path) -> Iterator[Document]:
    """Conversations of every kind that ``conversations`` makes."""
    pages = read(folder, "python_doc")
    kinds = (
        conversations.questions(pages),
        conversations.definitions(pages),
        conversations.references(pages, REFERENCE_MODULES),
        conversations.functions(modules(folder)[1]),
        conversations.passages(chapters(folder)[1]),
    )
    for kind in kinds:
        for name, messages in kind:
            if all(message["content"] for message in messages):
                yield {"id": name, "messages": messages}


def long_heldout(folder: Path) -> Iterator[Document]:
    """Halves of Moby Dick, then presidents, each with all addresses in the order of years."""
    whole = read(folder, "moby_dick")[MOBY_WHOLE]
    half = whole.index("\n\nCHAPTER ", len(whole) // 2 - 10_000)
    yield {"id": "moby-dick, first half", "text": whole[:half]}
    yield {"id": "moby-dick, second half", "text": whole[half:]}
    sotu = read(folder, "sotu")
    for presidents, chars in ((LONGEST, LONGEST_CHARS), (LONG, LONG_CHARS)):
        for president in presidents:
            own = sorted(name for name in sotu if re.search(rf"/\d{{4}}_{president}_[a-z]+\.txt$", name))
            yield {"id": f"sotu, {president}", "text": "\n\n".join(sotu[name] for name in own)[:chars]}


def long_train(folder: Path) -> Iterator[Document]:
    """Novels, then long pages of documentation and long modules."""
    for novel, text in read(folder, "austen").items():
        yield {"id": novel, "text": text}
    for corpus in ("python_doc", "code_stdlib"):
        for name, text in read(folder, corpus).items():
            if len(text) >= LONG_PAGE_CHARS and not NOT_MODULES.search(name):
                yield {"id": name, "text": text}


def write(path: Path, documents: Iterator[Document]) -> None:
    """One JSON object a line, keys in the order given."""
    kept = (document for document in documents if not MACHINE_PATH.search(json.dumps(document)))
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in kept]
    data = "".join(lines).encode()
    path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)
    print(f"{path}: {len(lines)} documents, {path.stat().st_size} bytes")


def main() -> None:
    """Writes all texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpora", type=Path)
    default = Path(__file__).resolve().parent.parent / "calibration"
    parser.add_argument("output", type=Path, nargs="?", default=default)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    write(given.output / "heldout.jsonl", heldout(given.corpora))
    for made in (prose, code, chat):
        write(given.output / f"{made.__name__}.jsonl", made(given.corpora))
    (given.output / "long").mkdir(exist_ok=True)
    write(given.output / "long" / "heldout.jsonl.xz", long_heldout(given.corpora))
    write(given.output / "long" / "train.jsonl.xz", long_train(given.corpora))
    for task in ("piqa", "openbookqa"):
        (given.output / task).mkdir(exist_ok=True)
        shutil.copyfile(given.corpora / f"{task}.jsonl", given.output / task / f"{task}.jsonl")


if __name__ == "__main__":
    main()
