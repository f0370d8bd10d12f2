"""Conversations made of public-domain and PSF-licensed texts, for ``make_texts.py``.

Nobody spoke them: questions come from headings and docstrings, answers are what stands below. They have the
shape of chat (turns, Markdown, code) and no model's words.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping

Messages = list[dict[str, str]]

DOCS = "doc/python3.11/html/_sources/"
ANSWER_CHARS = 3000
# Passages of a novel: a prompt of one paragraph or more, and what follows.
PROMPT_CHARS, PASSAGE_CHARS, PASSAGE_EVERY = 300, 2400, 4500
FUNCTION_CHARS = range(250, 2500)


def turns(*texts: str) -> Messages:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def questions(pages: Mapping[str, str]) -> Iterator[tuple[str, Messages]]:
    """Python's FAQ: two questions of a page make one conversation."""
    for page in sorted(name for name in pages if name.startswith(f"{DOCS}faq/")):
        parts = re.split(r"(?m)^(\S.*\?)\n-{4,}$", pages[page])[1:]
        pairs = [
            (re.sub(r"\s+", " ", markdown(question)), answer)
            for question, body in zip(parts[::2], parts[1::2], strict=True)
            if (answer := markdown(re.split(r"(?m)^\S.*\n={4,}$", body)[0]))
        ]
        for start in range(0, len(pairs), 2):
            asked = [text for pair in pairs[start : start + 2] for text in pair]
            yield f"{page}/{start + 1}", turns(*asked)


def definitions(pages: Mapping[str, str]) -> Iterator[tuple[str, Messages]]:
    """Python's glossary: three terms make one conversation."""
    body = pages[f"{DOCS}glossary.rst.txt"].partition(".. glossary::")[2]
    parts = re.split(r"(?m)^   (\S.*)$", body)[1:]
    terms = [
        (f'What does "{markdown(term)}" mean in Python?', markdown(textwrap.dedent(text.strip("\n"))))
        for term, text in zip(parts[::2], parts[1::2], strict=True)
        if text.strip() and not term.startswith("..")
    ]
    for start in range(0, len(terms), 3):
        yield f"glossary/{start + 1}", turns(*(text for pair in terms[start : start + 3] for text in pair))


def references(pages: Mapping[str, str], modules: tuple[str, ...]) -> Iterator[tuple[str, Messages]]:
    """Functions and classes of the library reference, each asked for by its signature."""
    entry = re.compile(r"(?m)^\.\. (?:function|class|decorator|exception):: (.+)\n((?:\n|   .*\n)+)")
    for module in modules:
        for number, found in enumerate(entry.finditer(pages[f"{DOCS}library/{module}.rst.txt"])):
            answer = markdown(textwrap.dedent(found[2].replace("   :noindex:", "").strip("\n")))
            if len(answer) > 200:
                question = f"What does `{module}.{found[1].removeprefix(module + '.')}` do in Python?"
                yield f"library/{module}/{number + 1}", turns(question, answer)


def functions(sources: Mapping[str, str]) -> Iterator[tuple[str, Messages]]:
    """Functions of the standard library, each asked for by its signature and docstring."""
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not (told := (ast.get_docstring(node) or "").strip()):
                continue
            code = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
            if len(code) in FUNCTION_CHARS and len(told) < len(code) / 2:
                asked = f"Write the Python function `{node.name}({ast.unparse(node.args)})`.\n\n{told}"
                yield f"{name}/{node.name}/{node.lineno}", turns(asked, f"```python\n{code}\n```")


def passages(chapters: Mapping[str, str]) -> Iterator[tuple[str, Messages]]:
    """Passages of novels: the beginning is given, the answer goes on."""
    for name, text in chapters.items():
        for start in range(0, len(text) - PASSAGE_EVERY // 2, PASSAGE_EVERY):
            paragraphs = [" ".join(part.split()) for part in text[start:].split("\n\n")[1:]]
            prompt = _until(paragraphs, PROMPT_CHARS)
            answer = _until(paragraphs[len(prompt) :], PASSAGE_CHARS)
            if answer:
                asked = "Continue this passage in the same voice:\n\n" + "\n\n".join(prompt)
                yield f"{name}/{start}", turns(asked, "\n\n".join(answer))


def _until(paragraphs: list[str], characters: int) -> list[str]:
    taken: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, taken)) >= characters:
            break
        taken.append(paragraph)
    return taken


def markdown(text: str) -> str:
    """reStructuredText of the Python documentation as Markdown, as far as chat needs it; "" if too long."""
    text = re.sub(
        r"(?m)^( *)\.\. (?:code-block|productionlist|doctest|testcode|parsed-literal)::.*$", r"\1::", text
    )
    text = re.sub(r"(?m)^ *\.\. (?:versionadded|versionchanged|deprecated)::.*\n(?: {3,}\S.*\n)*", "", text)
    text = re.sub(r"(?m)^ *\.\. (?!note|warning|seealso).*\n?", "", text)
    text = re.sub(r"(?m)^ *\.\. (note|warning|seealso)::", lambda found: f"{found[1].title()}:", text)
    text = re.sub(r":pep:`(\d+)`", r"PEP \1", text)
    text = re.sub(r":[a-z:+-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s+<(https?://[^`>]*)>`__?", r"[\1](\2)", text)
    text = text.replace("``", "`")
    text = _fenced(text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return text if len(text) <= ANSWER_CHARS else ""


def _fenced(text: str) -> str:
    """Indented blocks behind ``::`` become fenced code."""
    lines, out = text.split("\n"), []
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if not line.rstrip().endswith("::"):
            out.append(line)
            continue
        margin = len(line) - len(line.lstrip())
        block = []
        while index < len(lines) and (
            not lines[index].strip() or len(lines[index]) - len(lines[index].lstrip()) > margin
        ):
            block.append(lines[index])
            index += 1
        lead = line.rstrip().removesuffix("::").rstrip()
        out += [f"{lead}:", ""] if lead else []
        code = textwrap.dedent("\n".join(block)).strip("\n")
        out += ["```python", code, "```", ""] if code else []
    return "\n".join(out)
