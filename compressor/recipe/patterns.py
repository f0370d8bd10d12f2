"""Patterns over checkpoint names: globs, and regular expressions after ``re:`` as in compressed-tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from importlib import import_module
from typing import Any

MAX_LENGTH = 512
MAX_LONG_REPEATS = 6
MAX_CHOICES = 16


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A test of one checkpoint name; callers try a tensor's full name and its module name (no ``.weight``).

    Without prefix the pattern is a case-sensitive glob over the whole name, in which ``*`` also crosses dots;
    after ``re:`` it is a regular expression that must match from the start of the name but need not reach
    its end (``re.match``, as compressed-tensors 0.19 does in ``utils/match.py``).

    Raises:
        ValueError: the pattern is empty, too long, no regular expression, or one whose matching could take
            exponential time (see ``_refuse_costly``).
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"pattern of {len(pattern)} characters; at most {MAX_LENGTH} are allowed")
    is_regex = pattern.startswith("re:")
    body = pattern[3:] if is_regex else pattern
    if not body:
        raise ValueError("a pattern must not be empty")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what Python only warns of ("possible nested set") is a fault here
        try:
            matches = re.compile(body if is_regex else translate(body)).match
            if is_regex:
                _refuse_costly(body)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise ValueError(f"invalid regular expression {body!r}: {error}") from None
    return lambda name: matches(name) is not None


def _refuse_costly(regex: str) -> None:
    """Refuses what makes a backtracking matcher slow: a cheap guard, not a proof.

    Inside a repeated group nothing may match in more than one way (no further quantifier of variable
    length, no alternation: ``(a+)+``, ``(a|ab)*``). In a row, at most ``MAX_LONG_REPEATS`` quantifiers such
    as ``.*`` and at most ``MAX_CHOICES`` quantifiers and alternations in all.
    """
    # the parser that `re` itself uses; it has no public name (CPython 3.11, Lib/re/_parser.py)
    parsed = import_module("re._parser").parse(regex)
    choices = list(_choices(parsed, repeated=False))
    if any(repeated for repeated, _ in choices):
        raise ValueError(
            f"regular expression {regex!r} has a quantifier or alternation inside a repeated group, "
            "which can take exponential time; write it without the outer repeat"
        )
    if sum(is_long for _, is_long in choices) > MAX_LONG_REPEATS or len(choices) > MAX_CHOICES:
        raise ValueError(
            f"regular expression {regex!r} has more than {MAX_LONG_REPEATS} quantifiers like '*' or more "
            f"than {MAX_CHOICES} choices in all; split it into several patterns"
        )


def _choices(nodes: Iterable[tuple[Any, Any]], *, repeated: bool) -> Iterator[tuple[bool, bool]]:
    """(lies in a repeated group, may match many lengths) for each point where a matcher can backtrack."""
    for operation, argument in nodes:
        inner = repeated
        if str(operation).endswith("_REPEAT"):
            least, most, _ = argument
            if least != most:
                yield repeated, most > 1
            inner = repeated or most > 1
        elif str(operation) == "BRANCH":
            yield repeated, False
        for group in _groups(argument):
            yield from _choices(group, repeated=inner)


def _groups(argument: Any) -> Iterator[Iterable[tuple[Any, Any]]]:
    """The sub-patterns among an operation's arguments, however deep they lie in its tuples and lists."""
    if type(argument).__name__ == "SubPattern":
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _groups(part)
