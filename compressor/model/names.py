"""Module names and tensor layouts: matrices inside source tensors, and lists of modules as engine patterns.

``target_patterns`` writes ``targets`` and ``ignore`` of a compressed-tensors ``quantization_config``. Readers
match an entry ``re:PATTERN`` with ``re.match`` and any other entry by equality (compressed-tensors 0.19
``utils/match.py``, vLLM 0.32 ``config_utils.py`` is_equal_or_regex_match), so every regex here ends in ``$``.
Leaf names are spelled out: vLLM asks for the shards of a fused layer (``qkv_proj`` as q, k and v) one by one.
Where vLLM renames the modules of a checkpoint (models with towers), it maps plain names and leaves regexes as
they are (compressed_tensors.py apply_vllm_mapper), so that only ``exact`` entries still match.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError
from compressor.spec import LinearPart

if TYPE_CHECKING:
    import torch


def module_of(tensor_name: str) -> str:
    """The module that owns a tensor: ``a.b`` for ``a.b.weight``; a bare parameter is its own module."""
    return tensor_name.removesuffix(".weight")


def extract(tensor: torch.Tensor, part: LinearPart) -> torch.Tensor:
    """The matrix ``[O, I]`` of ``part``, contiguous.

    Args:
        tensor: the whole source tensor, or the 2-D slice of ``part.expert`` where it was read alone.
        part: where the matrix lies.
    """
    return part_view(tensor, part).contiguous()


def insert(matrices: Iterable[tuple[LinearPart, torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
    """The source tensor of ``shape`` from all of its parts: the inverse of ``extract``.

    Args:
        matrices: every part of the tensor with its matrix ``[O, I]``, all of one dtype, in any order.
        shape: the source tensor's shape; the parts must fill it.
    """
    import torch

    tensor: torch.Tensor | None = None
    filled = 0
    for part, matrix_OI in matrices:
        if tensor is None:
            tensor = torch.empty(shape, dtype=matrix_OI.dtype)
        assert tensor.dtype == matrix_OI.dtype, "the parts of one tensor have one dtype"
        part_view(tensor, part).copy_(matrix_OI)
        filled += matrix_OI.numel()
    assert tensor is not None, "a tensor has at least one part"
    assert filled == tensor.numel(), f"the parts fill {filled} of {tensor.numel()} elements"
    return tensor


def part_view(tensor: torch.Tensor, part: LinearPart) -> torch.Tensor:
    """The part as a view ``[O, I]`` into ``tensor``, laid out as the source's (or one expert of that)."""
    if part.expert is not None and tensor.ndim == 3:
        tensor = tensor[part.expert]
    assert tensor.ndim == 2, f"{part.module}: expected a matrix, not {tuple(tensor.shape)}"
    matrix = tensor.T if part.transposed else tensor
    view = matrix[part.row_start : part.row_start + part.out_features]
    assert tuple(view.shape) == (part.out_features, part.in_features), (
        f"{part.module}: {tuple(view.shape)} is not {(part.out_features, part.in_features)}"
    )
    return view


# A name with None in the place of every number, and the numbers.
_Kind = tuple[str | None, ...]
_Numbers = tuple[str, ...]
_ANY = r"\d+"
_EXPERTS = re.compile(r"(?P<experts>(?:.*\.)?experts)\.")
# What vLLM asks for of a layer of experts: three matrices of expert 0, by either model's names for them
# (compressed_tensors_moe.py get_moe_method, ckpt_gate_proj_name and so on).
_FIRST_EXPERT = ("0.gate_proj", "0.up_proj", "0.down_proj", "0.w1", "0.w2", "0.w3")


def target_patterns(chosen: Set[str], all_linear: Set[str], *, exact: bool = False) -> list[str]:
    """Few ``targets`` or ``ignore`` entries that match ``chosen`` and nothing else of ``all_linear``.

    Numbers become ``\\d+`` where every known name so matched is chosen, else alternatives; siblings under one
    parent become alternatives of one entry; a module alone is written by its name. With ``exact`` every
    module is.

    Raises:
        CheckpointError: a name cannot be written as an entry (it starts with ``re:`` or has a line break).
    """
    assert chosen <= all_linear, "chosen modules must be known modules"
    entries = sorted(chosen) if exact else _few(chosen, all_linear)
    _check(entries, chosen, all_linear)
    return entries


