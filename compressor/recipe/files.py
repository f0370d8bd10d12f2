"""Recipe files on disk: reading one, and the chain of files that it extends."""

from __future__ import annotations

from pathlib import Path

from compressor.data import shipped_root
from compressor.errors import RecipeError
from compressor.recipe.faults import RecipeFaults
from compressor.recipe.merge import merge
from compressor.recipe.tree import MAX_BYTES, Entry, Fields, Items, Leaf, Node, parse_yaml

MAX_FILES = 32
SUFFIXES = (".yaml", ".yml")


def read_tree(path: Path, faults: list[RecipeError]) -> Fields:
    """The tree of the recipe at ``path``, merged onto everything that it extends.

    Raises:
        RecipeFaults: a file cannot be read or parsed at all; the message includes ``faults`` found before.
    """
    try:
        return _Chain(faults).read(path, ())
    except RecipeError as error:
        raise RecipeFaults([*faults, error]) from None


class _Chain:
    """Counts the files of one load, so that parents that extend each other many times over end."""

    def __init__(self, faults: list[RecipeError]) -> None:
        self._faults = faults
        self._count = 0

    def read(self, path: Path, children: tuple[Path, ...]) -> Fields:
        self._count += 1
        if self._count > MAX_FILES:
            raise RecipeError(f"the recipe extends more than {MAX_FILES} files", where=shown(children[0]))
        own = _parse(path, self._faults)
        entry = own.entries.get("extends")
        if "+extends" in own.entries:
            raise RecipeError(
                "'extends' is never inherited: drop the '+'", where=own.entries["+extends"].where
            )
        own = Fields({key: value for key, value in own.entries.items() if key != "extends"}, own.where)
        merged = Fields({}, own.where)
        for parent in _parents(entry):
            parent_path = _locate(parent, path.parent)
            if parent_path in (*children, path):
                loop = " -> ".join(file.name for file in (*children, path, parent_path))
                raise RecipeError(f"`extends` goes in a circle: {loop}", where=parent.where)
            merged = merge(merged, self.read(parent_path, (*children, path)), self._faults)
        return merge(merged, own, self._faults)


def _parents(entry: Entry | None) -> list[Leaf]:
    if entry is None:
        return []
    nodes: tuple[Node, ...] = entry.node.items if isinstance(entry.node, Items) else (entry.node,)
    parents = [node for node in nodes if isinstance(node, Leaf) and isinstance(node.value, str)]
    if len(parents) < len(nodes):
        raise RecipeError("`extends` is a recipe file or a list of them", where=entry.where)
    return parents


def _locate(parent: Leaf, folder: Path) -> Path:
    """The file that ``extends`` names: beside the extending file, else among the shipped ones."""
    name = str(parent.value)
    if not name.endswith(SUFFIXES):
        raise RecipeError(f"`extends` names a .yaml file, not {name!r}", where=parent.where)
    places = [folder / name]
    if ".." not in Path(name).parts:
        places.append(shipped_root() / name)
    for place in places:
        if _is_file(place):
            return place.resolve()
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise RecipeError(f"no such recipe: {name}", where=parent.where, fix=f"looked for {looked}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _parse(path: Path, faults: list[RecipeError]) -> Fields:
    name = shown(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=name) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"a recipe has at most {MAX_BYTES} bytes", where=name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("the file is not UTF-8", where=f"{name}:{line}") from None
    tree = parse_yaml(text, lambda line, column: f"{name}:{line + 1}:{column + 1}", faults)
    if not isinstance(tree, Fields):
        what = "the recipe is empty" if tree == Leaf(None, tree.where) else "a recipe is a map of keys"
        raise RecipeError(what, where=tree.where, fix="see `compress schema`")
    return tree


def shown(path: Path) -> str:
    """The path as faults print it: short where it lies below the current folder."""
    current = Path.cwd()
    return str(path.relative_to(current) if path.is_relative_to(current) else path)
