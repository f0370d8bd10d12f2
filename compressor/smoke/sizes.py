"""The numbers of a small config: widths, heads, experts and vocabulary that divide as the real ones do.

Legend: a width is what linear layers read or write. ``TILE`` is the largest group or block of any scheme: a
width that is a multiple of 64 but not of 128 stays that, so that a recipe plans on the small model as on the
real one. Equal widths stay equal and whole multiples of the hidden size stay multiples, so that layers that
fit together still do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count as integers
from math import gcd
from typing import Any

TILE = 128
HIDDEN = 256
INTERMEDIATE = 192
TOWER_HIDDEN = 128
TOWER_LAYERS = 2
WINDOW = 16
EXPERTS, CHOSEN_EXPERTS = 4, 2
_MULTIPLES = 8

# As configs of transformers 5.17 spell them.
_HIDDEN = "hidden_size"
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")
_WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("moe_shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"),
    *("dense_intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "inner_dim", "d_ff"),
    *("q_lora_rank", "kv_lora_rank", "o_lora_rank", "word_embed_proj_dim", "mamba_dt_rank", "time_step_rank"),
    *("vision_output_dim", "projector_input_dim", "projector_output_dim", "projection_dim"),
    *("out_hidden_size", "output_dim", "mm_tokens_hidden_size"),
)
_HEADS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads")
_HEAD_WIDTHS = ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_head_dim")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k")
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass
class Sizes:
    """Chooses small numbers for the sections of one config; the same real width is the same small one.

    Attributes:
        widths: real width -> small width, filled as sections are seen; the decoder's first.
    """

    widths: dict[int, int] = field(default_factory=dict)

    def of(self, section: Any, raw: Mapping[str, Any], *, tower: bool) -> dict[str, Any]:
        """What changes in a section: key -> small number.

        Args:
            section: as transformers has it, with every default.
            raw: the same as config.json states it.
            tower: whether it is another modality's, not the decoder's.
        """
        changed: dict[str, Any] = {}
        self._heads(section, raw, changed, tower=tower)
        hidden = _size(section, _HIDDEN)
        for key in _WIDTHS:
            if width := _size(section, key):
                changed[key] = self._width(width, hidden, changed.get(_HIDDEN, hidden))
        _linear_attention(section, changed)
        _state_space(section, changed)
        _experts(section, changed)
        for key in _WINDOWS:
            if window := _size(section, key):
                changed[key] = min(window, WINDOW)
        return {key: value for key, value in changed.items() if value != getattr(section, key, None)}

    def _heads(self, section: Any, raw: Mapping[str, Any], changed: dict[str, Any], *, tower: bool) -> None:
        """Hidden size and heads: widths of heads stay, so that rotary tables and their factors do."""
        hidden, key = _size(section, _HIDDEN), _first(section, _HEADS)
        if not hidden:
            return
        if key is None:
            changed[_HIDDEN] = self._width(hidden, least=HIDDEN)
            return
        heads = _size(section, key)
        stated = _size(section, "num_key_value_heads")
        groups = stated if stated and heads % stated == 0 else heads
        own = {_size(section, name) for name in _HEAD_WIDTHS} - {0}
        derived = not own or (hidden % heads == 0 and _inferred(section, raw, heads))
        every = {hidden // heads} if derived else own | ({_query_width(section)} - {0})
        # A tower is copied, so nothing in it needs to divide.
        tile, least = (1, TOWER_HIDDEN) if tower else (TILE, TILE)
        changed[key], small_groups = _small_heads(heads, groups, every, least, tile)
        if stated:
            changed["num_key_value_heads"] = small_groups
        if derived:
            # The hidden size is what the heads make together.
            self.widths.setdefault(hidden, changed[key] * (hidden // heads))
        # Some config classes want a multiple of the heads, even where these have a width of their own.
        changed[_HIDDEN] = self._width(hidden, least=HIDDEN, step=1 if hidden % heads else changed[key])

    def _width(
        self, width: int, hidden: int = 0, small: int = 0, *, least: int = INTERMEDIATE, step: int = 1
    ) -> int:
        """The small width; a new one is like no other and has the same part of a tile, in steps of ``step``.

        Multiples of the real hidden size, where that is given, become multiples of the small one.
        """
        if width in self.widths:
            return self.widths[width]
        if hidden and width % hidden == 0 and 1 < width // hidden <= _MULTIPLES:
            made = width // hidden * small
        else:
            part = gcd(width, TILE)
            taken = set(self.widths.values())
            fitting = [
                size
                for size in range(part, width, part)
                if gcd(size, TILE) == part and size % step == 0 and size not in taken
            ]
            # The next one from ``least`` on, else the next below.
            made = min(fitting, key=lambda size: (size < least, abs(size - least)), default=width)
        return self.widths.setdefault(width, made)


def small_vocabulary(size: int, least: int) -> int:
    """A vocabulary of at least ``least`` that has the same part of a tile; never a larger one."""
    part = gcd(size, TILE)
    fitting = (part * times for times in integers(1) if gcd(part * times, TILE) == part)
    return min(size, next(found for found in fitting if found >= least))


def layers_key(section: Any) -> str | None:
    """The key that counts a section's blocks."""
    return _first(section, _LAYERS)


