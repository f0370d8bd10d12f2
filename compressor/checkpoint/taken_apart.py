"""What each stored tensor is a part of, from names, dtypes and shapes: any quantized checkpoint's weights.

Nothing is refused and nothing is read: a tensor whose role in a quantization is not known counts as a weight
of its own. Layouts as these write them: compressed-tensors 0.19 ``compressors/``, NVIDIA/Model-Optimizer
``export/quant_utils.py``, transformers 5.17 ``integrations/finegrained_fp8.py`` and ``mxfp4.py``, AutoAWQ 0.2
``modules/linear/gemm.py``, GPTQModel ``nn_modules/qlinear``, bitsandbytes 0.49 ``functional.py``
QuantState.as_dict.

Legend: O out_features, I in_features, G groups along I, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from compressor.checkpoint.layout import PACKED_DTYPES
from compressor.spec import DTYPE_BYTES

_WORD_BITS = 32
_MOST_BITS = 8
_CODES = frozenset({"U8", "I8", "I32", *PACKED_DTYPES})
# Behind the name of a module's codes ("weight", "gate_up_proj"): what belongs to them.
_BESIDE = (
    *("_scale", "_scale_inv", "_scale_2", "_scales", "_global_scale", "_weight_scale", "_weight_scale_2"),
    *("_weight_scale_inv", "_zero_point", "_shape", "_g_idx", "_input_scale", "_format"),
)
_INPUTS = frozenset(
    {"input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point"}
)
_KV = frozenset({"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"})
_WORDS = ("qweight", "qzeros", "scales", "g_idx")
_BNB = "quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies; ``dtype`` is safetensors' or ggml's name, ``nbytes`` what it takes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the model, whatever it is stored as.

    Attributes:
        name: its plain name (``...up_proj.weight``).
        shape: its plain shape; of layouts that hide it the number of its values and 1.
        scheme: what it is stored as: ``NVFP4A16``, ``W4A16 g128``, ``AWQ 4-bit g128``, ``BF16``.
        nbytes: codes and everything that belongs to them.
        quantized: whether there are codes.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    quantized: bool

    @property
    def values(self) -> int:
        """How many numbers the weight has."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class IntegerGroup:
    """A group of compressed-tensors' config, as far as packed integers need it; ``size`` None is a row."""

    bits: int
    size: int | None
    symmetric: bool
    rounds_inputs: bool


@dataclass(frozen=True, slots=True)
class _Told:
    """What a description says that names and shapes do not."""

    groups: Sequence[IntegerGroup]
    blocks: bool


def take_apart(
    stored: Iterable[StoredTensor], description: Mapping[str, Any]
) -> tuple[list[Weight], list[StoredTensor]]:
    """The weights, in the order of their codes, and the scales of a quantized KV cache.

    Args:
        stored: every tensor.
        description: ``quantization_config``, unchecked; empty where there is none.
    """
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    kv = []
    for tensor in stored:
        module, leaf = _split(tensor.name)
        if leaf in _KV:
            kv.append(tensor)
        else:
            modules[module][leaf] = tensor
    told = _Told(integer_groups(description), _in_blocks(description))
    return [weight for module, leaves in modules.items() for weight in _weights(module, leaves, told)], kv


def integer_groups(description: Mapping[str, Any]) -> list[IntegerGroup]:
    """The groups of a config that store integers; what is not laid out as one is passed over."""
    groups = description.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if type(bits) is int and 1 <= bits <= _MOST_BITS:
            one = size if type(size) is int and size > 0 else None
            symmetric = weights.get("symmetric") is not False
            found.append(IntegerGroup(bits, one, symmetric, bool(group.get("input_activations"))))
    return found


def _in_blocks(description: Mapping[str, Any]) -> bool:
    """Whether FP8 has scales for blocks: a matrix of one block has one, as if it were for all of it."""
    groups = description.get("config_groups")
    strategies = [
        weights.get("strategy")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(weights := group.get("weights"), Mapping)
    ]
    pb = str(description.get("quant_algo")).lower().startswith("fp8_pb")
    return bool(description.get("weight_block_size")) or "block" in strategies or pb


