"""A config.json whose positions are scaled, as transformers 5.17 and vLLM 0.32 read it alike.

Importing this does not import torch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from compressor.errors import CheckpointError, UserError
from compressor.rope import methods
from compressor.rope.checked import check_positions
from compressor.rope.lengths import MOST_FACTOR, original_length, settled_reach
from compressor.rope.positions import SLIDING, Positions, head_dim, is_number, read_positions, shown
from compressor.rope.refusals import ENGINES, SWITCHING, Engine, family_refusal, instead, method_refusal
from compressor.rope.spec import ContextSpec, Method, ScaledConfig

# Fields of rope_parameters that describe a scaling: a new one begins without them.
SCALING_FIELDS = frozenset(
    {
        *(
            "type",
            "rope_type",
            "rope_theta",
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
        ),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "alpha", "max_trained_positions"),
        *(
            "short_factor",
            "long_factor",
            "short_mscale",
            "long_mscale",
            "low_freq_factor",
            "high_freq_factor",
        ),
    }
)
# Where configs of before transformers 5 say the same: read otherwise by one engine or the other, or stale.
_LEGACY = ("rope_scaling", "rope_theta", "rotary_emb_base", "rope_local_base_freq")
# What a scaling keeps when it is only made longer.
_KNOBS = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
# transformers 5.17 multiplies their head_dim of None (modeling_rope_utils.py, _compute_yarn_parameters).
_NO_HEAD_DIM = frozenset(
    {"hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "minimax", "ministral", "mixtral"}
)
_LEAST_DIVISOR = 1.0
_MOST_MULTIPLIER = 100.0


def scaled_config(
    config: Mapping[str, Any], spec: ContextSpec, *, engines: Collection[Engine] = ENGINES
) -> ScaledConfig:
    """The config of a model that reads ``spec.target_length`` tokens.

    Only ``rope_parameters``, ``max_position_embeddings`` (and ``original_max_position_embeddings`` where the
    family has it beside them; and ``head_dim`` where transformers fails without) change; the legacy
    ``rope_scaling``, ``rope_theta`` and their like are removed since they would win, or say otherwise.
    Everything else is kept.

    The factor is ``target_length / L`` exactly unless ``spec.factor`` asks for more; one that is given is
    lowered to the next that makes ``L * factor`` a whole number of tokens.

    Args:
        config: contents of the source's config.json.
        spec: what is asked.
        engines: that are to read the result.

    Raises:
        UserError: what is asked does not fit the model, itself, or an engine.
        CheckpointError: the config has no rotary positions, or none that can be read.
    """
    if spec.method not in get_args(Method):
        known = ", ".join(get_args(Method))
        raise UserError(f"{shown(spec.method)} is none of {known}", where="context.method")
    if spec.factors is not None and spec.method != "longrope":
        raise UserError(f"only longrope has factors, not {spec.method}", where="context.factors")
    multiplier = spec.attention_factor
    if multiplier is not None and (
        spec.method != "longrope" or not is_number(multiplier) or not 0 < multiplier <= _MOST_MULTIPLIER
    ):
        raise UserError(f"is {shown(multiplier)} for {spec.method}", where="context.attention_factor")
    positions = read_positions(config)
    reason = family_refusal(positions)
    if reason:
        raise UserError(reason, where="context.method", fix="leave the section context out")
    reason = method_refusal(positions, spec.method, engines)
    if reason:
        raise UserError(reason, where="context.method", fix=instead(positions, engines))
    original, notes = original_length(positions, spec)
    faulty = [finding.what for finding in check_positions(config) if finding.severity == "error"]
    if faulty:
        raise CheckpointError("; ".join(faulty), where="config.json", fix="mend the source's positions first")
    factor, length = settled_reach(spec, original)
    told = _Told(positions, spec, original, factor, length)
    return ScaledConfig(
        config=_rewritten(config, told),
        length=length,
        factor=factor,
        notes=(*notes, *_notes(told)),
    )


@dataclass(frozen=True)
class _Told:
    """What is written, settled.

    Attributes:
        positions: of the source.
        spec: what is asked.
        original: L.
        factor: s.
        length: tokens that are read.
    """

    positions: Positions
    spec: ContextSpec
    original: int
    factor: float
    length: int

    @property
    def position_limit(self) -> int:
        """``max_position_embeddings``: vLLM multiplies it by the factor of linear and dynamic scaling itself,
        but for Gemma 3 (config/model.py, _get_and_verify_max_len); transformers' dynamic starts from it.
        """
        multiplied = self.spec.method in ("linear", "dynamic") and "gemma3" not in self.positions.model_type
        return self.original if multiplied else self.length


def _rewritten(config: Mapping[str, Any], told: _Told) -> dict[str, Any]:
    """The config with what is told."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    text = changed
    for key in told.positions.path:
        text = text[key]
    for key in _LEGACY:
        text.pop(key, None)
    positions = told.positions
    new = _parameters(told)
    if positions.kind is None:
        text["rope_parameters"] = new
    else:
        others = copy.deepcopy(dict(positions.others))
        text["rope_parameters"] = {positions.kind: new, **others}
    text["max_position_embeddings"] = told.position_limit
    if "original_max_position_embeddings" in text or positions.model_type in SWITCHING:
        # transformers takes this one before that of rope_parameters.
        text["original_max_position_embeddings"] = told.original
    needed = told.spec.method in ("yarn", "longrope", "dynamic") and positions.model_type in _NO_HEAD_DIM
    if needed and text.get("head_dim") is None:
        text["head_dim"] = head_dim(text)
    return changed


