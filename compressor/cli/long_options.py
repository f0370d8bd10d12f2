"""Options of ``compress eval`` for long context."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.recipe.evaluate_long import LongSection

_Command = TypeVar("_Command", bound=Callable[..., None])

# Option -> key of the recipe's ``evaluate.long``, and what makes its value of the words.
_KEYS: dict[str, tuple[tuple[str, ...], Callable[[str], object] | None]] = {
    "long_documents": (("count",), None),
    "long_tokens": (("tokens",), None),
    "long_stride": (("stride",), None),
    "long_needles": (("needles", "lengths"), int),
    "long_kinds": (("needles", "kinds"), str),
    "long_depths": (("needles", "depths"), float),
    "long_trials": (("needles", "trials"), None),
    "long_ruler": (("ruler", "tasks"), str),
    "long_ruler_tokens": (("ruler", "lengths"), int),
    "long_limit": (("ruler", "limit"), None),
}
# These begin what the others say more of.
_LEADING = {"needles": "long_needles", "ruler": "long_ruler"}

_OPTIONS = (
    click.option("--long", metavar="DOCS", help="Long documents, to measure by position; .jsonl.xz too."),
    click.option("--long-documents", type=int, help="How many of them.  [default: 10]"),
    click.option("--long-tokens", type=int, help="Tokens of each.  [default: what CHECKPOINT reads]"),
    click.option(
        "--long-window", type=int, help="Tokens of the reference's window.  [default: the source's]"
    ),
    click.option("--long-stride", type=int, help="By which it slides.  [default: an eighth of it]"),
    click.option("--long-needles", metavar="TOKENS,...", help="Hide numbers in texts of these lengths."),
    click.option("--long-kinds", metavar="KIND,...", help="passkey and needle, or one.  [default: both]"),
    click.option("--long-depths", metavar="DEPTH,...", help="From 0 to 1.  [default: 0,0.25,0.5,0.75,1]"),
    click.option("--long-trials", type=int, help="Texts of each kind, length and depth.  [default: 5]"),
    click.option("--long-ruler", metavar="TASK,...", help="RULER tasks of lm-eval that need no network."),
    click.option("--long-ruler-tokens", metavar="TOKENS,...", help="Their lengths.  [default: the tokens]"),
    click.option("--long-limit", type=int, help="Samples of each task and length.  [default: 20]"),
    click.option("--long-seed", type=int, default=0, help="Of numbers, samples and intervals.  [default: 0]"),
)


def long_options(command: _Command) -> _Command:
    """Adds the options; the command is given ``long``, ``long_window`` and ``long_seed``."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        said = {name: kwargs.pop(name) for name in _KEYS}
        documents = kwargs.pop("long")
        command(*args, long=_section(documents, said, kwargs["long_window"]), **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _section(documents: str | None, said: dict[str, Any], window: int | None) -> LongSection | None:
    """What the options say, as a recipe's section.

    Raises:
        UserError: an option without the one that it belongs to, or a value that is none.
    """
    given = {name: value for name, value in said.items() if value is not None}
    if documents is None:
        if given or window is not None:
            named = ", ".join(map(_spelled, [*given, *(["long_window"] if window is not None else [])]))
            raise UserError(f"{named} say how --long measures", fix="name documents: --long FILE")
        return None
    told: dict[str, Any] = {"documents": documents}
    for name, value in given.items():
        (*above, key), make = _KEYS[name]
        for part in above:
            leading = _LEADING[part]
            if leading not in given:
                raise UserError(f"{_spelled(name)} goes with {_spelled(leading)}")
        place = told.setdefault(above[0], {}) if above else told
        place[key] = value if make is None else _list(name, value, make)
    return _validated(told)


def _validated(told: dict[str, Any]) -> LongSection:
    from pydantic import ValidationError

    from compressor.recipe.evaluate_long import LongSection

    try:
        return LongSection.model_validate(told)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        path = tuple(part for part in fault["loc"] if isinstance(part, str))
        names = {key: _spelled(name) for name, (key, _) in _KEYS.items()}
        what = fault["msg"].removeprefix("Value error, ")
        raise UserError(f"{names.get(path, '--long')}: {what}") from error


def _list(name: str, words: str, make: Callable[[str], object]) -> list[object]:
    try:
        return [make(word.strip()) for word in words.split(",")]
    except ValueError as error:
        raise UserError(f"{_spelled(name)} {words!r} is no list of numbers") from error


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"
