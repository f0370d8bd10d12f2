"""Everything that ``compress inspect`` tells of a checkpoint, from its config and headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.checkpoint.inventory import Inventory, inventory_of
from compressor.checkpoint.modelopt import CONFIG_NAME
from compressor.checkpoint.opened import Opened
from compressor.checkpoint.taken_apart import StoredTensor, Weight, take_apart
from compressor.drafts.native_table import layer_count, native_family
from compressor.errors import CheckpointError
from compressor.model.families import family_for, is_prediction, text_config, tied
from compressor.model.families.base import Family
from compressor.model.reach import reach
from compressor.planner.sizes import expert_counts, is_routed, routed_share
from compressor.report.contents_beside import Adapter, Draft, KvCache, adapter_of, draft_of, kv_cache_of
from compressor.report.engines import Loader, loaders, notes_on
from compressor.report.parts import PREDICTION, TOWERS, part_of
from compressor.rope.checked import Finding, check_positions
from compressor.rope.positions import read_positions
from compressor.spec import Role, TensorHeader


@dataclass(frozen=True)
class Row:
    """Weights of one part of the model and one scheme, added up; ``bits`` with scales, None of no weights."""

    role: str
    scheme: str
    tensors: int
    parameters: int
    bytes: int
    bits: float | None


@dataclass(frozen=True)
class Parameters:
    """How many numbers the model has.

    Attributes:
        total: all, a tied pair of embedding and head once.
        active: those that a token passes: of routed experts their share; prediction layers and towers left
            out. None where there are no routed experts.
        target: those stored quantized, or where nothing is, the linear weights that a run would quantize.
    """

    total: int
    active: int | None
    target: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        inventory: tensors and bytes as they lie.
        form: ``folder``, ``gguf``, ``hub``, ``headers`` or ``adapter``.
        model_type: of the config, and ``family`` that claims it here.
        made_by: who says in it to have written it; "" where nobody does.
        parameters: how many.
        bits_per_weight: 8 x bytes / ``parameters.total``; None where the layout hides how many there are.
        bits_per_target_weight: the same over ``parameters.target`` and what they take.
        rows: weights by role and scheme, in the order of the model.
        dtypes: dtype -> tensors and bytes, as they lie.
        tied: whether the output head is the embedding.
        method: ``quant_method``; "" for a plain one.
        kv_cache: how it is to be stored, and what it takes.
        scaling: of its positions; None where it has none that can be read.
        positions: what is wrong with them.
        experts: how many routed ones a layer has, and how many a token passes; None where unknown.
        predictions: multi-token prediction layers as the config counts them (None where it does not), and
            their tensors.
        draft: of a draft head in the folder, or None.
        adapter: of an adapter in the folder, or None.
        engines: what loads it.
        notes: what a reader should know.
    """

    inventory: Inventory
    form: str
    model_type: str
    family: str
    made_by: str
    parameters: Parameters
    bits_per_weight: float | None
    bits_per_target_weight: float | None
    rows: tuple[Row, ...]
    dtypes: Mapping[str, Mapping[str, int]]
    tied: bool
    method: str
    kv_cache: KvCache
    scaling: Mapping[str, Any] | None
    positions: tuple[Finding, ...]
    experts: Mapping[str, int | None]
    predictions: Mapping[str, int | None]
    draft: Draft | None
    adapter: Adapter | None
    engines: tuple[Loader, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; the inventory's fields stand beside the others."""
        found = asdict(self)
        inventory = found.pop("inventory")
        return {**inventory, **found}


def contents_of(opened: Opened) -> Contents:
    """Takes a checkpoint apart.

    Raises:
        CheckpointError: a file of it is not laid out as it must be.
        UserError: an installed family cannot be loaded.
    """
    config, inventory = opened.config, inventory_of(opened)
    description: Mapping[str, Any] = inventory.quantization or {}
    weights, kv = take_apart(opened.tensors, description)
    family = family_for(config)
    roles = {weight.name: _role(family, weight, config) for weight in weights}
    is_tied = bool(opened.tensors) and opened.form != "adapter" and tied(config, roles)
    parameters, target_bytes = _parameters(weights, roles, config, is_tied)
    method = _method(description)
    schemes = list(dict.fromkeys(weight.scheme for weight in weights if weight.quantized))
    stored_bytes = inventory.bytes - sum(scale.nbytes for scale in kv)
    hidden = _hidden(method, weights)
    return Contents(
        inventory=inventory,
        form=opened.form,
        model_type=str(config.get("model_type") or "")[:60],
        family=family.name,
        made_by=_made_by(opened, description),
        parameters=parameters,
        bits_per_weight=None if hidden else _bits(stored_bytes, parameters.total),
        bits_per_target_weight=None if hidden else _bits(target_bytes, parameters.target),
        rows=tuple(_rows(weights, roles, config)),
        dtypes=_dtypes(opened.tensors),
        tied=is_tied,
        method=method,
        kv_cache=kv_cache_of(opened, description, len(kv)),
        scaling=_scaling(config),
        positions=check_positions(config) if config else (),
        experts=dict(zip(("count", "per_token"), expert_counts(config), strict=True)),
        predictions=_predictions(weights, config),
        draft=draft_of(opened),
        adapter=adapter_of(opened),
        engines=tuple(loaders(opened.form, method, schemes, str(config.get("model_type")))),
        notes=(*hidden, *notes_on(schemes)),
    )


def _role(family: Family, weight: Weight, config: dict[str, Any]) -> Role:
    """What a weight is, as the family says of a plain one; quantized codes stand for 16 bit."""
    dtype = "BF16" if weight.quantized or weight.scheme not in _PLAIN_INTEGERS else weight.scheme
    try:
        return family.role(TensorHeader(weight.name, dtype, weight.shape), config)
    except CheckpointError as error:
        return Role("other", reason=error.what)


_PLAIN_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def _rows(weights: Sequence[Weight], roles: Mapping[str, Role], config: dict[str, Any]) -> Iterable[Row]:
    grouped: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    for weight in weights:
        part = part_of(weight.name, weight.shape, roles[weight.name], config)
        grouped[part, weight.scheme].append(weight)
    for (role, scheme), members in grouped.items():
        values, nbytes = sum(one.values for one in members), sum(one.nbytes for one in members)
        yield Row(role, scheme, len(members), values, nbytes, _bits(nbytes, values))


def _parameters(
    weights: Sequence[Weight], roles: Mapping[str, Role], config: dict[str, Any], is_tied: bool
) -> tuple[Parameters, int]:
    """How many, and the bytes of those that count as targets."""
    kinds = {role.kind for role in roles.values()}
    once = is_tied and "embedding" in kinds
    counted = [one for one in weights if not (once and roles[one.name].kind == "lm_head")]
    targets = [one for one in weights if one.quantized]
    if not targets:
        targets = [one for one in weights if roles[one.name].kind == "linear" and not roles[one.name].reason]
    active = None
    if any(is_routed(one.name) for one in weights):
        share = routed_share(config)
        of_text = [
            one
            for one in counted
            if part_of(one.name, one.shape, roles[one.name], config) not in (PREDICTION, TOWERS)
        ]
        active = round(sum(one.values * (share if is_routed(one.name) else 1.0) for one in of_text))
    total, target = (sum(one.values for one in some) for some in (counted, targets))
    return Parameters(total, active, target), sum(one.nbytes for one in targets)


def _bits(nbytes: int, parameters: int) -> float | None:
    return 8 * nbytes / parameters if parameters else None


def _hidden(method: str, weights: Sequence[Weight]) -> tuple[str, ...]:
    """Why bits per weight cannot be told."""
    unread = [one for one in weights if one.scheme in ("packed integers", "32-bit words of codes")]
    if unread:
        return (
            f"how {len(unread):,} quantized tensors are packed is not told: bits per weight are left out",
        )
    if method and not any(one.quantized for one in weights):
        return (f"how {method[:40]} packs its tensors is not known here: bits per weight are left out",)
    return ()


def _method(description: Mapping[str, Any]) -> str:
    if not description:
        return ""
    default = "compressed-tensors" if "config_groups" in description else "unknown"
    return str(description.get("quant_method") or default)[:60]


def _made_by(opened: Opened, description: Mapping[str, Any]) -> str:
    """Whoever names himself: this program by its files, others in the quantization's description."""
    if {"manifest.json", "report.json", "recipe.yaml"} <= opened.names:
        return "compressor"
    producer = (opened.json_object(CONFIG_NAME) or description).get("producer")
    if isinstance(producer, Mapping):
        return " ".join(str(producer.get(key))[:40] for key in ("name", "version") if producer.get(key))
    return ""


def _predictions(weights: Sequence[Weight], config: dict[str, Any]) -> dict[str, int | None]:
    found = sum(is_prediction(weight.name, config) for weight in weights)
    family = native_family(config)
    try:
        layers = layer_count(family, config) if family is not None and found else None
    except CheckpointError:
        layers = None
    return {"layers": layers, "tensors": found}


def _dtypes(tensors: Sequence[StoredTensor]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        one = found.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        one["tensors"] += 1
        one["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """How a config's rotary positions are scaled, JSON-able; None where it has none that can be read."""
    try:
        found = read_positions(config)
    except CheckpointError:
        return None
    return {
        "method": found.rope_type,
        "factor": found.parameters.get("factor"),
        "original_length": found.original_length,
        "length": reach(text_config(config)),
        "theta": found.theta,
    }
