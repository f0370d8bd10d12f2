"""Which matrices are chosen for together, and how each may be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from compressor.dialects.base import Dialect
from compressor.model.families import block_index, member_rows
from compressor.planner.claims import fused_name
from compressor.schemes.base import Scheme
from compressor.spec import FLOAT_DTYPES
from compressor.stages.base import AUTO_RULE, Claim
from compressor.stages.budget_spec import COPY, Group, Stored


def group_claims(
    claims: Sequence[Claim],
    candidates: Sequence[Scheme | Literal["copy"]],
    config: dict[str, Any],
    dialect: Dialect,
) -> tuple[Group, ...]:
    """The tensors that are chosen for, those together that the engine fuses, in file order.

    ``claims``: with copies of these (rule ``AUTO_RULE``). A candidate that cannot hold some matrix of a group
    is none of its options; 16 bit is one where no candidate is left.
    """
    # Tensor -> the group that it is in; a tensor with matrices of several groups makes them one.
    members: dict[str, list[Claim]] = {}
    group_of: dict[str, str] = {}
    for claim in claims:
        if claim.rule != AUTO_RULE or claim.action != "copy":
            continue
        names = list(dict.fromkeys(fused_name(part) for part in claim.role.parts))
        homes = list(dict.fromkeys(group_of.get(name, name) for name in names))
        merged = [claim_ for home in homes for claim_ in members.pop(home, [])]
        for name, home in group_of.items():
            if home in homes:
                group_of[name] = homes[0]
        group_of |= dict.fromkeys(names, homes[0])
        members[homes[0]] = [*merged, claim]
    groups = []
    for name, found in members.items():
        options = _options(found, candidates, config, dialect)
        groups.append(Group(name, block_index(found[0].tensor.name), tuple(found), options))
    return tuple(groups)


def _options(
    claims: Sequence[Claim],
    candidates: Sequence[Scheme | Literal["copy"]],
    config: dict[str, Any],
    dialect: Dialect,
) -> tuple[Stored, ...]:
    """Candidates that can hold all matrices of a group, fewest bytes first."""
    plain = Stored(COPY, None, sum(claim.result_bytes for claim in claims))
    found = [plain] if COPY in candidates else []
    for scheme in candidates:
        if isinstance(scheme, str) or not all(_holds(scheme, claim, config) for claim in claims):
            continue
        nbytes = sum(
            output.nbytes
            for claim in claims
            for part in claim.role.parts
            for output in dialect.outputs(scheme, part, dtype=claim.tensor.dtype)
        )
        found.append(Stored(spelt(scheme), scheme, nbytes))
    return tuple(sorted(found or [plain], key=lambda option: option.nbytes))


def _holds(scheme: Scheme, claim: Claim, config: dict[str, Any]) -> bool:
    """Whether a scheme can store all matrices of a tensor."""
    return claim.tensor.dtype in FLOAT_DTYPES and all(
        scheme.problem(rows, part.in_features, fused=part.fuse_group is not None) is None
        for part in claim.role.parts
        for rows in member_rows(part, config)
    )


def spelt(scheme: Scheme) -> str:
    """A scheme's name, with the options that differ from the defaults: ``int4(group_size=64)``."""
    options = ",".join(f"{name}={value}" for name, value in scheme.options().items())
    return f"{scheme.kind}({options})" if options else scheme.kind
