"""What a config.json says of rotary positions, wherever it says it. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from compressor.errors import CheckpointError
from compressor.model.families.naming import TEXT_KEYS

LONGEST = 2**31 - 1  # tokens: positions are 32-bit integers in engines
_WIDEST = 2**16  # dimensions of a head
_SHOWN = 60
_LARGEST = 1e300  # an integer beyond would overflow as a float

# Configs of before transformers 5 may leave theta and the turned part out: these are its config classes' own.
_THETA = dict.fromkeys(
    ("gemma", "gemma2", "gpt_neox", "llama", "mistral", "olmo", "phi", "phi3", "qwen2", "qwen2_moe"), 1e4
) | dict.fromkeys(("stablelm", "starcoder2"), 1e4)
_PART = dict.fromkeys(
    ("fuyu", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "nemotron", "persimmon", "phi"), 0.5
) | dict.fromkeys(
    ("gpt_neox", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "stablelm"),
    0.25,
)
# Model types whose config calls the size of a head otherwise.
_HEAD = {"jetmoe": "kv_channels", "zamba2": "attention_head_dim"}
# Model types whose layers are told apart even where the config names one theta: the key of the local layers'
# theta, and what both are where neither is there.
_LAYERED = {
    "gemma3_text": ("rope_local_base_freq", 1e6, 1e4),
    "gemma3n_text": ("rope_local_base_freq", 1e6, 1e4),
    "olmo3": ("rope_theta", 5e5, 5e5),
}
LOCAL_KINDS = frozenset({"sliding_attention", "chunked_attention"})
FULL, SLIDING = "full_attention", "sliding_attention"

_THETAS = ("rope_theta", "rotary_emb_base")
_PARTS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")


@dataclass(frozen=True)
class Positions:
    """Rotary positions of a model.

    Attributes:
        path: keys from the config's root to the language model's part.
        text: that part.
        model_type: its ``model_type``.
        kind: of the layers whose positions reach over the whole text, or None where all layers share theirs.
        parameters: their ``rope_parameters``, theta and turned part filled in.
        others: ``rope_parameters`` of the other kinds of layers.
        rotary_dim: dimensions of a head that are turned.
        length: ``max_position_embeddings``, or None.
        original_length: tokens of the training before a scaling, or None where the config does not say.
    """

    path: tuple[str, ...]
    text: Mapping[str, Any]
    model_type: str
    kind: str | None
    parameters: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any] | None]
    rotary_dim: int
    length: int | None
    original_length: int | None

    @property
    def theta(self) -> float:
        """Base of the frequencies."""
        return float(self.parameters["rope_theta"])

    @property
    def rope_type(self) -> str:
        """How they are scaled now."""
        return str(self.parameters["rope_type"])

    @property
    def latent(self) -> bool:
        """Whether keys and values are stored as a latent (MLA), beside which a part of its own is turned."""
        return "kv_lora_rank" in self.text and "qk_rope_head_dim" in self.text


def text_part(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Keys to the language model's part of a config.json, and that part."""
    for key in TEXT_KEYS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            path, text = text_part(nested)
            return (key, *path), text
    return (), config


def read_positions(config: Mapping[str, Any]) -> Positions:
    """What the config says; nothing of it is judged but what no reading could go on with.

    Raises:
        CheckpointError: no rotary positions, or none that can be read.
    """
    path, text = text_part(config)
    kind_of_model = str(text.get("model_type") or config.get("model_type") or "")
    kind, parameters, others = _parameters(text, kind_of_model)
    if "rope_theta" not in parameters:
        theta = _first(text, _THETAS, _THETA.get(kind_of_model))
        if theta is None:
            raise unfit(
                f"no rope_theta: model_type {kind_of_model!r} has no rotary positions that can be scaled",
                "leave the section context out",
            )
        parameters["rope_theta"] = theta
    theta = parameters["rope_theta"]
    if not is_number(theta) or not 1 < theta < 1e18:
        raise unfit(f"rope_theta is {shown(theta)}, not a number above 1")
    return Positions(
        path=path,
        text=text,
        model_type=kind_of_model,
        kind=kind,
        parameters=parameters,
        others=others,
        rotary_dim=_rotary_dim(text, kind_of_model, parameters),
        length=_length(text, "max_position_embeddings"),
        original_length=_length(parameters, "original_max_position_embeddings")
        or _length(text, "original_max_position_embeddings"),
    )


