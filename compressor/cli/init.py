"""``compress init``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import click

from compressor.planner.starter_parts import Goal
from compressor.recipe.gpus import DEFAULT_GPU, GPUS


@click.command(name="init")
@click.argument("model")
@click.option(
    "--gpu",
    "gpu_name",
    metavar="NAME",
    default=DEFAULT_GPU,
    show_default=True,
    shell_complete=lambda ctx, param, text: [name for name in GPUS if name.startswith(text.lower())],
    help=f"What it is to be served on, or the beginning of its name: {', '.join(GPUS)}.",
)
@click.option(
    "--goal",
    type=click.Choice(get_args(Goal)),
    default="memory",
    show_default=True,
    help="memory: smallest weights and cache; speed: least arithmetic, for many users; quality: 8 bits.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="The recipe's file, or - for stdout.  [default: MODEL-SCHEME.yaml here]",
)
@click.option("--revision", help="Branch, tag or commit of a Hub id; the commit is written down.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def command(
    model: str, gpu_name: str, goal: Goal, output: Path | None, revision: str | None, force: bool
) -> None:
    """Write a commented starter recipe for MODEL: a folder, a .gguf file, a Hub id, or shipped headers.

    Chooses by what the GPU multiplies and what the model's shapes allow: scheme and solver, KV cache, drafts,
    calibration, evaluation; every choice has its reason in a comment. `compress plan` accepts the file as it
    is. Reads configs and headers only.
    """
    from compressor.errors import UserError
    from compressor.planner.starter import gpu_named, make_starter
    from compressor.planner.starter_text import planned_text
    from compressor.workspace import write_atomic

    starter = make_starter(model, gpu_named(gpu_name), goal, revision=revision)
    if output == Path("-"):
        click.echo(planned_text(starter), nl=False)
        return
    path = output or Path(f"{_slug(starter.label)}-{_slug(starter.scheme)}.yaml")
    taken = UserError("the file is there already", where=str(path), fix="name another, or give --force")
    if path.exists() and not force:
        raise taken
    if not path.absolute().parent.is_dir():
        raise UserError("no such folder", where=str(path.parent), fix="make it first")
    text = planned_text(starter)
    if force:
        write_atomic(path, text.encode())
    else:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise taken from error
    click.echo(f"{path}\nnext: compress plan {path}; compress run {path} --smoke; compress run {path}")


def _slug(label: str) -> str:
    """A model's label as a part of a file name."""
    last = label.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.").lower()[:60] or "model"
