"""Options of ``compress eval`` for decoding with proposed tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.evals.decode_spec import DecodeSpec

_Command = TypeVar("_Command", bound=Callable[..., None])

_DTYPES = ("float32", "bfloat16")
_OPTIONS = (
    click.option(
        "--draft", metavar="DIR|native", help="Measure decoding with what DIR, or its own layer, proposes."
    ),
    click.option("--draft-tokens", type=click.IntRange(1, 16), help="Proposed at a time.  [default: 3]"),
    click.option("--draft-text", metavar="NAME=FILE,...", help="Prompts.  [default: prose, chat and code]"),
    click.option("--draft-prompts", type=click.IntRange(min=1), help="Of each text.  [default: 8]"),
    click.option("--draft-prompt-tokens", type=click.IntRange(min=2), help="Of each.  [default: 64]"),
    click.option("--draft-new-tokens", type=click.IntRange(min=2), help="Made of each.  [default: 128]"),
    click.option("--draft-batch", metavar="N,...", help="Sequences at once.  [default: 1]"),
    click.option("--draft-runs", type=click.IntRange(min=1), help="Against the clock.  [default: 3]"),
    click.option("--draft-temperature", type=float, help="0: greedy.  [default: 0]"),
    click.option("--draft-dtype", type=click.Choice(_DTYPES), help="[default: what the device is fast in]"),
)
# Option -> field of ``DecodeSpec``.
_FIELDS = {
    "draft_tokens": "tokens",
    "draft_prompts": "prompts",
    "draft_prompt_tokens": "prompt_tokens",
    "draft_new_tokens": "new_tokens",
    "draft_runs": "runs",
    "draft_temperature": "temperature",
}


def draft_options(command: _Command) -> _Command:
    """Adds the options; the command is given ``draft``, ``decoding`` (a spec or None) and ``draft_dtype``."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        said = {name: kwargs.pop(name) for name in (*_FIELDS, "draft_text", "draft_batch")}
        given = {name: value for name, value in said.items() if value is not None}
        kwargs["decoding"] = _spec(kwargs["draft"], given, kwargs["draft_dtype"])
        command(*args, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _spec(draft: str | None, given: dict[str, Any], dtype: str | None) -> DecodeSpec | None:
    """What the options say.

    Raises:
        UserError: an option without --draft, or a value that is none.
    """
    if draft is None:
        named = [*given, *(["draft_dtype"] if dtype else [])]
        if named:
            spelled = ", ".join(f"--{name.replace('_', '-')}" for name in named)
            verb = "says" if len(named) == 1 else "say"
            raise UserError(f"{spelled} {verb} how --draft measures", fix="name a draft: --draft DIR")
        return None
    from compressor.data import find
    from compressor.evals.decode_spec import SHIPPED_DOMAINS, TEMPERATURES, DecodeSpec, usable_temperature

    texts = _texts(given["draft_text"]) if "draft_text" in given else dict(SHIPPED_DOMAINS)
    more = {field: given[name] for name, field in _FIELDS.items() if name in given}
    if not usable_temperature(more.get("temperature", 0)):
        told = "{:g} to {:g}".format(*TEMPERATURES)
        raise UserError(f"--draft-temperature {more['temperature']:g} is neither 0 nor from {told}")
    if "draft_batch" in given:
        more["batches"] = _batches(given["draft_batch"])
    return DecodeSpec({name: find(file, what="text of prompts") for name, file in texts.items()}, **more)


def _texts(words: str) -> dict[str, str]:
    found = {}
    for word in words.split(","):
        name, _, file = (part.strip() for part in word.partition("="))
        if not name or not file:
            raise UserError(f"--draft-text {words!r} is no list of texts", fix="for example code=code.jsonl")
        if name in found:
            raise UserError(f"--draft-text names {name!r} twice", fix="give each text a name of its own")
        found[name] = file
    return found


def _batches(words: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"--draft-batch {words!r} is no list of batch sizes", fix="for example 1,8")
    return found
