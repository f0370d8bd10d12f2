"""Every key that ``--set`` may name, and the words that stand for its values, from the recipe's schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressor.recipe.model import Recipe

_DEEPEST = 8


def settable_keys() -> dict[str, tuple[str, ...]]:
    """Dotted key -> its values as far as they are words of the language, in the schema's order."""
    schema = Recipe.model_json_schema()
    return dict(_keys(schema, schema.get("$defs", {}), "", _DEEPEST))


def _keys(
    section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, deepest: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, field in section.get("properties", {}).items():
        key = f"{prefix}{name}"
        options = list(_options(field, definitions))
        yield key, tuple(dict.fromkeys(word for option in options for word in _words(option)))
        for option in options if deepest else ():
            # Plug-ins' own mappings (schemes, solvers) are not sections: they are written whole.
            if option.get("type") == "object" and option.get("title", "").endswith("Section"):
                yield from _keys(option, definitions, f"{key}.", deepest - 1)


def _options(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a field may be: itself, or each of its alternatives."""
    if "$ref" in field:
        yield definitions[field["$ref"].rpartition("/")[2]]
    for one in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _options(one, definitions)
    if "$ref" not in field and "anyOf" not in field and "oneOf" not in field:
        yield field


def _words(option: Mapping[str, Any]) -> Iterator[str]:
    if "enum" in option:
        yield from (str(value).lower() if isinstance(value, bool) else str(value) for value in option["enum"])
    elif "const" in option:
        value = option["const"]
        yield str(value).lower() if isinstance(value, bool) else str(value)
    elif option.get("type") == "boolean":
        yield from ("true", "false")
    elif option.get("type") == "null":
        yield "null"
    yield from (str(word) for word in option.get("examples", ()) if isinstance(word, str))
