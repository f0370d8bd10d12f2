"""Which of a model's blocks a smoke run keeps: the first ones, until every kind of block has come.

Kinds are told apart by what the checkpoint stores (attention, Mamba, experts or dense) and by the config's
lists of one entry a layer, as transformers 5.17 computes them also from intervals (``layer_types``,
``no_rope_layers``, ...). Keeping the first ones leaves names, intervals and offsets as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compressor.errors import UserError
from compressor.model.families import block_index
from compressor.stages.base import Claim

# Blocks may differ in what the recipe does to them as well: such kinds are looked for this far.
_FAR = 8
# Keys of configs that name tokens, whose lists are not of layers.
TOKEN_KEYS = ("_token_id", "_token_index", "_token_ids")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class KeptLayers:
    """The first blocks of a decoder.

    Attributes:
        kept: how many.
        total: how many the source has.
        kinds: what they are -> how many of the kept ones are that.
    """

    kept: int
    total: int
    kinds: Mapping[str, int]

    def __str__(self) -> str:
        shown = ", ".join(f"{count} x {kind}" for kind, count in self.kinds.items())
        return f"{self.kept} of {self.total} layers, the first ones: {shown}"


def without_numbers(name: str) -> str:
    """A tensor's name with ``*`` in the place of the numbers of blocks and experts."""
    return _NUMBER.sub("*", name)


def kept_layers(claims: Sequence[Claim], text: Any, where: str) -> KeptLayers:
    """The fewest first blocks among which are all kinds that the model has.

    Kinds that differ only in what the recipe does to them are among these where they come early, and
    something is quantized in them.

    Args:
        claims: of the whole source.
        text: the config of the decoder, as transformers has it.
        where: the source, for messages.

    Raises:
        UserError: the config does not say how many blocks there are, or one of them has no tensors.
    """
    total = getattr(text, "num_hidden_layers", None)
    if type(total) is not int or total < 1:
        raise UserError("--smoke cannot shrink it: the config states no num_hidden_layers", where=where)
    blocks = _by_block(claims, total)
    missing = next((index for index in range(total) if index not in blocks), None)
    if missing is not None:
        raise UserError(f"--smoke cannot shrink it: block {missing} of {total} has no tensors", where=where)
    flags = layer_flags(text, total)
    kinds = [(_stored(blocks[index]), *(flag(index) for flag in flags.values())) for index in range(total)]
    treated = [(kinds[index], _treated(blocks[index])) for index in range(total)]
    kept = max(kinds.index(kind) for kind in set(kinds)) + 1
    early = treated[: max(kept, _FAR)]
    kept = max(kept, min(2, total), *(early.index(kind) + 1 for kind in set(early)))
    quantized = [any(claim.scheme for claim in blocks[index]) for index in range(total)]
    if any(quantized):
        kept = max(kept, quantized.index(True) + 1)
    named = Counter(_named(blocks[index], flags, index) for index in range(kept))
    return KeptLayers(kept, total, named)


def layer_flags(text: Any, total: int) -> dict[str, Callable[[int], Any]]:
    """For each of the config's lists that tell layers apart: layer -> its entry, or whether it is listed."""
    found: dict[str, Callable[[int], Any]] = {}
    for key, value in sorted(text.to_dict().items()):
        if key.endswith(TOKEN_KEYS):
            continue
        if is_index_list(value, total):
            found[key] = set(value).__contains__
        elif isinstance(value, list) and len(value) == total:
            found[key] = value.__getitem__
    return found


def is_index_list(value: object, total: int) -> bool:
    """Whether a config's value lists layers by number; two values of a list of two are flags."""
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        return False
    rising = all(low < high for low, high in pairwise(value))
    is_flags = len(value) == total and set(value) <= {0, 1}
    return rising and value[0] >= 0 and value[-1] < total and not is_flags


def decoder_path(claims: Sequence[Claim]) -> str:
    """The path of the list of blocks that holds the most weights to quantize by default."""
    sizes = Counter[str]()
    for claim in claims:
        index = block_index(claim.tensor.name)
        if index is not None and claim.role.kind == "linear":
            sizes[claim.tensor.name.partition(f".{index}.")[0]] += claim.tensor.numel
    return sizes.most_common(1)[0][0] if sizes else ""


def _by_block(claims: Sequence[Claim], total: int) -> dict[int, list[Claim]]:
    path = decoder_path(claims)
    blocks: dict[int, list[Claim]] = {}
    for claim in claims:
        index = block_index(claim.tensor.name)
        if index is not None and index < total and claim.tensor.name.startswith(f"{path}.{index}."):
            blocks.setdefault(index, []).append(claim)
    return blocks


def _stored(block: Sequence[Claim]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((without_numbers(claim.tensor.name), claim.tensor.shape) for claim in block)


def _treated(block: Sequence[Claim]) -> frozenset[tuple[str, str, str]]:
    """What the recipe does to a block: each tensor's scheme and solver."""
    return frozenset(
        (
            without_numbers(claim.tensor.name),
            claim.scheme.model_dump_json() if claim.scheme else "",
            claim.solver.model_dump_json() if claim.scheme and claim.solver else "",
        )
        for claim in block
    )


def _named(block: Sequence[Claim], flags: Mapping[str, Callable[[int], Any]], index: int) -> str:
    """A block's modules and what the config lists of it, for people."""
    modules: dict[str, bool] = {}
    for claim in block:
        module, _, rest = claim.tensor.name.partition(f".{index}.")[2].partition(".")
        if rest and "norm" not in module and rest not in ("weight", "bias"):
            modules[module] = modules.get(module, False) or "expert" in rest
    parts = [
        f"{module} with experts" if experts else module
        for module, experts in sorted(modules.items(), reverse=True)
    ]
    for key, flag in flags.items():
        entry = flag(index)
        if isinstance(entry, str):
            parts.append(entry)
        elif key == "no_rope_layers" and not entry:
            parts.append("without rope")
    return " + ".join(dict.fromkeys(parts))