def expert_patterns(tensor_names: Iterable[str], *, exact: bool = False) -> list[str]:
    """``ignore`` entries for experts that stay in one fused tensor, by every name that engines may ask for.

    vLLM looks experts up one by one (``experts.0.gate_proj``), and takes those that no entry matches for
    quantized ones, although the checkpoint has no modules of such names.

    Args:
        tensor_names: parameters that are copied as they are (``model.layers.3.mlp.experts.gate_up_proj``);
            those outside of ``experts`` are passed over.
        exact: plain names of expert 0, the one that vLLM asks for, instead of regexes over all of them.
    """
    owners = {found["experts"] for name in tensor_names if (found := _EXPERTS.match(name))}
    if exact:
        names = {f"{owner}.{leaf}" for owner in owners for leaf in _FIRST_EXPERT}
        return target_patterns(names, names, exact=True)
    # Only the first number is joined, and never to \d+: other layers' experts may be quantized.
    firsts: dict[tuple[_Kind, _Numbers], list[str]] = defaultdict(list)
    for kind, choices in _by_kind(owners).items():
        for choice in choices:
            firsts[kind, choice[1:]] += choice[:1]
    entries = []
    for (kind, rest), numbers in firsts.items():
        patterns = iter((_alternatives(numbers), *rest) if numbers else ())
        components = [next(patterns) if c is None else re.escape(c) for c in kind]
        entries.append("re:" + r"\.".join(components) + r"\..*$")
    return sorted(entries)


def _few(chosen: Set[str], all_linear: Set[str]) -> list[str]:
    """Names and regexes, as ``target_patterns`` describes them."""
    known_by_kind = _by_kind(all_linear)
    entries: list[str] = []
    leaves_by_parent: dict[tuple[_Kind, _Numbers], list[str]] = defaultdict(list)
    for kind, numbers in _by_kind(chosen).items():
        known = known_by_kind[kind]
        *parent, leaf = kind
        for choice in _cover(numbers, known) if len(known) > 1 else numbers:
            if leaf is None:
                entries.append(_entry(kind, choice, []))
            else:
                leaves_by_parent[tuple(parent), choice].append(leaf)
    entries += [_entry(parent, choice, leaves) for (parent, choice), leaves in leaves_by_parent.items()]
    return sorted(entries)


def _by_kind(names: Set[str]) -> dict[_Kind, set[_Numbers]]:
    """Names grouped by what they are but for their numbers. ``isdecimal`` is what ``\\d`` matches."""
    kinds: dict[_Kind, set[_Numbers]] = defaultdict(set)
    for name in names:
        components = name.split(".")
        kind = tuple(None if c.isdecimal() else c for c in components)
        kinds[kind].add(tuple(c for c in components if c.isdecimal()))
    return kinds


def _cover(chosen: set[_Numbers], known: set[_Numbers]) -> list[_Numbers]:
    """Patterns, one for each number, that together match ``chosen`` and nothing else of ``known``.

    First numbers whose remainders need the same patterns are joined: all experts of layers 0 and 3 are
    ``(0|3)``, ``\\d+``.
    """
    if chosen == known:
        return [(_ANY,) * len(next(iter(known)))]
    chosen_by_first, known_by_first = _by_first(chosen), _by_first(known)
    firsts_by_rest: dict[tuple[_Numbers, ...], list[str]] = defaultdict(list)
    for first, rest in chosen_by_first.items():
        firsts_by_rest[tuple(sorted(_cover(rest, known_by_first[first])))].append(first)
    return [
        (_ANY if len(firsts) == len(known_by_first) else _alternatives(firsts), *rest)
        for rests, firsts in firsts_by_rest.items()
        for rest in rests
    ]


def _by_first(numbers: set[_Numbers]) -> dict[str, set[_Numbers]]:
    groups: dict[str, set[_Numbers]] = defaultdict(set)
    for first, *rest in numbers:
        groups[first].add(tuple(rest))
    return groups


def _alternatives(words: Iterable[str]) -> str:
    """``a`` or ``(a|b)``, escaped; numbers in the order of their values."""
    ordered = [
        re.escape(word) for word in sorted(words, key=lambda word: (word.isdecimal() * len(word), word))
    ]
    return ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"


def _entry(kind: _Kind, choice: _Numbers, leaves: list[str]) -> str:
    """The name itself where it is one, else ``re:a\\.\\d+\\.(x|y)$``; ``leaves`` follow ``kind``."""
    numbers = iter(choice)
    if len(leaves) <= 1 and all(number.isdecimal() for number in choice):
        return ".".join([next(numbers) if c is None else c for c in kind] + leaves)
    components = [next(numbers) if c is None else re.escape(c) for c in kind]
    if leaves:
        components.append(_alternatives(leaves))
    return "re:" + r"\.".join(components) + "$"


def _check(entries: list[str], chosen: Set[str], all_linear: Set[str]) -> None:
    """Matches every known name as the readers do; only names that no entry can say can fail."""
    plain = {entry for entry in entries if not entry.startswith("re:")}
    patterns = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    regex = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")
    wrong = [name for name in all_linear if (name in plain or bool(regex.match(name))) != (name in chosen)]
    if wrong:
        raise CheckpointError(
            "the tensor's name cannot be written into a quantization config",
            where=repr(min(wrong)),
            fix="rename it in the source: no 're:' at the start, no line breaks",
        )