def _split(name: str) -> tuple[str, str]:
    """Module and local name; of bitsandbytes' ``a.weight.absmax`` the module is ``a``."""
    module, mark, rest = name.partition(".weight.")
    if mark:
        return module, f"weight.{rest}"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _weights(module: str, leaves: Mapping[str, StoredTensor], told: _Told) -> Iterator[Weight]:
    """What a module's tensors are."""
    gone: set[str] = set()
    found: dict[str, Weight] = {}
    for leaf in leaves:
        if leaf in gone:
            continue
        stem = _stem(leaf, leaves)
        if stem is None:
            continue
        beside = _beside(stem, leaf, leaves)
        # Integers that nothing belongs to are plain ones: positions, tables.
        if leaves[leaf].dtype in ("I32", "I8", "U8") and not beside:
            continue
        gone.update(beside)
        parts = {other: leaves[other] for other in (leaf, *beside)}
        scheme, shape = _read_as(leaf, stem, parts, told)
        name = ".".join(filter(None, (module, "weight" if leaf == "qweight" else stem)))
        found[leaf] = Weight(name, shape, scheme, sum(part.nbytes for part in parts.values()), True)
    for leaf, tensor in leaves.items():
        if leaf in found:
            yield found[leaf]
        elif leaf not in gone:
            # ggml's types are none of safetensors': codes and scales in one.
            packed = tensor.dtype not in DTYPE_BYTES
            yield Weight(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, packed)


def _stem(leaf: str, leaves: Mapping[str, StoredTensor]) -> str | None:
    """What the weight is called whose codes this tensor is; None where it is none's."""
    if leaf == "weight_packed":
        return "weight"
    if leaf == "qweight":
        return "qweight" if {"scales", "qzeros"} & leaves.keys() else None
    stem = leaf.removesuffix("_blocks")
    if stem != leaf and f"{stem}_scales" in leaves:
        return stem
    # bitsandbytes may keep its codes in words of any dtype.
    is_code = (
        (leaves[leaf].dtype in _CODES or f"{leaf}.absmax" in leaves)
        and leaf not in _INPUTS
        and leaf not in _WORDS
    )
    of_others = any(
        leaf.endswith(end)
        and (leaf.removesuffix(end) in leaves or f"{leaf.removesuffix(end)}_packed" in leaves)
        for end in _BESIDE
    )
    return leaf if is_code and not of_others and not leaf.startswith("weight.") else None


def _beside(stem: str, codes: str, leaves: Mapping[str, StoredTensor]) -> list[str]:
    """The other tensors that belong to the codes."""
    if codes == "qweight":
        return [leaf for leaf in _WORDS if leaf in leaves and leaf != codes]
    named = {f"{stem}{end}" for end in _BESIDE}
    if stem == "weight":
        named |= _INPUTS | {"SCB", "weight_format"}
    return [
        leaf for leaf in leaves if leaf != codes and (leaf in named or (leaf.startswith(f"{stem}.") and stem))
    ]


def _read_as(
    leaf: str, stem: str, parts: Mapping[str, StoredTensor], told: _Told
) -> tuple[str, tuple[int, ...]]:
    """Scheme and plain shape of a weight."""
    codes = parts[leaf]
    if leaf == "qweight":
        return _words(codes, parts)
    if leaf.endswith("_blocks"):
        return "MXFP4", (*codes.shape[:-2], 2 * prod(codes.shape[-2:]))
    state = next((other for other in parts if _BNB in other), None)
    if state is not None:
        return f"{state.partition(_BNB)[2].upper()} (bitsandbytes)", (2 * codes.nbytes, 1)
    if codes.dtype == "I32":
        return _packed_integers(codes, _scale(stem, parts), told.groups, "weight_zero_point" in parts)
    if codes.dtype == "U8":
        return _nibbles(stem, codes, parts)
    if codes.dtype == "I8":
        return _bytes_of_integers(codes, parts, told.groups)
    if codes.dtype not in PACKED_DTYPES:
        return codes.dtype, codes.shape
    return _fp8(stem, codes, parts, told.blocks), codes.shape


def _scale(stem: str, parts: Mapping[str, StoredTensor]) -> StoredTensor | None:
    ends = ("_scale", "_scale_inv", "_weight_scale", "_weight_scale_inv", "_scales")
    return next((parts[f"{stem}{end}"] for end in ends if f"{stem}{end}" in parts), None)


