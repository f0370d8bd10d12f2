"""What shells complete: recipes, keys and values of ``--set``. Asked at every press of Tab: nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem

VARIABLE = "_COMPRESS_COMPLETE"
_MOST = 2_000


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Recipe files and folders here, then the shipped recipes, which have the same path everywhere."""
    from compressor.recipe.load import shipped_recipes

    told = {path: text for path, text in shipped_recipes() if path.startswith(incomplete)}
    here = [path for path in _files(incomplete) if path not in told]
    return [*map(CompletionItem, here), *(CompletionItem(path, help=text) for path, text in told.items())]


def _files(incomplete: str) -> list[str]:
    folder, _, start = incomplete.rpartition("/")
    place = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    try:
        names = sorted(os.listdir(place))[:_MOST]
    except OSError:
        return []
    lead = incomplete[: len(incomplete) - len(start)]
    shown = [name for name in names if name.startswith(start) and (start or not name.startswith("."))]
    files = [f"{lead}{name}" for name in shown if name.endswith((".yaml", ".yml"))]
    return [*files, *(f"{lead}{name}/" for name in shown if (place / name).is_dir())]


def settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Keys of recipes with ``=`` behind them; behind that, the words that are values of the key."""
    from compressor.recipe.keys import settable_keys

    key, equals, value = incomplete.partition("=")
    keys = settable_keys()
    if equals:
        words = keys.get(key, ())
        return [CompletionItem(f"{key}={word}") for word in words if word.startswith(value)]
    return [CompletionItem(f"{name}=") for name in keys if name.startswith(key)]


class Bash(BashComplete):
    """click's, for arguments with ``=`` in them: bash takes KEY, = and VALUE for three words.

    Only what follows the ``=`` is replaced, and no space is put behind one, for a value must follow.
    """

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)\n", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace\n"
    )
    _before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """See ``ShellComplete.get_completion_args``."""
        args, incomplete = super().get_completion_args()
        if incomplete == "=" and args:
            incomplete = f"{args.pop()}="
            self._before = incomplete
        elif len(args) > 1 and args[-1] == "=":
            key = args[-2]
            args, self._before = args[:-2], f"{key}="
            incomplete = f"{key}={incomplete}"
        joined: list[str] = []
        for arg in args:
            if joined and (arg == "=" or joined[-1].endswith("=")):
                joined[-1] += arg
            else:
                joined.append(arg)
        return joined, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """See ``ShellComplete.format_completion``."""
        item.value = str(item.value).removeprefix(self._before)
        return super().format_completion(item)
