"""``compress schema``."""

from __future__ import annotations

import json

import click


@click.command(name="schema")
def command() -> None:
    """Print the JSON Schema of recipe files, for editors and checkers."""
    from compressor.recipe.load import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
