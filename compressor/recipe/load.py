"""Recipe files in and out: YAML with ``extends``, ``${VAR}`` and ``--set`` -> ``Recipe`` -> resolved YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import yaml

from compressor import data
from compressor.errors import RecipeError, UserError
from compressor.recipe.check import build
from compressor.recipe.faults import RecipeFaults, did_you_mean
from compressor.recipe.files import read_tree, shown
from compressor.recipe.merge import override, settle
from compressor.recipe.model import Recipe
from compressor.recipe.scalars import escape, resolve_plain
from compressor.recipe.schema import recipe_schema
from compressor.recipe.tree import Entry, Fields, Items, Leaf, Node

__all__ = ["LoadedRecipe", "dump_recipe", "load_recipe", "recipe_schema", "shipped_recipes"]


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: resolved and checked.
        path: the file.
        places: dotted key (``weights.rules.0.match``) -> ``file:line:column`` or ``--set ...``, for every key
            and list item that was written down; defaults have none.
    """

    recipe: Recipe
    path: Path
    places: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The recipe's folder, from which its relative paths are looked for too."""
        return self.path.parent


def load_recipe(path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads, merges, overrides and checks a recipe.

    Args:
        path: the file, or the relative path of a shipped one (``recipes/smollm2-nvfp4.yaml``).
        overrides: ``a.b=c`` each, applied in order after ``extends``.

    Raises:
        RecipeFaults: with every fault found; each names ``file:line:column`` or its override.
    """
    file = _find(path)
    faults: list[RecipeError] = []
    root = settle(read_tree(file, faults), faults)
    assert isinstance(root, Fields)
    for text in overrides:
        try:
            root = override(root, text, faults)
        except RecipeError as fault:
            faults.append(fault)
    if "name" not in root.entries:
        place = shown(file)
        named = Entry(Leaf(_slug(file.stem), place), place)
        root = Fields({**root.entries, "name": named}, root.where)
    recipe = build(root, faults, Recipe)
    if recipe is None or faults:
        raise RecipeFaults(faults)
    return LoadedRecipe(recipe, file, dict(_places(root, "")))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loading it gives an equal recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=inf
    )


def shipped_recipes() -> list[tuple[str, str]]:
    """(relative path, first comment line) of each shipped recipe; the path works from any folder."""
    root = data.shipped_root()
    return [
        (file.relative_to(root).as_posix(), _first_comment(file))
        for file in sorted(root.glob("recipes/*.yaml"))
    ]


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would not read as text, and spells lists and maps out without aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        # PyYAML would leave "0o17" bare and break lines at U+0085 and U+2028, which reading folds into spaces
        style = None if isinstance(resolve_plain(value), str) and value.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", escape(value), style=style)


_Dumper.add_representer(str, _Dumper.text)


def _find(path: str) -> Path:
    shipped = [name for name, _ in shipped_recipes()]
    try:
        file = data.find(path, what="recipe")
        if file.is_file():
            return file
        fault = RecipeError("is not a file", where=path)
    except (UserError, OSError, RuntimeError):  # OSError: name too long; RuntimeError: unknown user in ~user
        fault = RecipeError(f"no such recipe: {path}", fix=did_you_mean(path, shipped))
    raise RecipeFaults([fault])


def _slug(stem: str) -> str:
    """A file's stem as a name: other characters become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "recipe"


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _places(node: Node, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted key -> place, for everything below ``node``."""
    if isinstance(node, Fields):
        below = [(key, entry.where, entry.node) for key, entry in node.entries.items()]
    elif isinstance(node, Items):
        below = [(str(index), item.where, item) for index, item in enumerate(node.items)]
    else:
        return
    for key, where, child in below:
        yield f"{prefix}{key}", where
        yield from _places(child, f"{prefix}{key}.")
