"""The recipe's ``adapters`` section -> what the stage is told, and why it cannot be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressor import data
from compressor.calibration.check import text_sha256
from compressor.calibration.spec import DatasetSpec
from compressor.errors import UserError
from compressor.model.families.naming import leaf
from compressor.planner.context import planned_reach
from compressor.planner.kv_job import KvStage
from compressor.planner.sizes import planned_device
from compressor.recipe.adapters import AdaptersSection
from compressor.recipe.load import LoadedRecipe
from compressor.report.words import counted
from compressor.stages.adapt import AdaptSpec
from compressor.stages.base import Claim

DEFAULT_STEP_TOKENS = 131_072
# What vLLM 0.32 gives adapters to, beside others (packed_modules_mapping of its models).
_SERVED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})


def documents_from(folder: Path, documents: Sequence[DatasetSpec]) -> tuple[str, ...]:
    """The texts as a recipe in ``folder`` names them: absolute paths and shipped files as they are."""
    return tuple(_seen(folder, document) for document in documents)


def _seen(folder: Path, document: DatasetSpec) -> str:
    assert document.path is not None
    shipped = document.path.is_relative_to(data.shipped_root())
    if shipped or Path(document.name).is_absolute():
        return document.name
    return os.path.relpath(document.path, folder)


def found_documents(
    section: AdaptersSection, folder: Path, held_out: Sequence[Path], faults: list[UserError]
) -> tuple[DatasetSpec, ...]:
    """The texts, found and hashed; none that the result is measured on."""
    measured = {data.scan_text(path)[0] for path in held_out}
    found = []
    for index, name in enumerate(section.documents):
        where = "adapters.documents" if len(section.documents) == 1 else f"adapters.documents.{index}"
        try:
            path = data.find(name, beside=folder, what="text of long documents")
            sha256 = text_sha256(path)
        except UserError as error:
            at = f" ({error.where})" if error.where else ""
            faults.append(UserError(f"{error.what}{at}", where=where, fix=error.fix))
            continue
        if sha256 in measured:
            what = f"{name} is an evaluation text: a model trained on it measures nothing there"
            faults.append(UserError(what, where=where, fix="train on other documents"))
        found.append(DatasetSpec(name, path, sha256))
    return tuple(found)


def adapt_spec(
    section: AdaptersSection,
    loaded: LoadedRecipe,
    config: dict[str, Any],
    documents: tuple[DatasetSpec, ...],
    faults: list[UserError],
) -> AdaptSpec | None:
    """What the stage is told; None after adding to ``faults`` why nothing can be."""
    recipe, longest = loaded.recipe, planned_reach(loaded.recipe, config)
    length = section.sequence_length
    if length is None:
        length = recipe.context.target_length if recipe.context is not None else longest
    if length is None:
        what = "the source's config does not say how many tokens it reads"
        faults.append(UserError(what, where="adapters.sequence_length", fix="set it"))
        return None
    if longest is not None and length > longest:
        what = f"sequences of {length:,} tokens are longer than the {longest:,} that the model reads"
        fix = f"set it to {longest} at most, or context.target_length higher"
        faults.append(UserError(what, where="adapters.sequence_length", fix=fix))
    step = section.tokens_per_step or max(length, DEFAULT_STEP_TOKENS)
    sequences = step // length
    steps = section.tokens // (max(sequences, 1) * length)
    if not sequences:
        what = f"a step of {step:,} tokens holds no whole sequence of {length:,}"
        faults.append(UserError(what, where="adapters.tokens_per_step", fix=f"set it to {length} or more"))
    elif not steps:
        what = f"{section.tokens:,} tokens are no whole step of {sequences * length:,}"
        faults.append(UserError(what, where="adapters.tokens", fix="raise it, or lower tokens_per_step"))
    elif section.warmup_steps >= steps:
        what = (
            f"a warm-up of {counted(section.warmup_steps, 'step')} leaves nothing of the training: "
            f"adapters.tokens are {counted(steps, 'step')}"
        )
        faults.append(
            UserError(what, where="adapters.warmup_steps", fix="set it lower, or raise adapters.tokens")
        )
    return AdaptSpec(
        documents=documents,
        sequence_length=length,
        steps=steps,
        sequences=sequences,
        rank=section.rank,
        alpha=section.alpha or 2 * section.rank,
        targets=section.targets,
        norms="norms" in section.train,
        embeddings="embeddings" in section.train,
        learning_rate=section.learning_rate,
        direct_learning_rate=section.direct_learning_rate,
        warmup_steps=section.warmup_steps,
        save_every=section.save_every,
        seed=recipe.seed if section.seed is None else section.seed,
        merge=section.merge,
        retrieval=section.retrieval,
        # Merged adapters do not name it: another name is no other training.
        base="" if section.merge else recipe.name,
        dtype="bfloat16" if planned_device() == "cuda" else "float32",
    )


def kept_faults(claims: Sequence[Claim]) -> list[UserError]:
    """Why nothing can be merged into weights that stay as they are stored."""
    if not any(claim.kept is not None for claim in claims):
        return []
    what = "model.from: keep carries the source's weights as they are: nothing can be merged into them"
    return [UserError(what, where="adapters", fix="set model.from to dequantize, or leave adapters out")]


def unmerged_faults(chosen: Sequence[str], claims: Sequence[Claim]) -> list[UserError]:
    """Why vLLM would not serve these adapters beside the result, or would compute something else."""
    faults = []
    others = sorted({leaf(module) for module in chosen} - _SERVED)
    if others:
        what = f"vLLM 0.32 is not known to take adapters of {', '.join(others)}"
        faults.append(UserError(what, where="adapters.merge", fix="merge them"))
    solvers = {claim.solver.kind for claim in claims if claim.solver is not None and _moves_inputs(claim)}
    if solvers:
        what = f"solver {' and '.join(sorted(solvers))} scales what matrices read, and adapters beside them"
        faults.append(UserError(f"{what} would not know", where="adapters.merge", fix="merge them"))
    return faults


def _moves_inputs(claim: Claim) -> bool:
    return claim.solver is not None and (
        claim.solver.smoothing is not None or claim.solver.kind == "llmcompressor"
    )


def fold_faults(spec: AdaptSpec, kv: KvStage | None) -> list[UserError]:
    """Adapters beside the weights read other keys and values than a fold leaves."""
    if spec.merge or kv is None or not kv.job.folds:
        return []
    return [
        UserError(
            "adapters that are not merged do not know of the transforms that kv_cache folds into the weights",
            where="adapters.merge",
            fix="merge them, or set kv_cache.fold to false",
        )
    ]
