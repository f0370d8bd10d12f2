"""The claims of a recipe on its source, and what in them does not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from compressor.checkpoint.base import Source
from compressor.checkpoint.kept import KeptSource
from compressor.dialects.base import Dialect
from compressor.errors import PlanError, UserError
from compressor.model.families import family_for
from compressor.planner.calibrated import unmeasured
from compressor.planner.claims import claim_tensors
from compressor.planner.faults import collect
from compressor.planner.kept import kept_faults
from compressor.planner.learned import learned_twice
from compressor.planner.oneshot import oneshot_faults
from compressor.recipe.load import LoadedRecipe
from compressor.schemes.base import Scheme
from compressor.stages.base import Claim


def claimed(
    loaded: LoadedRecipe,
    given: Source,
    source: Source,
    dialect: Dialect,
    faults: list[UserError],
    may_copy_all: bool = False,
    chosen: Mapping[str, Scheme | None] = MappingProxyType({}),
) -> list[Claim]:
    """The claims on a source.

    Args:
        loaded: the recipe.
        given: the source as it was opened, which knows what it keeps.
        source: as stages read it.
        dialect: how the result is spelled.
        faults: found so far.
        may_copy_all: whether rules may leave all weights in 16 bit, though nothing else changes them.
        chosen: what ``weights.scheme: auto`` has become, by source tensor.

    Raises:
        PlanError: there are faults: nothing more can be planned.
    """
    kept = given.kept if isinstance(given, KeptSource) else {}
    family, recipe = family_for(source.config), loaded.recipe
    claims = collect(
        faults,
        lambda: claim_tensors(
            source.headers,
            source.config,
            family,
            recipe.weights,
            dialect,
            kept,
            chosen,
            may_copy_all=may_copy_all
            or any(section is not None for section in (recipe.context, recipe.adapters, recipe.drafts)),
        ),
    )
    if claims is None or faults:
        raise PlanError(placed(faults, loaded))
    return claims


def solving_faults(
    claims: Sequence[Claim], source: Source, dialect: Dialect, *, polished: bool
) -> list[UserError]:
    """Schemes, solvers and what is kept that do not go together."""
    return [
        *unmeasured(claims),
        *kept_faults(claims, dialect, polished=polished),
        *learned_twice(claims),
        *oneshot_faults(claims, source, polished=polished),
    ]


def placed(faults: list[UserError], loaded: LoadedRecipe) -> list[UserError]:
    """The same faults, with file:line:column before recipe keys, which ``what`` does not repeat."""
    return [UserError(fault.what, where=_place(fault.where, loaded), fix=fault.fix) for fault in faults]


def _place(where: str, loaded: LoadedRecipe) -> str:
    place = loaded.places.get(where)
    return where if place is None else f"{place}: {where}"
