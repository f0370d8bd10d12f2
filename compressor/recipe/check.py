"""A settled tree -> a ``Recipe`` or a section; pydantic's findings become faults at places of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from compressor.errors import RecipeError
from compressor.recipe.faults import did_you_mean
from compressor.recipe.fields import PATTERN_WORDS
from compressor.recipe.merge import plain
from compressor.recipe.model import RESERVED, Recipe
from compressor.recipe.section import Section
from compressor.recipe.tree import Entry, Fields, Items, Leaf
from compressor.schemes import known_schemes
from compressor.solvers import known_solvers

Path = tuple[str | int, ...]
S = TypeVar("S", bound=Section)

_WANTED = {
    "model_type": "must be a map of keys",
    "model_attributes_type": "must be a map of keys",
    "dict_type": "must be a map of keys",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_from_float": "must be a whole number",
}


def build(root: Fields, faults: list[RecipeError], model: type[S]) -> S | None:
    """The tree as a ``model``, or None after appending what is wrong with it to ``faults``.

    A fault at a place that already has one is left out: it is the first one's echo.
    """
    try:
        return model.model_validate(plain(root))
    except ValidationError as error:
        known = {fault.where for fault in faults}
        found = [_translated(root, model, path, detail) for path, detail in _details(error, ())]
        # Both ends of a range that is one number have the same fault.
        once = {(fault.where, fault.what): fault for fault in found}
        faults.extend(fault for fault in once.values() if fault.where not in known)
        return None


def _details(error: ValidationError, above: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """(path, pydantic's description) of each finding, also of those inside schemes and solvers."""
    for detail in error.errors(include_url=False):
        path = above + detail["loc"]
        context = detail.get("ctx", {})
        inner = context.get("error")
        if isinstance(inner, ValidationError):
            yield from _details(inner, path)
        elif detail["type"] != "too_short" or not detail["input"]:
            # A list whose items all have faults counts as empty: their echo.
            yield path + tuple(context.get("below", ())), detail


def _translated(root: Fields, model: type[Section], path: Path, detail: Mapping[str, Any]) -> RecipeError:
    entry, rest = _follow(root, path)
    if isinstance(entry.node, Leaf) and rest:
        # What it was read as, such as a range, has parts; in the file it has none.
        path = path[: -len(rest)]
    dotted = ".".join(map(str, path))
    sort = detail["type"]
    if sort == "extra_forbidden":
        return _unknown_key(root, model, path, entry.where)
    if sort == "missing":
        return RecipeError(f"key {dotted!r} is missing", where=entry.where)
    where = entry.node.where if isinstance(entry.node, Leaf) and not rest else entry.where
    if sort == "recipe_fault":
        return RecipeError(f"{dotted}: {detail['msg']}", where=where)
    if sort == "value_error":
        return RecipeError(f"{dotted}: {detail['ctx']['error']}", where=where)
    if sort == "too_short":
        return RecipeError(f"{dotted}: must not be empty", where=where)
    fix = "put it in quotes" if sort == "string_type" and isinstance(detail["input"], int | float) else ""
    return RecipeError(f"{dotted}: {_wanted(detail)}, not {_shown(detail['input'])}", where=where, fix=fix)


def _wanted(detail: Mapping[str, Any]) -> str:
    pattern = detail.get("ctx", {}).get("pattern")
    if pattern in PATTERN_WORDS:
        return PATTERN_WORDS[pattern]
    message = str(detail["msg"]).replace("Input should", "must").replace("String should", "must")
    return _WANTED.get(detail["type"], message)


def _unknown_key(root: Fields, model: type[Section], path: Path, where: str) -> RecipeError:
    reserved = RESERVED.get(tuple(map(str, path))) if model is Recipe else None
    if reserved is not None:
        what = f"{reserved} is not available in this version ({version('compressor')})"
        return RecipeError(what, where=where, fix="remove it")
    known = [*_known_keys(root, model, path[:-1]), *(["extends"] if len(path) == 1 else [])]
    what = f"unknown key {'.'.join(map(str, path))!r}"
    return RecipeError(what, where=where, fix=did_you_mean(str(path[-1]), known))


def _follow(root: Fields, path: Path) -> tuple[Entry, Path]:
    """The deepest entry of the tree on ``path``, and what of the path lies below it."""
    entry = Entry(root, root.where)
    for depth, step in enumerate(path):
        node = entry.node
        if isinstance(node, Fields) and step in node.entries:
            entry = node.entries[str(step)]
        elif isinstance(node, Items) and isinstance(step, int) and step < len(node.items):
            entry = Entry(node.items[step], node.items[step].where)
        else:
            return entry, path[depth:]
    return entry, ()


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, list | tuple):
        return "a list"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _known_keys(root: Fields, section: type[Section], above: Path) -> Iterable[str]:
    """The keys that the map at ``above`` may have."""
    for depth, step in enumerate(above, start=1):
        if step in ("scheme", "solver") or (depth > 1 and above[depth - 2] == "candidates"):
            kinds: Mapping[str, type[BaseModel]] = known_solvers() if step == "solver" else known_schemes()
            options = plain(_follow(root, above[:depth])[0].node)
            return kinds[options["kind"]].model_fields if depth == len(above) else ()
        # Other steps are places in a list, or keys that a map's user chose.
        if isinstance(step, str) and step in section.model_fields:
            section = next(_sections(section.model_fields[step].annotation), section)
    return [field.alias or name for name, field in section.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections named anywhere in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
