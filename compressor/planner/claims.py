"""Claims: every source tensor is assigned to exactly one rule before anything is read.

A pattern that matches nothing, a shape that a scheme cannot hold, and rules that split what the engine fuses
are faults of the recipe; all of them are collected, none stops the others from being found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from compressor.checkpoint.kept import Kept, KeptScheme
from compressor.dialects.base import Dialect
from compressor.errors import PlanError, UserError
from compressor.model.families import embedding_problem, member_rows, tied
from compressor.model.families.base import Family
from compressor.recipe.model import WeightsSection
from compressor.recipe.patterns import compile_pattern
from compressor.schemes.base import Scheme
from compressor.solvers.base import Solver
from compressor.spec import FLOAT_DTYPES, LinearPart, Role, TensorHeader
from compressor.stages.base import AUTO_RULE, Claim

WIDE_DTYPES = frozenset({"F32", "F64"})
EXPERTS = ".experts."
_SHOWN = 4
_LEAVE_OUT = (
    "leave these out of the pattern, or copy them by an entry of weights.ignore, which precedes rules"
)


@dataclass
class _Rule:
    """One line of the recipe's weights section that can decide about tensors."""

    key: str
    patterns: tuple[str, ...]
    scheme: Scheme | None  # None: stays as it is
    solver: Solver | None
    tests: list[Callable[[str], bool]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tests = [compile_pattern(pattern) for pattern in self.patterns]
        self.hits = [0] * len(self.tests)

    def matches(self, names: Sequence[str]) -> bool:
        matched = False
        for index, test in enumerate(self.tests):
            if any(test(name) for name in names):
                self.hits[index] += 1
                matched = True
        return matched


def claim_tensors(
    headers: Mapping[str, TensorHeader],
    config: dict[str, Any],
    family: Family,
    weights: WeightsSection,
    dialect: Dialect,
    kept: Mapping[str, Kept] = MappingProxyType({}),
    chosen: Mapping[str, Scheme | None] = MappingProxyType({}),
    *,
    may_copy_all: bool = False,
) -> list[Claim]:
    """One claim for each tensor, in file order; ``kept`` are those that stay as the source stores them.

    ``chosen``: under scheme ``auto``, tensor -> its scheme; others are copied, by the rule ``AUTO_RULE``.
    ``may_copy_all``: whether rules that quantize nothing are no fault: something else is changed.

    Raises:
        PlanError: with every fault found.
    """
    rules = _rules(weights)
    is_tied = tied(config, headers)
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    claims = [
        _claim(header, family.role(header, config), rules, weights, dialect, is_tied, refused, kept, chosen)
        for header in headers.values()
    ]
    faults = [
        UserError(f"{problem}: {_some(names)}", where=rule, fix=_LEAVE_OUT)
        for (rule, problem), names in refused.items()
    ]
    claims = _unfuse_copied_experts(claims)
    faults += _unmatched(rules, headers)
    faults += _dialect_faults(claims, dialect)
    faults += _shape_faults(claims, config)
    faults += _split_fusions(claims)
    faults += _split_solvers(claims)
    faults += _name_clashes(claims)
    if not (may_copy_all or faults or any(claim.action == "quantize" for claim in claims)):
        faults.append(UserError("the rules leave nothing to quantize", where="weights"))
    if faults:
        raise PlanError(faults)
    return claims


def unmet_patterns(
    headers: Mapping[str, TensorHeader], config: dict[str, Any], family: Family, weights: WeightsSection
) -> set[tuple[str, str]]:
    """(key of the rule, pattern) of each pattern that matches no tensor."""
    rules = _rules(weights)
    for header in headers.values():
        names = _names(header, family.role(header, config))
        for rule in rules:
            rule.matches(names)
    return {(rule.key, pattern) for rule, pattern in _without_hits(rules)}


def _rules(weights: WeightsSection) -> list[_Rule]:
    ignored = [
        _Rule(f"weights.ignore.{index}", (pattern,), None, None)
        for index, pattern in enumerate(weights.ignore)
    ]
    ruled = []
    for index, rule in enumerate(weights.rules):
        patterns = (rule.match,) if isinstance(rule.match, str) else tuple(rule.match)
        scheme = None if isinstance(rule.scheme, str) else rule.scheme
        ruled.append(_Rule(f"weights.rules.{index}", patterns, scheme, rule.solver or weights.solver))
    return ignored + ruled


def _claim(
    header: TensorHeader,
    role: Role,
    rules: list[_Rule],
    weights: WeightsSection,
    dialect: Dialect,
    is_tied: bool,
    refused: dict[tuple[str, str], list[str]],
    kept: Mapping[str, Kept],
    chosen: Mapping[str, Scheme | None],
) -> Claim:
    names = _names(header, role)
    # Every rule looks at every tensor, so that a shadowed pattern is not reported as matching nothing.
    matching = [rule for rule in rules if rule.matches(names)]
    rule = matching[0] if matching else None
    if rule is None and role.kind == "linear" and not role.reason:
        scheme = chosen.get(header.name) if isinstance(weights.scheme, str) else weights.scheme
        rule = _Rule(AUTO_RULE, (), scheme, weights.solver)
    if header.name in kept:
        return _keep(header, role, rule, kept[header.name])
    if matching and _splits(header, role, matching, weights):
        refused[matching[0].key, "matches some of the matrices that one tensor holds"].append(header.name)
    if rule is None or rule.scheme is None:
        key = rule.key if rule else "default"
        reason = f"asked by {key}" if rule else role.reason
        if key == AUTO_RULE:
            reason = "chosen under weights.budget"
        return _copy(header, role, key, reason)
    problem = _not_quantizable(header, role, rule, is_tied)
    if problem is not None:
        refused[rule.key, problem].append(header.name)
        return _copy(header, role, rule.key, problem)
    holds = dialect.problem(rule.scheme) is None
    outputs = tuple(
        output
        for part in role.parts
        if holds  # else a fault, found for all claims together
        for output in dialect.outputs(rule.scheme, part, dtype=header.dtype)
    )
    return Claim(header, role, "quantize", rule.key, "", rule.scheme, rule.solver, outputs)


def _splits(header: TensorHeader, role: Role, rules: Sequence[_Rule], weights: WeightsSection) -> bool:
    """Whether the rules store the parts of one tensor in different ways, where they can have only one."""
    if len(role.parts) < 2:
        return False
    whole = [header.name, header.name.removesuffix(".weight")]
    default = None if role.reason else weights.scheme
    first: tuple[object, object] | None = None
    for part in role.parts:
        names = [*whole, part.module]
        found = next(
            (rule for rule in rules if any(test(name) for test in rule.tests for name in names)), None
        )
        stored: tuple[object, object] = (
            (default, weights.solver) if found is None else (found.scheme, found.solver)
        )
        stored = stored if stored[0] is not None else (None, None)
        if first is not None and stored != first:
            return True
        first = stored
    return False


def _names(header: TensorHeader, role: Role) -> list[str]:
    """What patterns are tried on."""
    return [header.name, header.name.removesuffix(".weight"), *(part.module for part in role.parts)]


def _not_quantizable(header: TensorHeader, role: Role, rule: _Rule, is_tied: bool) -> str | None:
    scheme = rule.scheme
    assert scheme is not None, "asked of rules that quantize"
    if not role.parts:
        return f"cannot be quantized ({role.reason})"
    needs_data = scheme.static_inputs or (rule.solver is not None and rule.solver.needs_calibration)
    if role.kind == "other" and needs_data:
        return (
            f"needs a scheme and a solver without calibration ({role.reason}: not in the model that is run)"
        )
    if header.dtype not in FLOAT_DTYPES:
        return f"stored as {header.dtype}, not as floating point"
    if role.kind in ("embedding", "lm_head"):
        return embedding_problem(role, scheme, tied=is_tied)
    return None


def _keep(header: TensorHeader, role: Role, rule: _Rule | None, kept: Kept) -> Claim:
    """Bit-exact, as the source stores it."""
    asked = rule is not None and rule.scheme is not None and bool(rule.patterns)
    reason = "compressed in the source" + (f": {rule.key} does not apply" if rule and asked else "")
    return Claim(header, role, "keep", "model.from", reason, None, None, kept.outputs, kept.scheme)


def _copy(header: TensorHeader, role: Role, rule: str, reason: str) -> Claim:
    """Bit-exact, but for wide matrices: a 32-bit checkpoint's embeddings are stored in 16 bit."""
    narrow = role.kind != "other" and header.dtype in WIDE_DTYPES
    output = TensorHeader(header.name, "BF16", header.shape) if narrow else header
    return Claim(header, role, "copy", rule, reason, None, None, (output,))


def _unfuse_copied_experts(claims: Sequence[Claim]) -> list[Claim]:
    """Where some layers' experts are quantized, those that stay in 16 bit are written one by one as well.

    vLLM's Llama 4 loader takes every expert for fused once it has met one fused tensor.
    """
    if not any(claim.scheme and _is_fused(claim) for claim in claims):
        return list(claims)
    return [_unfused(claim) if claim.scheme is None and _is_fused(claim) else claim for claim in claims]


def _is_fused(claim: Claim) -> bool:
    # Engines read prediction layers by a loader of their own.
    return claim.role.kind == "linear" and any(part.expert is not None for part in claim.role.parts)


def _unfused(claim: Claim) -> Claim:
    dtype = claim.outputs[0].dtype
    outputs = tuple(
        TensorHeader(f"{part.module}.weight", dtype, (part.out_features, part.in_features))
        for part in claim.role.parts
    )
    return replace(claim, outputs=outputs)


def _unmatched(rules: Sequence[_Rule], headers: Mapping[str, TensorHeader]) -> list[UserError]:
    example = next((name for name in headers if name.endswith("_proj.weight")), next(iter(headers), ""))
    return [
        UserError(
            f"pattern {pattern!r} matches no tensor",
            where=rule.key,
            fix=f"patterns are globs (or re:REGEX) over names such as {example.removesuffix('.weight')}",
        )
        for rule, pattern in _without_hits(rules)
    ]


def _without_hits(rules: Sequence[_Rule]) -> list[tuple[_Rule, str]]:
    return [
        (rule, pattern)
        for rule in rules
        for pattern, hits in zip(rule.patterns, rule.hits, strict=True)
        if hits == 0
    ]


def _shape_faults(claims: Sequence[Claim], config: dict[str, Any]) -> list[UserError]:
    """Shapes that a scheme cannot hold: one fault for each rule and problem, naming some tensors."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for claim in claims:
        if claim.scheme is None:
            continue
        for part in claim.role.parts:
            for rows in member_rows(part, config):
                problem = claim.scheme.problem(rows, part.in_features, fused=part.fuse_group is not None)
                if problem:
                    found[claim.rule, problem].append(part.module)
    return [
        UserError(f"{problem} ({_some(modules)})", where=rule) for (rule, problem), modules in found.items()
    ]


def _dialect_faults(claims: Sequence[Claim], dialect: Dialect) -> list[UserError]:
    """Schemes that the export format has no form for: one fault for each rule."""
    schemes = {claim.rule: claim.scheme for claim in claims if claim.scheme is not None}
    return [
        UserError(
            problem,
            where=rule if rule == "weights.scheme" else f"{rule}.scheme",
            fix="take one of these schemes, or set export.format to compressed-tensors",
        )
        for rule, scheme in schemes.items()
        if (problem := dialect.problem(scheme))
    ]


def fused_name(part: LinearPart) -> str:
    """What the engine fuses a matrix into, which is stored in one way; else the matrix itself."""
    if part.expert is not None or EXPERTS in part.module:
        # Engines run all experts of a layer in one kernel, and look at the first one only.
        return part.module.partition(EXPERTS)[0] + EXPERTS
    return part.module if part.fuse_group is None else part.fuse_group


def _split_fusions(claims: Sequence[Claim]) -> list[UserError]:
    """Parts that the engine fuses into one matrix must be stored alike."""
    groups: dict[str, dict[Scheme | KeptScheme | None, list[LinearPart]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for claim in claims:
        for part in claim.role.parts:
            if (name := fused_name(part)) != part.module:
                groups[name][claim.stored].append(part)
    split = [by_scheme for by_scheme in groups.values() if len(by_scheme) > 1]
    if not split:
        return []
    stored = ", ".join(
        f"{parts[0].module} as {scheme.label if scheme else '16 bit'}" for scheme, parts in split[0].items()
    )
    return [
        UserError(
            f"the rules split {len(split)} group(s) of matrices that the engine fuses into one: {stored}",
            where="weights.rules",
            fix="give q/k/v, gate/up, and all experts of a layer, one scheme",
        )
    ]


def _split_solvers(claims: Sequence[Claim]) -> list[UserError]:
    """Parts that share a tensor-level scale are solved together, so by one solver."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for claim in claims:
        for part in claim.role.parts if claim.scheme and claim.scheme.shares_tensor_scale else ():
            if part.fuse_group is not None:
                solver = "" if claim.solver is None else claim.solver.model_dump_json()
                groups[part.fuse_group][solver].append(part.module)
    split = [by_solver for by_solver in groups.values() if len(by_solver) > 1]
    if not split:
        return []
    solved = ", ".join(f"{modules[0]} by {solver}" for solver, modules in split[0].items())
    return [
        UserError(
            f"the rules split {len(split)} group(s) of matrices that share a scale among solvers: {solved}",
            where="weights.rules",
            fix="give q/k/v, and gate/up, one solver",
        )
    ]


def _name_clashes(claims: Sequence[Claim]) -> list[UserError]:
    seen: set[str] = set()
    clashes = []
    for claim in claims:
        for output in claim.outputs:
            if output.name in seen:
                clashes.append(output.name)
            seen.add(output.name)
    if not clashes:
        return []
    return [
        UserError(
            f"two source tensors would be written as one name ({_some(clashes)})",
            fix="the checkpoint already holds such tensors; copy the ones concerned with weights.ignore",
        )
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
