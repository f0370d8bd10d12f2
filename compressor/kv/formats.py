"""``FORMATS``: how a KV cache can be stored, by name. Importing this does not import torch: plans need it.

Sizes follow vLLM 0.32's ``v1/kv_cache_interface.py``, ``utils/torch_utils.py`` and
``model_executor/layers/quantization/turboquant/config.py``, and TurboQuant (arXiv 2504.19874), section 3.
Legend: D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points

from compressor.errors import UserError
from compressor.kv.base import KvCodec, KvFormat

ENTRY_POINT_GROUP = "compressor.kv_formats"

NORM_BYTES = 2  # norms, scales and zero points of TurboQuant are fp16
SCALE_BYTES = 4  # scales per token and head are fp32
NVFP4_BLOCK = 16
# A vector this long is split into two parts with a norm each; a shorter one keeps one norm for both.
TWO_NORMS_FROM = 128
ENDS = 2  # vLLM 0.32 keeps this many attention layers at either end of a dense model in 16 bit

Made = tuple[KvCodec, KvCodec]


def code_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one vector's codes."""
    return -(-head_dim * bits // 8)


def split_sizes(head_dim: int) -> tuple[int, int]:
    """Coordinates that get one bit more, and the others: a quarter and three quarters."""
    return head_dim // 4, head_dim - head_dim // 4


def split_norms(head_dim: int) -> int:
    """How many norms a vector with an outlier split has."""
    return 2 if head_dim >= TWO_NORMS_FROM else 1


def split_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a slot with a quarter of the coordinates at ``bits + 1`` and the rest at ``bits``."""
    many, few = split_sizes(head_dim)
    return code_bytes(many, bits + 1) + code_bytes(few, bits) + NORM_BYTES * split_norms(head_dim)


def _plain(head_dim: int, bits: int, extra: int) -> int:
    return code_bytes(head_dim, bits) + extra


def _fitted(head_dim: int, bits: float) -> int:
    return int(head_dim * bits / 8)


def _nvfp4(head_dim: int) -> int:
    return code_bytes(head_dim, 4) + head_dim // NVFP4_BLOCK


def _bf16() -> Made:
    from compressor.kv.bf16 import Bf16Codec

    return Bf16Codec(), Bf16Codec()


def _fp8() -> Made:
    from compressor.kv.fp8 import Fp8Codec

    return Fp8Codec(), Fp8Codec()


def _fp8_token_head() -> Made:
    from compressor.kv.fp8 import Fp8TokenHeadCodec

    return Fp8TokenHeadCodec(), Fp8TokenHeadCodec()


def _int8_token_head() -> Made:
    from compressor.kv.integer import Int8TokenHeadCodec

    return Int8TokenHeadCodec(), Int8TokenHeadCodec()


def _int4_token_head() -> Made:
    from compressor.kv.integer import Int4TokenHeadCodec

    return Int4TokenHeadCodec(), Int4TokenHeadCodec()


def _nvfp4_codecs(four_over_six: bool) -> Made:
    from compressor.kv.nvfp4 import Nvfp4Codec

    return Nvfp4Codec(four_over_six=four_over_six), Nvfp4Codec(four_over_six=four_over_six)


def _vllm_turboquant(key_bits: int, value_bits: int) -> Made:
    from compressor.kv.fp8 import Fp8Codec
    from compressor.kv.vllm_turboquant import VllmTurboKeyCodec, VllmTurboValueCodec

    key: KvCodec = Fp8Codec() if key_bits == 8 else VllmTurboKeyCodec(bits=key_bits)
    return key, VllmTurboValueCodec(bits=value_bits)


def _mse(bits: int) -> Made:
    from compressor.kv.turboquant import TurboMseCodec

    return TurboMseCodec(bits=bits), TurboMseCodec(bits=bits)


def _prod(bits: int) -> Made:
    from compressor.kv.turboquant import TurboMseCodec, TurboProdCodec

    return TurboProdCodec(bits=bits), TurboMseCodec(bits=bits)


def _split(bits: int) -> Made:
    from compressor.kv.turboquant import TurboSplitCodec

    return TurboSplitCodec(bits=bits), TurboSplitCodec(bits=bits)


def _both(size: Callable[[int], int]) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Keys and values of one size."""
    return size, size


def _preset(name: str, key_bits: int, value_bits: int, note: str) -> KvFormat:
    """One of vLLM's TurboQuant presets; e4m3 keys have no norm and are not rotated."""
    return KvFormat(
        name=name,
        tier="vllm",
        key_bytes=partial(_plain, bits=key_bits, extra=0 if key_bits == 8 else NORM_BYTES),
        value_bytes=partial(_plain, bits=value_bits, extra=2 * NORM_BYTES),
        make=partial(_vllm_turboquant, key_bits, value_bits),
        power_of_two=key_bits != 8,
        multiple_of=4 if key_bits == 8 else 16,
        skips_ends=ENDS,
        note=note,
    )


def _vllm_formats() -> tuple[KvFormat, ...]:
    return (
        KvFormat("bf16", "vllm", *_both(partial(_plain, bits=16, extra=0)), make=_bf16, note="not quantized"),
        KvFormat(
            "fp8",
            "vllm",
            *_both(partial(_plain, bits=8, extra=0)),
            make=_fp8,
            note="e4m3 with one scale for a layer's keys and one for its values, 1 unless fitted",
        ),
        KvFormat(
            "fp8_per_token_head",
            "vllm",
            *_both(partial(_plain, bits=8, extra=SCALE_BYTES)),
            make=_fp8_token_head,
            note="e4m3 with an fp32 scale for each token and head",
        ),
        KvFormat(
            "int8_per_token_head",
            "vllm",
            *_both(partial(_plain, bits=8, extra=SCALE_BYTES)),
            make=_int8_token_head,
            note="symmetric 8-bit integers with an fp32 scale for each token and head",
        ),
        KvFormat(
            "int4_per_token_head",
            "vllm",
            *_both(partial(_plain, bits=4, extra=SCALE_BYTES)),
            make=_int4_token_head,
            multiple_of=2,
            note="rotated 4-bit integers; the zero point lies in the low bits of the fp32 scale",
        ),
        KvFormat(
            "nvfp4",
            "vllm",
            *_both(_nvfp4),
            make=partial(_nvfp4_codecs, False),
            multiple_of=NVFP4_BLOCK,
            note="e2m1 in blocks of 16 with e4m3 scales",
        ),
        KvFormat(
            "nvfp4_4over6",
            "vllm",
            *_both(_nvfp4),
            make=partial(_nvfp4_codecs, True),
            multiple_of=NVFP4_BLOCK,
            note="nvfp4 with the better of two scales for each block",
        ),
        _preset("turboquant_k8v4", 8, 4, "e4m3 keys, 4-bit min-max values"),
        _preset("turboquant_4bit_nc", 4, 4, "rotated 4-bit codebook keys, 4-bit min-max values"),
        _preset("turboquant_k3v4_nc", 3, 4, "rotated 3-bit codebook keys, 4-bit min-max values"),
        _preset("turboquant_3bit_nc", 3, 3, "rotated 3-bit codebook keys, 3-bit min-max values"),
    )


def _own_formats() -> Iterator[KvFormat]:
    for bits in (1, 2, 3, 4):
        yield KvFormat(
            f"turboquant_mse_{bits}bit",
            "own",
            *_both(partial(_plain, bits=bits, extra=NORM_BYTES)),
            make=partial(_mse, bits),
            multiple_of=8,
            note="the paper's TurboQuant for squared error, keys and values",
        )
    for bits in (2, 3, 4):
        yield KvFormat(
            f"turboquant_prod_{bits}bit",
            "own",
            # The residual's norm beside the vector's.
            key_bytes=partial(_plain, bits=bits, extra=2 * NORM_BYTES),
            value_bytes=partial(_plain, bits=bits, extra=NORM_BYTES),
            make=partial(_prod, bits),
            multiple_of=8,
            note="the paper's TurboQuant for inner products (QJL) on keys, for squared error on values",
        )
    for bits in (2, 3):
        yield KvFormat(
            f"turboquant_{bits}.5bit",
            "own",
            *_both(partial(split_bytes, bits=bits)),
            make=partial(_split, bits),
            multiple_of=32,
            note=f"a quarter of the coordinates at {bits + 1} bits, the rest at {bits}",
        )


def _research_formats() -> Iterator[KvFormat]:
    for bits in (2.5, 3.5):
        yield KvFormat(
            f"fitted_{bits}bit",
            "research",
            # The mean over layers, keys and values: fitting shares out bytes by what they are worth.
            *_both(partial(_fitted, bits=bits)),
            make=None,
            note="codebooks fitted to the model's texts; bytes differ from layer to layer",
        )


class KvFormats(Mapping[str, KvFormat]):
    """Name -> format: the built-in ones, then those that other packages add (entry points).

    An entry point of the group ``compressor.kv_formats`` is named as its format and leads to a ``KvFormat``.
    """

    def __init__(self, builtins: tuple[KvFormat, ...]) -> None:
        self._builtins = {found.name: found for found in builtins}
        assert len(self._builtins) == len(builtins), "two built-in formats of one name"

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name in self._builtins or point.name in found:
                raise _fault(point, "clashes with another of that name")
            found[point.name] = point
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._builtins
        yield from self._plugins

    def __len__(self) -> int:
        return len(self._builtins) + len(self._plugins)

    def __getitem__(self, name: str) -> KvFormat:
        """The format; an unknown name is a KeyError.

        Raises:
            UserError: the package that adds the name cannot be loaded or adds something else.
        """
        if name in self._builtins:
            return self._builtins[name]
        point = self._plugins[name]
        try:
            found = point.load()
        except Exception as error:  # a plug-in may fail in any way; the user needs its package's name
            raise _fault(point, f"cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(found, KvFormat):
            raise _fault(point, f"is no KvFormat but {found!r}")
        if found.name != point.name:
            raise _fault(point, f"calls itself {found.name!r}")
        return found

    def find(self, name: str) -> KvFormat:
        """The format of a name that a user wrote.

        Raises:
            ValueError: unknown, with the known names and the nearest.
            UserError: a package's entry point is broken.
        """
        if name in self:
            return self[name]
        near = get_close_matches(name.lower(), list(self), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown KV-cache format {name!r}{hint} (known: {', '.join(self)})")


def _fault(point: EntryPoint, what: str) -> UserError:
    package = point.dist.name if point.dist is not None else "(unknown)"
    return UserError(
        f"the KV-cache format {point.name!r} of package {package} ({point.value}) {what}",
        where=f"entry point group {ENTRY_POINT_GROUP}",
        fix=f"update or uninstall package {package}",
    )


FORMATS = KvFormats((*_vllm_formats(), *_own_formats(), *_research_formats()))