def _parameters(told: _Told) -> dict[str, Any]:
    """``rope_parameters`` of the layers that are scaled."""
    positions, spec, original, factor = told.positions, told.spec, told.original, told.factor
    before = positions.parameters
    new = {key: value for key, value in before.items() if key not in SCALING_FIELDS}
    new |= {"rope_type": spec.method, "rope_theta": positions.theta}
    if spec.method == "ntk":
        new["rope_type"] = "default"
        new["rope_theta"] = methods.ntk_theta(positions.rotary_dim, positions.theta, factor)
        return new
    new["factor"] = factor
    if spec.method in ("linear", "dynamic"):
        return new
    new["original_max_position_embeddings"] = original
    if spec.method == "llama3":
        new |= {"low_freq_factor": methods.LOW_FREQ_FACTOR, "high_freq_factor": methods.HIGH_FREQ_FACTOR}
    elif spec.method == "yarn" and positions.latent:
        # DeepSeek's: the part that is turned is not all of a head, so attention itself is scaled.
        new |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    elif spec.method == "longrope":
        new |= _longrope(told)
    if positions.rope_type == spec.method:
        kept = {key: before[key] for key in _KNOBS.get(spec.method, ()) if before.get(key) is not None}
        new |= {key: value if isinstance(value, bool) else float(value) for key, value in kept.items()}
    return new


def _longrope(told: _Told) -> dict[str, Any]:
    """Factors, and the multiplier as each engine reads it."""
    given, wanted = told.spec.factors, told.positions.rotary_dim // 2
    where = "context.factors"
    if given is None:
        raise UserError("method longrope needs factors", where=where, fix="give them, or have them searched")
    if len(given) != wanted:
        hint = ": engines would use a single one for every frequency" if len(given) == 1 else ""
        raise UserError(
            f"has {len(given)} factor{'s' if len(given) > 1 else ''}, the model {wanted} frequencies{hint}",
            where=where,
            fix=f"give {wanted}, one for each pair of the {told.positions.rotary_dim} turned dimensions",
        )
    for index, value in enumerate(given):
        if not is_number(value) or not _LEAST_DIVISOR <= value <= MOST_FACTOR:
            raise UserError(
                f"factor {index} is {shown(value)}, not a number from {_LEAST_DIVISOR:g} to {MOST_FACTOR:g}",
                where=where,
            )
    long = [float(value) for value in given]
    multiplier = told.spec.attention_factor
    if multiplier is None:
        multiplier = methods.longrope_multiplier(told.factor, told.original)
    switches = told.positions.model_type in SWITCHING
    return {
        "short_factor": [1.0] * wanted if switches else list(long),
        "long_factor": long,
        "attention_factor": multiplier,
        "short_mscale": multiplier,
        "long_mscale": multiplier,
    }


def _notes(told: _Told) -> list[str]:
    """What a person should know of the result."""
    found = []
    spec, positions = told.spec, told.positions
    if spec.method != "dynamic":
        found.append(
            f"{spec.method} scaling is static: short prompts are read with the scaled frequencies, too, and "
            "lose by it"
        )
    else:
        found.append("dynamic scaling is for transformers only: vLLM does not serve it")
    if told.length > spec.target_length:
        found.append(f"the factor reaches {told.length} tokens, more than target_length {spec.target_length}")
    if spec.method == "llama3" and told.original * told.factor < spec.target_length:
        found.append(
            f"factor {told.factor:g} divides the lowest frequencies by less than the text grows, as in "
            "Llama 3.1: it needs training"
        )
    if positions.model_type in SWITCHING and spec.method == "longrope":
        found.append(
            f"vLLM reads {told.original} tokens unless --max-model-len says more; the long factors are used "
            "for every prompt then"
        )
    if positions.length is not None and told.length < positions.length:
        found.append(
            f"the source's config says that it reads {positions.length} tokens: more than the result"
        )
    window = positions.text.get("sliding_window")
    used = positions.text.get("use_sliding_window") is not False
    if positions.kind is None and is_number(window) and used:
        found.append(
            f"layers with a window of {window} tokens attend no further back than before; their frequencies "
            "are scaled like the others'"
        )
    if SLIDING in positions.others:
        found.append("layers with a sliding window keep their frequencies")
    return found
