"""config.json of the small model: the source's own, with other numbers in the same keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from compressor.errors import UserError
from compressor.model.load import refuse_fetched_kernels
from compressor.model.quiet import quiet
from compressor.model.skeleton import library_faults
from compressor.smoke.layers import TOKEN_KEYS, is_index_list
from compressor.smoke.sizes import TOWER_LAYERS, Sizes, layers_key, small_vocabulary

# Lists of a tower's layers of which each has a module of its own, however few layers there are.
_EACH_A_MODULE = "deepstack_visual_indexes"


@dataclass(frozen=True)
class Change:
    """One number that differs: its key with those around it, before and after."""

    key: str
    before: int
    after: int


@dataclass(frozen=True)
class SmallConfig:
    """A config.json and what was changed in it.

    Attributes:
        raw: its contents.
        changes: sizes, in the order of the sections.
        special: token name (``bos``, ``eos``, ...) -> id, where the vocabulary was shrunk.
    """

    raw: dict[str, Any]
    changes: tuple[Change, ...]
    special: Mapping[str, int]


def parsed(raw: Mapping[str, Any], where: str) -> Any:
    """config.json as transformers reads it, with every default.

    Raises:
        CheckpointError: transformers does not know the model, or the config asks for code from the Hub.
    """
    refuse_fetched_kernels(raw, where)
    with library_faults(where, "--smoke cannot read its config.json"), quiet():
        from transformers import CONFIG_MAPPING

        config_class = CONFIG_MAPPING[str(raw.get("model_type"))]
        return config_class.from_dict(config_class._decode_special_floats(deepcopy(dict(raw))))


def small_config(raw: Mapping[str, Any], kept: int, own_tokens: int | None, where: str) -> SmallConfig:
    """The config of a model with the first ``kept`` layers and small widths.

    Args:
        raw: the source's config.json.
        kept: layers of the decoder.
        own_tokens: ids of the tokenizer that is made for it, special ones not counted; None where the
            source's tokenizer is used, whose vocabulary cannot be shrunk.
        where: the source, for messages.

    Raises:
        CheckpointError: transformers does not know the model.
        UserError: the sizes have no keys that are known here.
    """
    config = parsed(raw, where)
    text = config.get_text_config()
    small = deepcopy(dict(raw))
    sizes = Sizes()
    changes: list[Change] = []
    sections = sorted(_sections(config, small, ""), key=lambda found: found[0] is not text)
    special = _special_tokens(sections, own_tokens) if own_tokens is not None else {}
    for section, target, path in sections:
        tower = section is not text
        changed = sizes.of(section, target, tower=tower)
        layers = layers_key(section)
        if not tower and (layers is None or "hidden_size" not in changed | target | section.to_dict()):
            raise UserError("--smoke cannot shrink it: its config has no sizes of known names", where=where)
        if layers is not None:
            total = getattr(section, layers)
            changed[layers] = min(total, _tower_layers(section) if tower else kept)
            _cut_lists(section, target, total, changed[layers])
        vocabulary = getattr(section, "vocab_size", None)
        if own_tokens is not None and type(vocabulary) is int:
            changed["vocab_size"] = small_vocabulary(vocabulary, own_tokens + len(special))
        for key, value in changed.items():
            before, stored = getattr(section, key), section.attribute_map.get(key, key)
            target[stored] = value
            change = Change(f"{path}{stored}", before, value)
            if before != value and change not in changes:
                changes.append(change)
    _keep_layer_types(text, small, kept, where)
    return SmallConfig(small, tuple(changes), special)


def _sections(config: Any, raw: dict[str, Any], path: str) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Every part of a config with the part of config.json that it was read from, and its path."""
    yield config, raw, path
    for key in config.sub_configs:
        section = getattr(config, key, None)
        if section is not None:
            inner = raw.get(key)
            if not isinstance(inner, dict):
                raw[key] = inner = {}
            yield from _sections(section, inner, f"{path}{key}.")


def _tower_layers(section: Any) -> int:
    return max(TOWER_LAYERS, len(getattr(section, _EACH_A_MODULE, None) or ()))


def _cut_lists(section: Any, target: dict[str, Any], total: int, kept: int) -> None:
    """Cuts config.json's lists of layers: those with an entry for each, and those of their numbers."""
    for key, value in list(target.items()):
        if key == _EACH_A_MODULE and isinstance(value, list):
            target[key] = list(range(len(value)))
        elif is_index_list(value, total) and not key.endswith(TOKEN_KEYS):
            target[key] = [index for index in value if index < kept]
        elif isinstance(value, list) and len(value) == total and total > kept:
            target[key] = value[:kept]


def _keep_layer_types(text: Any, small: dict[str, Any], kept: int, where: str) -> None:
    """States what kept layers are where the config class would now infer something else from their number."""
    before, total = text.to_dict(), text.num_hidden_layers
    config = parsed(small, where)
    found = config.get_text_config()
    target = next(raw for section, raw, _ in _sections(config, small, "") if section is found)
    for key, value in found.to_dict().items():
        was = before.get(key)
        is_list = isinstance(was, list) and len(was) == total and not is_index_list(was, total)
        if is_list and value != was[:kept]:
            target[key] = was[:kept]


def _special_tokens(sections: list[tuple[Any, dict[str, Any], str]], first: int) -> dict[str, int]:
    """Gives every token that a config names an id of its own from ``first``, in place; name -> id."""
    ids: dict[int, int] = {}
    named: dict[str, int] = {}
    for section, target, _ in sections:
        for key, value in section.to_dict().items():
            if not key.endswith(TOKEN_KEYS):
                continue
            values = value if isinstance(value, list) else [value]
            if not all(type(item) is int and item >= 0 for item in values):
                continue
            for item in values:
                ids.setdefault(item, first + len(ids))
            target[key] = [ids[item] for item in values] if isinstance(value, list) else ids[value]
            name = next(key.removesuffix(suffix) for suffix in TOKEN_KEYS if key.endswith(suffix))
            if values:
                named.setdefault(name, ids[values[0]])
    for name in ("bos", "eos"):
        if name not in named:
            named[name] = first + len(ids)
            ids[-1 - len(ids)] = named[name]
    return named | {f"extra{index}": index for index in ids.values() if index not in named.values()}
