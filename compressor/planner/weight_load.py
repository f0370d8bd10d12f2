"""What the weights of a served model take: bytes held, bytes read for a step, products for a token.

A step reads every matrix once, whatever the batch, but routed experts only where a token of the batch goes to
them; of an input embedding it reads a row a token, which is not counted. Towers of other modalities and
prediction layers are held and not read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compressor.model.families import is_lookup, is_prediction, is_tower
from compressor.planner.predict import tied_once
from compressor.planner.sizes import is_routed, routed_share
from compressor.schemes.base import Arithmetic
from compressor.stages.base import Claim

_Part = Literal["dense", "routed", "head", "lookup", "tower", "prediction"]
_READ: tuple[_Part, ...] = ("dense", "routed", "head")
_Stored = Callable[[Claim], int]
_Multiplied = Callable[[Claim], Arithmetic]


@dataclass(frozen=True)
class WeightLoad:
    """The weights of one model.

    Attributes:
        held_bytes: of all tensors, whether they are read or not.
        dense_bytes: that every step reads, without the output head.
        routed_bytes: of all routed experts.
        share: of these, what one token passes.
        head_bytes: of the output head.
        products: arithmetic -> weights that multiply one token in it, of routed experts their share; without
            the head.
        head: the same of the head, which of a prompt the last token alone passes.
        embedding_parameters: that are looked up only.
        prediction_parameters: of prediction layers.
        parameters: weights that some token multiplies: no embeddings looked up, towers, prediction layers.
    """

    held_bytes: int
    dense_bytes: int
    routed_bytes: int
    share: float
    head_bytes: int
    products: Mapping[Arithmetic, float]
    head: Mapping[Arithmetic, float]
    parameters: int
    embedding_parameters: int = 0
    prediction_parameters: int = 0

    @property
    def active(self) -> float:
        """Weights that multiply one token."""
        return sum(self.products.values()) + sum(self.head.values())

    @property
    def read_by_all(self) -> int:
        """Bytes that a step would read if every token passed every expert."""
        return self.dense_bytes + self.routed_bytes + self.head_bytes

    def read(self, tokens: int) -> float:
        """Bytes that a step of so many tokens reads, whose experts are drawn evenly and independently.

        Each token misses an expert with probability 1 - share, all of them with its power by ``tokens``.
        """
        return self.dense_bytes + self.head_bytes + self.routed_bytes * (1 - (1 - self.share) ** tokens)


def source_load(claims: Sequence[Claim], config: dict[str, Any]) -> WeightLoad:
    """Of the source in 16 bit, multiplied in bf16."""
    return _load(tied_once(claims, config), config, lambda claim: claim.bytes_16bit, lambda _: "bf16")


def result_load(claims: Sequence[Claim], config: dict[str, Any]) -> WeightLoad:
    """Of the result as it is stored; what the source stored compressed and is kept multiplies in bf16."""
    return _load(claims, config, _result_bytes, _result_arithmetic)


def widened_load(load: WeightLoad, more_bytes: int, routed: float) -> WeightLoad:
    """The same weights in more bytes, of which the share ``routed`` is of routed experts."""
    experts = round(routed * more_bytes)
    return replace(
        load,
        held_bytes=load.held_bytes + more_bytes,
        dense_bytes=load.dense_bytes + more_bytes - experts,
        routed_bytes=load.routed_bytes + experts,
    )


def prediction_load(claims: Sequence[Claim], config: dict[str, Any]) -> WeightLoad:
    """Of the result's own prediction layers, which propose through the model's head; held with the model."""
    layers = [
        claim
        for claim in claims
        if is_prediction(claim.tensor.name, config) and not is_lookup(claim.tensor.name)
    ]
    own = _sum([(claim, _routed(claim)) for claim in layers], config, _result_bytes, _result_arithmetic)
    model = result_load(claims, config)
    parameters = own.parameters + int(sum(model.head.values()))
    return replace(own, held_bytes=0, head_bytes=model.head_bytes, head=model.head, parameters=parameters)


def plain_load(parameters: int, nbytes: int) -> WeightLoad:
    """Of weights that every token multiplies in bf16."""
    return WeightLoad(nbytes, nbytes, 0, 1.0, 0, {"bf16": float(parameters)}, {}, parameters)


def _load(
    claims: Sequence[Claim], config: dict[str, Any], stored: _Stored, arithmetic: _Multiplied
) -> WeightLoad:
    has_head = any(claim.role.kind == "lm_head" for claim in claims)
    return _sum([(claim, _part(claim, config, has_head)) for claim in claims], config, stored, arithmetic)


def _part(claim: Claim, config: dict[str, Any], has_head: bool) -> _Part:
    name = claim.tensor.name
    if is_tower(name):
        return "tower"
    if is_prediction(name, config):
        return "prediction"
    if claim.role.kind == "lm_head":
        return "head"
    if claim.role.kind == "embedding":
        return "lookup" if has_head else "head"  # which it is tied to
    return _routed(claim)


def _routed(claim: Claim) -> _Part:
    return "routed" if is_routed(claim.tensor.name) else "dense"


def _sum(
    parts: Sequence[tuple[Claim, _Part]], config: dict[str, Any], stored: _Stored, arithmetic: _Multiplied
) -> WeightLoad:
    share = routed_share(config)
    nbytes: dict[_Part, int] = defaultdict(int)
    counts: dict[_Part, int] = defaultdict(int)
    products: dict[Arithmetic, float] = defaultdict(float)
    head: dict[Arithmetic, float] = defaultdict(float)
    for claim, part in parts:
        count = claim.tensor.numel
        nbytes[part] += stored(claim)
        counts[part] += count
        if part == "head":
            head[arithmetic(claim)] += count
        elif part in _READ:
            products[arithmetic(claim)] += count * (share if part == "routed" else 1.0)
    return WeightLoad(
        held_bytes=sum(nbytes.values()),
        dense_bytes=nbytes["dense"],
        routed_bytes=nbytes["routed"],
        share=share,
        head_bytes=nbytes["head"],
        products=dict(products),
        head=dict(head),
        parameters=sum(counts[part] for part in _READ),
        embedding_parameters=counts["lookup"],
        prediction_parameters=counts["prediction"],
    )


def _result_bytes(claim: Claim) -> int:
    return claim.result_bytes


def _result_arithmetic(claim: Claim) -> Arithmetic:
    return "bf16" if claim.scheme is None else claim.scheme.arithmetic
