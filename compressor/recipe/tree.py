"""YAML text -> a tree whose every key and value knows its place in the file.

Built from PyYAML's event stream rather than its composer, so that limits hold before memory is spent: no
anchors or aliases, no tags, at most ``MAX_NODES`` nodes and ``MAX_DEPTH`` levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from compressor.errors import RecipeError
from compressor.recipe.scalars import Scalar, looks_secret, resolve_plain, substitute

if TYPE_CHECKING:
    from yaml._yaml import Mark as CMark

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 24


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar; ``where`` is ``file:line:column`` or the override that set it."""

    value: Scalar
    where: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Entry:
    """The value of a key; ``where`` is the key's own place."""

    node: Node
    where: str


@dataclass(frozen=True, slots=True)
class Fields:
    """A map."""

    entries: Mapping[str, Entry]
    where: str


Node = Leaf | Items | Fields
Locate = Callable[[int, int], str]
"""Line and column, from 0 -> the place as it is printed."""


def parse_yaml(text: str, locate: Locate, faults: list[RecipeError]) -> Node:
    """The tree of one YAML document.

    Faults that leave a tree (a duplicate key, an unset variable, a secret, a tag) are appended to
    ``faults``; the value concerned is dropped or None.

    Raises:
        RecipeError: the text is no YAML, or crosses a limit.
    """
    return _Builder(text, locate, faults).document()


class _Builder:
    def __init__(self, text: str, locate: Locate, faults: list[RecipeError]) -> None:
        self._locate = locate
        self._faults = faults
        self._nodes = 0
        self._events = self._pull(text)

    def _pull(self, text: str) -> Iterator[yaml.Event]:
        """PyYAML's events; everything it raises becomes a RecipeError with its place."""
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            where = self._place(error.problem_mark)
            aliased = "alias" in (error.context or "")
            fix = "put text that begins with * or & in quotes" if aliased else ""
            raise RecipeError(
                f"not valid YAML: {error.problem or error.context}", where=where, fix=fix
            ) from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            column = len(before) - (before.rfind("\n") + 1)
            where = self._locate(before.count("\n"), column)
            raise RecipeError(f"not valid YAML: character U+{error.character:04X}", where=where) from None
        except (ValueError, OverflowError) as error:  # PyYAML's chr() and int() of hostile escapes
            raise RecipeError(f"not valid YAML: {error}", where=self._locate(0, 0)) from None

    def document(self) -> Node:
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return Leaf(None, self._locate(0, 0))
        root = self._node(next(self._events), depth=0)
        next(self._events)  # document end
        rest = next(self._events)
        if not isinstance(rest, yaml.StreamEndEvent):
            raise RecipeError("only one YAML document is allowed", where=self._where(rest))
        return root

    def _place(self, mark: yaml.Mark | CMark | None) -> str:
        return self._locate(mark.line, mark.column) if mark is not None else self._locate(0, 0)

    def _where(self, event: yaml.Event) -> str:
        return self._place(event.start_mark)

    def _fault(self, what: str, event: yaml.Event, fix: str = "") -> None:
        self._faults.append(RecipeError(what, where=self._where(event), fix=fix))

    def _node(self, event: yaml.Event, depth: int) -> Node:
        where = self._checked(event, depth)
        if isinstance(event, yaml.ScalarEvent):
            return self._leaf(event, where)
        if isinstance(event, yaml.SequenceStartEvent):
            return Items(tuple(self._items(depth)), where)
        assert isinstance(event, yaml.MappingStartEvent)
        return self._fields(where, depth)

    def _checked(self, event: yaml.Event, depth: int) -> str:
        """The place of a key or value that begins with ``event``, which must respect the limits."""
        where = self._where(event)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise RecipeError(f"the file has more than {MAX_NODES} values", where=where)
        if depth > MAX_DEPTH:
            raise RecipeError(f"values are nested deeper than {MAX_DEPTH} levels", where=where)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise RecipeError(
                "YAML anchors and aliases are not allowed",
                where=where,
                fix="use `extends` to share settings; put text that begins with * or & in quotes",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._fault(f"YAML tags are not allowed: {tag}", event, "remove it; quotes make text")
        return where

    def _leaf(self, event: yaml.ScalarEvent, where: str) -> Leaf:
        try:
            text = substitute(event.value)
        except ValueError as error:
            self._fault(str(error), event)
            return Leaf(None, where)
        if not _printable(text):
            self._fault("text holds a control character or half of a surrogate pair", event)
            return Leaf(None, where)
        return Leaf(resolve_plain(text) if event.style is None else text, where)

    def _items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            yield self._node(event, depth + 1)

    def _fields(self, where: str, depth: int) -> Fields:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, depth)
            node = self._node(next(self._events), depth + 1)
            twin = key.removeprefix("+") if key.startswith("+") else f"+{key}"
            if looks_secret(key):
                self._fault(
                    f"key {key!r} looks like a secret",
                    event,
                    "remove it: secrets come from the environment (HF_TOKEN), never from a recipe",
                )
            elif key in entries:
                self._fault(f"key {key!r} is here twice; first at {entries[key].where}", event)
            elif twin in entries:
                self._fault(f"{key!r} and {twin!r} cannot stand together: one appends, one replaces", event)
            else:
                entries[key] = Entry(node, self._where(event))
        return Fields(entries, where)

    def _key(self, event: yaml.Event, depth: int) -> str:
        where = self._checked(event, depth + 1)
        if not isinstance(event, yaml.ScalarEvent):
            raise RecipeError("a key must be plain text", where=where)
        if not _printable(event.value):
            raise RecipeError("a key holds a control character", where=where)
        return str(event.value)


def _printable(text: str) -> bool:
    """No control characters but tab and line feed, and nothing that UTF-8 cannot encode."""
    return not any(
        (char < " " and char not in "\t\n") or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in text
    )
