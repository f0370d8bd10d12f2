"""A starter as a recipe file, every choice with its reason above it; written down once a plan accepts it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Any

from compressor.errors import PlanError, UserError
from compressor.planner.plan import make_plan
from compressor.planner.starter import Starter
from compressor.planner.starter_parts import Section
from compressor.recipe.load import load_recipe
from compressor.recipe.scalars import escape, resolve_plain
from compressor.report.words import size, visible

_WIDTH = 100
# Left out, in this order, where a plan refuses the recipe with them.
_OPTIONAL = ("drafts", "kv_cache", "evaluate")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]*")


def planned_text(starter: Starter) -> str:
    """The recipe's text, which ``compress plan`` accepts as it is; sections that it refuses are comments.

    Raises:
        UserError: it refuses the rest as well.
    """
    for name in (*_OPTIONAL, None):
        text = starter_text(starter)
        problem = _problem(text)
        if problem is None:
            return text
        if name is None:
            raise problem
        starter = starter.without(name, f"Left out, since the plan refuses it: {_first(problem)}")
    raise AssertionError("the last turn returns or raises")


def _problem(text: str) -> UserError | None:
    """Why a plan refuses the recipe."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "starter.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            make_plan(load_recipe(str(path)))
        except UserError as error:
            return error
    return None


def _first(problem: UserError) -> str:
    return problem.faults[0].what if isinstance(problem, PlanError) else problem.what


def starter_text(starter: Starter) -> str:
    """YAML with comments."""
    lines = [
        *_comment(f"{starter.label}: {starter.scheme} for {starter.gpu.name}, goal {starter.goal}"),
        *_comment(
            f"Weights: {size(starter.bytes_before)} in 16 bit, {size(starter.bytes_after)} as written. "
            "`compress plan` shows what it will do, `compress run --smoke` tries it small."
        ),
        "schema_version: 1",
    ]
    for section in starter.sections:
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def _section(section: Section) -> Iterator[str]:
    reasons = [line for reason in section.reasons for line in _comment(reason)]
    if section.value is None or section.value == "null":
        yield from reasons
        if section.instead is not None:
            yield from (f"# {line}" for line in _yaml(section.name, section.instead))
        if section.value == "null":
            yield f"{section.name}: null"
        return
    yield from reasons
    yield from _yaml(section.name, section.value)


def _yaml(key: str, value: Any, indent: str = "") -> Iterator[str]:
    """Block style for maps, flow style for lists and what lies in them."""
    if not isinstance(value, dict) or ("kind" in value and indent):
        yield f"{indent}{key}: {_flow(value)}"
        return
    yield f"{indent}{key}:"
    for inner, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            yield f"{indent}  {inner}:"
            yield from (f"{indent}    - {_flow(one)}" for one in item)
        else:
            yield from _yaml(inner, item, f"{indent}  ")


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    text = escape(value)
    # What YAML 1.2 would not read as this text is quoted.
    plain = _PLAIN.fullmatch(text.removesuffix("%")) and isinstance(resolve_plain(text), str)
    return text if plain else json.dumps(text)


def _comment(text: str) -> list[str]:
    """Lines of a comment; what strangers wrote cannot end it."""
    return [f"# {line}" for line in wrap(visible(text), _WIDTH, break_on_hyphens=False)]
