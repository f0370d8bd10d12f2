"""``compress recipes``."""

from __future__ import annotations

import click


@click.command(name="recipes")
def command() -> None:
    """List the shipped recipes, one line each; the paths work from any folder."""
    from compressor.recipe.load import shipped_recipes

    listed = shipped_recipes()
    width = max((len(path) for path, _ in listed), default=0)
    for path, description in listed:
        click.echo(f"{path:<{width}}  {description}")