def _words(codes: StoredTensor, parts: Mapping[str, StoredTensor]) -> tuple[str, tuple[int, ...]]:
    """AWQ packs along O, GPTQ along I: scales are [G, O] in both. Bits follow from the shapes."""
    scales = parts.get("scales")
    if (
        scales is None
        or len(scales.shape) != 2
        or len(codes.shape) != 2
        or 0 in (*scales.shape, *codes.shape)
    ):
        return "32-bit words of codes", (codes.nbytes, 1)
    count, out_features = scales.shape
    rows, columns = codes.shape
    if columns != out_features:
        bits, in_features, method = _WORD_BITS * columns // out_features, rows, "AWQ"
        if not 2 <= bits <= _MOST_BITS:  # words along I, as kernels for single tokens want them
            return "32-bit words of codes", (codes.nbytes, 1)
    else:
        zeros = parts.get("qzeros")
        asked = zeros.shape[-1] if zeros is not None and zeros.shape else out_features // 8
        bits, method = max(1, _WORD_BITS * asked // out_features), "GPTQ"
        in_features = _WORD_BITS * rows // bits
    size = f" g{in_features // count}" if count > 1 else ""
    return f"{method} {bits}-bit{size}", (out_features, in_features)


def _packed_integers(
    codes: StoredTensor, scale: StoredTensor | None, groups: Sequence[IntegerGroup], has_zeros: bool
) -> tuple[str, tuple[int, ...]]:
    """compressed-tensors' ``pack-quantized``: the group of the config that the shapes fit."""
    if len(codes.shape) != 2 or scale is None or len(scale.shape) != 2:
        return "packed integers", codes.shape
    rows, words = codes.shape
    for group in groups:
        in_features = scale.shape[1] * group.size if group.size else words * _WORD_BITS // group.bits
        if -(-in_features * group.bits // _WORD_BITS) == words and group.symmetric is not has_zeros:
            size = f" g{group.size}" if group.size else ""
            inputs = 8 if group.rounds_inputs else 16
            return f"W{group.bits}A{inputs}{'_ASYM' if has_zeros else ''}{size}", (rows, in_features)
    return "packed integers", codes.shape


def _nibbles(
    stem: str, codes: StoredTensor, parts: Mapping[str, StoredTensor]
) -> tuple[str, tuple[int, ...]]:
    """Two codes of 4 bits in a byte."""
    scale = _scale(stem, parts)
    if scale is None or not codes.shape:
        return "U8", codes.shape
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if scale.dtype in ("U8", "F8_E8M0"):
        return "MXFP4", shape
    return ("NVFP4" if _static_inputs(stem, parts) else "NVFP4A16"), shape


def _bytes_of_integers(
    codes: StoredTensor, parts: Mapping[str, StoredTensor], groups: Sequence[IntegerGroup]
) -> tuple[str, tuple[int, ...]]:
    if "SCB" in parts:
        return "LLM.int8 (bitsandbytes)", codes.shape
    return ("W8A8" if any(group.rounds_inputs for group in groups) else "W8A16"), codes.shape


def _fp8(stem: str, codes: StoredTensor, parts: Mapping[str, StoredTensor], blocks: bool) -> str:
    """Named by what its scales cover, and by whether one of the inputs is stored."""
    scale = _scale(stem, parts)
    kind = "FP8" if codes.dtype == "F8_E4M3" else codes.dtype
    if scale is None:
        return f"{codes.dtype}, no scale"
    static = _static_inputs(stem, parts)
    # Experts in one tensor have scales each.
    covered = [size for size in scale.shape[len(scale.shape) == 3 :] if size != 1]
    if blocks and len(scale.shape) > 1:
        return f"{kind}_BLOCK"
    if not covered:
        return kind if static else f"{kind} per tensor"
    if len(covered) == 1 and covered[0] in codes.shape:
        return f"{kind} per row, static inputs" if static else f"{kind}_DYNAMIC"
    return f"{kind}_BLOCK"


def _static_inputs(stem: str, parts: Mapping[str, StoredTensor]) -> bool:
    names = ("input_scale", "input_global_scale", f"{stem}_input_scale")
    return any(name in parts for name in names)