def _parameters(
    text: Mapping[str, Any], model_type: str
) -> tuple[str | None, dict[str, Any], dict[str, Mapping[str, Any] | None]]:
    """Kind of the far-reaching layers, their parameters, those of the others."""
    written, legacy = _section(text, "rope_parameters"), _section(text, "rope_scaling")
    if _is_layered(written):
        far = [kind for kind, told in written.items() if kind not in LOCAL_KINDS and told is not None]
        if len(far) != 1:
            raise unfit(f"rope_parameters has {len(far)} kinds of layers over the whole text, not one")
        others = {kind: told for kind, told in written.items() if kind != far[0]}
        return far[0], _named(written[far[0]] | legacy), others
    # transformers 5.17: the legacy section wins where both are there.
    found = _named(legacy or written)
    layered = _LAYERED.get(model_type)
    if layered is None:
        return None, found, {}
    local_key, theta, local_theta = layered
    found.setdefault("rope_theta", text.get("rope_theta", theta))
    local = {"rope_type": "default", "rope_theta": text.get(local_key, local_theta)}
    return FULL, found, {SLIDING: local}


def _is_layered(written: Mapping[str, Any]) -> bool:
    """Whether ``rope_parameters`` is one object for each kind of layers.

    Raises:
        CheckpointError: it is that and fields of one, which engines read as one or the other.
    """
    nested = [isinstance(value, Mapping) for value in written.values() if value is not None]
    if any(nested) and not all(nested):
        raise unfit("rope_parameters mixes fields with kinds of layers")
    return any(nested)


def _named(told: Mapping[str, Any]) -> dict[str, Any]:
    """With ``rope_type``, where a config of before says ``type``."""
    found = dict(told)
    legacy = found.pop("type", None)
    found.setdefault("rope_type", legacy or "default")
    if found["rope_type"] == "su":
        found["rope_type"] = "longrope"
    # vLLM and transformers read positions of three axes as unscaled ones with ``mrope_section`` beside.
    if found["rope_type"] == "mrope" and "mrope_section" in found:
        found["rope_type"] = "default"
    return found


def _rotary_dim(text: Mapping[str, Any], model_type: str, parameters: dict[str, Any]) -> int:
    """Dimensions that are turned; writes the turned part into ``parameters`` where it is not all of a head.

    Raises:
        CheckpointError: sizes are missing or make no sense.
    """
    if "kv_lora_rank" in text and "qk_rope_head_dim" in text:
        return _even(_size(text, "qk_rope_head_dim"))
    key = _HEAD.get(model_type, "head_dim")
    head = head_dim(text) if text.get(key) is None else _size(text, key)
    part = parameters.get("partial_rotary_factor", _first(text, _PARTS, _PART.get(model_type, 1.0)))
    if not is_number(part) or not 0 < part <= 1:
        raise unfit(f"partial_rotary_factor is {shown(part)}, not above 0 and at most 1")
    if part != 1:
        parameters["partial_rotary_factor"] = part
    return _even(int(head * part))


def head_dim(text: Mapping[str, Any]) -> int:
    """Dimensions of a head where the config does not say: an equal share of the hidden state.

    Raises:
        CheckpointError: sizes are missing or make no sense.
    """
    return _size(text, "hidden_size") // _size(text, "num_attention_heads")


def _even(dims: int) -> int:
    if dims < 4 or dims % 2:
        raise unfit(f"{dims} dimensions of a head are turned: not an even number of at least 4")
    return dims


def _first(text: Mapping[str, Any], keys: tuple[str, ...], default: float | None) -> Any:
    return next((text[key] for key in keys if text.get(key) is not None), default)


def _section(text: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = text.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise unfit(f"{key} is {shown(found)}, no JSON object")
    return dict(found)


def _size(text: Mapping[str, Any], key: str) -> int:
    found = text.get(key)
    if not is_int(found, 1, _WIDEST):
        raise unfit(f"{key} is {shown(found)}, not a number of dimensions")
    return int(found)


def _length(told: Mapping[str, Any], key: str) -> int | None:
    found = told.get(key)
    if found is None:
        return None
    if is_number(found) and float(found).is_integer():
        found = int(found)
    if not is_int(found, 2, LONGEST):
        raise unfit(f"{key} is {shown(found)}, not a number of tokens")
    return int(found)


def is_int(found: object, least: int, most: int) -> TypeGuard[int]:
    """Whether it is an integer within bounds, and no truth value."""
    return isinstance(found, int) and not isinstance(found, bool) and least <= found <= most


def is_number(found: object) -> TypeGuard[int | float]:
    """Whether it is a finite number, and no truth value."""
    return isinstance(found, int | float) and not isinstance(found, bool) and abs(found) <= _LARGEST


def shown(found: object) -> str:
    """A value as a message quotes it: its ``repr``, shortened."""
    text = repr(found)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def unfit(what: str, fix: str = "") -> CheckpointError:
    """A fault of the config."""
    return CheckpointError(what, where="config.json", fix=fix)
