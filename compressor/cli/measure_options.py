"""Options of ``compress eval`` for tasks, continuations, speed and gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.errors import UserError

if TYPE_CHECKING:
    from compressor.evals.base import GenerationSpec, SpeedSpec
    from compressor.recipe.evaluate import Gate

_Command = TypeVar("_Command", bound=Callable[..., None])
_GATE = re.compile(r"(?P<metric>[^<>=@]+)(?P<sign><=|>=)(?P<bound>[^@]+)(@(?P<confidence>.+))?")
# As many items as a recipe may name.
_LIMIT = r"[0-9]{1,12}"

_OPTIONS = (
    click.option("--task", "tasks", multiple=True, metavar="NAME[=N]", help="An lm-eval task; its first N."),
    click.option("--task-seeds", metavar="N,...", help="Of tasks that draw.  [default: 0]"),
    click.option("--continuations", type=click.IntRange(1, 10_000), help="Compare so many greedy ones."),
    click.option("--continuation-prompt", type=click.IntRange(min=2), help="Tokens before.  [default: 64]"),
    click.option("--continuation-tokens", type=click.IntRange(min=1), help="Tokens of each.  [default: 64]"),
    click.option("--speed", type=click.IntRange(1, 1000), metavar="RUNS", help="Time decoding so often."),
    click.option("--speed-prompt", type=click.IntRange(min=2), help="Tokens of a prompt.  [default: 128]"),
    click.option("--speed-tokens", type=click.IntRange(min=2), help="Tokens made.  [default: 64]"),
    click.option("--speed-batch", type=click.IntRange(1, 4096), help="Sequences at once.  [default: 1]"),
    click.option(
        "--gate",
        "gates",
        multiple=True,
        metavar="METRIC<=LOSS|METRIC>=SHARE[@CONFIDENCE]",
        help="Exit with 1 where a gate fails: 'perplexity<=3%', 'task:piqa>=99%@95%'; may be repeated.",
    ),
)
# Option -> field of the spec; the first of each turns it on.
_GENERATION = {
    "continuations": "prompts",
    "continuation_prompt": "prompt_tokens",
    "continuation_tokens": "new_tokens",
}
_SPEED = {
    "speed": "runs",
    "speed_prompt": "prompt_tokens",
    "speed_tokens": "new_tokens",
    "speed_batch": "batch",
}


@dataclass(frozen=True)
class Measures:
    """What the options ask for."""

    tasks: Mapping[str, int | None] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    generation: GenerationSpec | None = None
    speed: SpeedSpec | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def more(self) -> dict[str, Any]:
        """Without the gates: the fields of ``compare.More``."""
        return {name: value for name, value in vars(self).items() if name != "gates"}

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self != Measures()


def measure_options(command: _Command) -> _Command:
    """Adds the options; the command is given ``measures``."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        said = {name: kwargs.pop(name) for name in ("tasks", "task_seeds", *_GENERATION, *_SPEED, "gates")}
        kwargs["measures"] = _measures(said)
        command(*args, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _measures(said: Mapping[str, Any]) -> Measures:
    """What the options say.

    Raises:
        UserError: a value that is none, or an option without the one that it belongs to.
    """
    from compressor.evals.base import GenerationSpec, SpeedSpec

    generation, speed = _given(said, _GENERATION), _given(said, _SPEED)
    return Measures(
        tasks=dict(_task(word) for word in said["tasks"]),
        seeds=_seeds(said["task_seeds"]),
        generation=GenerationSpec(**generation) if generation else None,
        speed=SpeedSpec(**speed) if speed else None,
        gates=tuple(_gate(word) for word in said["gates"]),
    )


def _given(said: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, int]:
    main = next(iter(fields))
    given = {name: said[name] for name in fields if said[name] is not None}
    if given and main not in given:
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{spelled} say how --{main} measures", fix=f"say how often: --{main} N")
    return {fields[name]: value for name, value in given.items()}


def _task(word: str) -> tuple[str, int | None]:
    name, sign, limit = word.partition("=")
    if not name or (sign and not (re.fullmatch(_LIMIT, limit, re.ASCII) and int(limit) > 0)):
        raise UserError(f"--task {word!r} is no task", fix="for example --task piqa or --task piqa=100")
    return name, int(limit) if sign else None


def _seeds(words: str | None) -> tuple[int, ...]:
    if words is None:
        return (0,)
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0 or max(found) >= 2**32 or len({*found}) < len(found):
        raise UserError(f"--task-seeds {words!r} is no list of different seeds", fix="for example 0,1,2")
    return found


def _gate(word: str) -> Gate:
    """``task:piqa>=99%@95%`` as a recipe's gate."""
    from pydantic import ValidationError

    from compressor.recipe.evaluate import Gate

    example = "for example --gate 'perplexity<=3%' or --gate 'task:piqa>=99%@95%'"
    match = _GATE.fullmatch(word.strip())
    if match is None:
        raise UserError(f"--gate {word!r} is no gate", fix=example)
    bound = "max_increase" if match["sign"] == "<=" else "min_recovery"
    said = {"metric": match["metric"].strip(), bound: _number(match["bound"])}
    if match["confidence"] is not None:
        said["confidence"] = _number(match["confidence"])
    try:
        return Gate.model_validate(said)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--gate {word!r}: {why}", fix=example) from None


def _number(word: str) -> float | str:
    """A number where it is one; the recipe's own rules read percentages."""
    try:
        return float(word)
    except ValueError:
        return word.strip()
