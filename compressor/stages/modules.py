"""The modules behind the claims, as an engine's config names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.checkpoint.base import Source
from compressor.checkpoint.kept import KeptScheme
from compressor.dialects.base import Modules
from compressor.model.families import renames_modules, tied
from compressor.model.names import module_of
from compressor.schemes.base import Scheme
from compressor.stages.base import Claim


def modules_of(
    source: Source, claims: Sequence[Claim], aliases: Mapping[str, Sequence[str]] | None = None
) -> Modules:
    """What becomes of every module of the source that an engine could take for quantized.

    ``aliases``: other names of its linear layers (``model.aliases.linear_aliases``).
    """
    by_scheme: dict[Scheme | KeptScheme, list[str]] = {}
    left: list[str] = []
    embeddings: list[str] = []
    fused_experts: list[str] = []
    ends = set()
    for claim in claims:
        modules = [part.module for part in claim.role.parts]
        if claim.kept is not None:
            modules = [module_of(claim.tensor.name)]
        if claim.stored is not None:
            by_scheme.setdefault(claim.stored, []).extend(modules)
            if claim.role.kind in ("embedding", "lm_head"):
                ends.update(modules)
        elif claim.role.kind in ("linear", "lm_head"):
            left += modules
        elif claim.role.kind == "embedding":
            embeddings += modules
        elif len(claim.tensor.shape) == 2:
            # Routers, vision towers: linear modules that the engine must not take for quantized ones.
            left.append(module_of(claim.tensor.name))
        elif len(claim.tensor.shape) == 3:
            fused_experts.append(claim.tensor.name)
    if tied(source.config, source.headers) and "lm_head" not in left:
        left.append("lm_head")
    return Modules(
        by_scheme=by_scheme,
        left_16bit=left,
        embeddings=embeddings,
        ends=frozenset(ends),
        fused_experts=fused_experts,
        aliases=aliases or {},
        renamed=renames_modules(source.config),
    )