def experts(section: Any) -> int:
    """How many routed experts a layer has; 0 where the config names none."""
    key = _first(section, _EXPERTS)
    return _size(section, key) if key else 0


def _small_heads(
    heads: int, groups: int, widths: Iterable[int], least: int, tile: int = TILE
) -> tuple[int, int]:
    """The fewest query and key heads that divide as the real ones do; two key heads rather than one."""
    widths = tuple(widths)

    def fits(few: int, many: int) -> bool:
        return all(gcd(few * width, tile) == gcd(many * width, tile) for width in widths)

    found = [
        (few * (1 if kept > 1 or groups == 1 else 3), few, kept)
        for few in range(1, heads + 1)
        for kept in range(1, min(few, groups) + 1)
        if few % kept == 0
        and (few == kept) == (heads == groups)
        and fits(few, heads)
        and fits(kept, groups)
        and (few * max(widths) >= least or few == heads)
    ]
    _, few, kept = min(found, default=(0, heads, groups))
    return few, kept


def _inferred(section: Any, raw: Mapping[str, Any], heads: int) -> bool:
    """Whether the width of a head is nowhere in config.json but follows from the hidden size."""
    if raw.get("head_dim") is not None or _size(section, "kv_lora_rank"):
        return False
    return getattr(section, "head_dim", None) in (None, _size(section, _HIDDEN) // heads)


def _query_width(section: Any) -> int:
    """Of a head with a part that has positions and one that has not (multi-head latent attention)."""
    parts = [_size(section, key) for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    return sum(parts) if all(parts) else 0


def _linear_attention(section: Any, changed: dict[str, Any]) -> None:
    """Few key heads and as many value heads for each as there were (Qwen3-Next, Qwen3.5)."""
    keys, values = (_size(section, f"linear_num_{which}_heads") for which in ("key", "value"))
    if keys and values:
        widths = [_size(section, f"linear_{which}_head_dim") for which in ("key", "value")]
        made = _small_heads(values, keys, widths, least=1)
        changed["linear_num_value_heads"], changed["linear_num_key_heads"] = made


def _state_space(section: Any, changed: dict[str, Any]) -> None:
    """Heads of Mamba 2 that must fill the expanded hidden size (Bamba, Granite 4); others stay."""
    hidden, heads, width = (_size(section, key) for key in (_HIDDEN, "mamba_n_heads", "mamba_d_head"))
    if hidden and heads and width and heads * width % hidden == 0:
        inner = heads * width // hidden * changed.get(_HIDDEN, hidden)
        changed["mamba_n_heads"] = max(1, inner // width)
        if groups := _size(section, "mamba_n_groups"):
            changed["mamba_n_groups"] = gcd(groups, changed["mamba_n_heads"])


def _experts(section: Any, changed: dict[str, Any]) -> None:
    """A few experts, of which a token passes two at most; in two groups where they are chosen by groups."""
    total, few = experts(section), EXPERTS
    if not total:
        return
    if _size(section, "n_group") > 1:
        changed["n_group"], changed["topk_group"] = 2, 1
        few = 2 * EXPERTS
    for key in _EXPERTS:
        if _size(section, key):
            changed[key] = min(total, few)
    for key in _CHOSEN:
        if chosen := _size(section, key):
            changed[key] = min(chosen, CHOSEN_EXPERTS)


def _size(section: Any, key: str) -> int:
    """The number under a key of a config; 0 where there is none."""
    value = getattr(section, key, None)
    return value if type(value) is int and value > 0 else 0


def _first(section: Any, keys: Iterable[str]) -> str | None:
    """The first of the keys that has a number."""
    return next((key for key in keys if _size(section, key)), None)
