"""How trees combine: ``extends`` (maps merge, lists replace, ``+key`` appends) and ``--set a.b=c``."""

from __future__ import annotations

from typing import Any

from compressor.errors import RecipeError
from compressor.recipe.scalars import looks_secret
from compressor.recipe.tree import MAX_DEPTH, Entry, Fields, Items, Leaf, Node, parse_yaml


def merge(base: Fields, over: Fields, faults: list[RecipeError]) -> Fields:
    """``over`` on top of ``base``: maps merge key by key, everything else is replaced.

    ``+key: [...]`` appends to the list inherited so far; where there is none yet it waits, so that a file
    of additions also works as one parent among several. A map whose ``kind`` differs from the inherited
    one replaces it, since the options of one kind mean nothing to another. ``+key`` with or onto something
    that is no list is left out and appended to ``faults``.
    """
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        bare = key.removeprefix("+")
        if key == bare:
            inherited = entries.pop(key, None)
            entries.pop(f"+{key}", None)
            entries[key] = _stacked(inherited, entry, faults)
        elif bare in entries:
            entries[bare] = _appended(entries[bare], entry, key, faults)
        elif key in entries:
            entries[key] = _appended(entries[key], entry, key, faults)
        else:
            entries[key] = entry
    return Fields(entries, over.where)


def _stacked(inherited: Entry | None, entry: Entry, faults: list[RecipeError]) -> Entry:
    if inherited is None or not isinstance(inherited.node, Fields) or not isinstance(entry.node, Fields):
        return entry
    old, new = _kind(inherited.node), _kind(entry.node)
    if old is not None and new is not None and old != new:
        return entry
    return Entry(merge(inherited.node, entry.node, faults), entry.where)


def _kind(fields: Fields) -> object:
    entry = fields.entries.get("kind")
    return entry.node.value if entry is not None and isinstance(entry.node, Leaf) else None


def _appended(inherited: Entry, entry: Entry, key: str, faults: list[RecipeError]) -> Entry:
    if isinstance(inherited.node, Items) and isinstance(entry.node, Items):
        return Entry(Items(inherited.node.items + entry.node.items, entry.node.where), entry.where)
    if isinstance(entry.node, Items):
        what = f"{key!r} appends to a list, but the value at {inherited.node.where} is none"
        fix = f"write {key.removeprefix('+')!r} to replace it"
        faults.append(RecipeError(what, where=entry.where, fix=fix))
    else:
        faults.append(_needs_list(key, entry))
    return inherited


def _needs_list(key: str, entry: Entry) -> RecipeError:
    return RecipeError(f"{key!r} needs a list to append", where=entry.where)


def settle(node: Node, faults: list[RecipeError]) -> Node:
    """The tree with every ``+key`` that found nothing to append to turned into ``key``.

    ``+key`` with something that is no list is left out and appended to ``faults``.
    """
    if isinstance(node, Items):
        return Items(tuple(settle(item, faults) for item in node.items), node.where)
    if isinstance(node, Leaf):
        return node
    entries = {}
    for key, entry in node.entries.items():
        if key.startswith("+") and not isinstance(entry.node, Items):
            faults.append(_needs_list(key, entry))
        else:
            entries[key.removeprefix("+")] = Entry(settle(entry.node, faults), entry.where)
    return Fields(entries, node.where)


def plain(node: Node) -> Any:
    """Dicts, lists and scalars, without places."""
    if isinstance(node, Leaf):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {key: plain(entry.node) for key, entry in node.entries.items()}


def override(root: Fields, text: str, faults: list[RecipeError]) -> Fields:
    """``root`` with one ``a.b=value`` applied; the value is YAML, ``rules.0.match`` goes into lists.

    The value replaces what is there, maps too; ``a.+list=[x]`` appends. Every fault names ``--set a.b=value``
    as its place; those that leave a value (an unset variable in it) are appended to ``faults``.

    Raises:
        RecipeError: no ``=``, a path that does not fit the recipe, a value that is no YAML.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    keys = path.split(".")
    if any(looks_secret(key) for key in keys):
        fix = "secrets come from the environment (HF_TOKEN), never from a recipe"
        raise RecipeError(f"{path!r} looks like a secret", where=f"--set {path[:200]}=...", fix=fix)
    where = f"--set {text if len(text) <= 200 else text[:200] + '...'}"
    if not equals or not all(key.removeprefix("+") for key in keys):
        raise RecipeError("an override is KEY=VALUE, with the keys joined by dots", where=where)
    if keys[0].removeprefix("+") == "extends":
        raise RecipeError("`extends` belongs into a recipe file; it cannot be overridden", where=where)
    if len(keys) > MAX_DEPTH:
        raise RecipeError(f"keys are nested deeper than {MAX_DEPTH} levels", where=where)
    node = parse_yaml(value, lambda line, column: where, faults)
    result = settle(_put(root, keys, 0, Entry(node, where), faults), faults)
    assert isinstance(result, Fields), "an override has at least one key, so a map stays a map"
    return result


def _put(node: Node | None, keys: list[str], depth: int, entry: Entry, faults: list[RecipeError]) -> Node:
    """``node``, reached by the first ``depth`` keys, with ``entry`` put in at the rest of them."""
    if depth == len(keys):
        return entry.node
    key = keys[depth]
    if isinstance(node, Items):
        index = _index(node, keys, depth, entry.where)
        below = _put(node.items[index], keys, depth + 1, entry, faults)
        return Items((*node.items[:index], below, *node.items[index + 1 :]), node.where)
    if isinstance(node, Leaf) and node.value is not None:
        reached = ".".join(keys[:depth])
        what = f"{reached} is {node.value!r}, not a map with keys"
        raise RecipeError(what, where=entry.where, fix=f"set it whole: {reached}='{{...}}'")
    fields = node if isinstance(node, Fields) else Fields({}, entry.where)
    is_last = depth == len(keys) - 1
    if is_last and key.startswith("+"):
        return merge(fields, Fields({key: entry}, fields.where), faults)
    old = fields.entries.get(key)
    below = _put(old.node if old else None, keys, depth + 1, entry, faults)
    place = entry.where if old is None or is_last else old.where
    return Fields({**fields.entries, key: Entry(below, place)}, fields.where)


def _index(node: Items, keys: list[str], depth: int, where: str) -> int:
    key = keys[depth]
    if key.isascii() and key.isdigit() and len(key) <= 6 and int(key) < len(node.items):
        return int(key)
    what = f"{'.'.join(keys[:depth])} is a list of {len(node.items)}, and {key!r} is no index into it"
    appending = ".".join([*keys[: depth - 1], f"+{keys[depth - 1]}"])
    raise RecipeError(what, where=where, fix=f"count from 0, or append with {appending}=[...]")
