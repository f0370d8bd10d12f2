"""The JSON Schema of recipe files, for editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compressor.recipe.model import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_EXTENDS = {
    "description": "Recipe files, relative to this one or shipped, that this one is merged onto: maps merge, "
    "lists are replaced, `+key` appends to an inherited list.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (Draft 2020-12) of a recipe file as it is written, before ``extends`` and overrides.

    Beside the fields of ``Recipe`` it knows ``extends`` and ``+list``; keys are required only of files that
    extend nothing.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    required: dict[str, Any] = {"required": [key for key in schema.pop("required") if key != "name"]}
    for name, field in schema["properties"].items():
        section = definitions.get(_reference(field))
        if section is not None and "required" in section:
            required.setdefault("properties", {})[name] = {"required": section.pop("required")}
    for section in [schema, *definitions.values()]:
        section.get("properties", {}).update(list(_additions(section)))
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {
        "$schema": DIALECT,
        **schema,
        "if": {"not": {"required": ["extends"]}},
        "then": required,
        "$defs": definitions,
    }


def _reference(field: dict[str, Any]) -> str:
    return str(field.get("$ref", "")).rpartition("/")[2]


def _additions(section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """``+key`` for every list among the section's properties."""
    for name, field in section.get("properties", {}).items():
        if field.get("type") == "array":
            yield f"+{name}", {**field, "description": f"Appended to the inherited `{name}`."}
