"""What a plan says of a search for factors: its files, whether they are long enough, and its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor import data
from compressor.calibration.documents import open_documents
from compressor.calibration.spec import DatasetSpec
from compressor.device import available_device_bytes, available_memory_bytes
from compressor.errors import PlanError, UserError
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.predict import BASE_RSS_BYTES, Prediction
from compressor.planner.sizes import (
    DTYPE_BYTES,
    FLOPS,
    Device,
    hidden_size,
    pass_flops,
    planned_device,
)
from compressor.recipe.context_search import SearchSection
from compressor.recipe.load import LoadedRecipe
from compressor.report.words import counted, duration
from compressor.rope.search import SearchSpace
from compressor.rope.search_spec import STRETCHES, SearchSpec
from compressor.rope.spec import ContextSpec
from compressor.stages.base import Claim
from compressor.stages.context_texts import LEAST_PAST

_WHERE = "context.search"
# Activations of a pass in hidden states of all tokens, and the logits of some.
_HIDDEN_STATES = 16
_LOGIT_BYTES = 1 << 30
# Of a token of ordinary text, or fewer.
_LIKELY_BYTES = 3
# Of each pair of tokens, where layers see a window; for plain causal attention transformers makes no mask.
_MASK_BYTES = 3
# From here on a CPU's time is warned of.
_LONG_S = 3600.0


@dataclass(frozen=True)
class SearchPlan:
    """The search of a plan.

    Attributes:
        spec: how it searches.
        device: ``cpu`` or ``cuda``; results differ in the last bits.
        tokens: of each document.
        original_length: of the model.
        candidates: that are scored, at most.
        held_bytes: of memory, on the device that computes.
        shorter: what to say of files whose documents look shorter than ``tokens``.
        time_s: that it takes.
    """

    spec: SearchSpec
    device: Device
    tokens: int
    original_length: int
    candidates: int
    shorter: tuple[str, ...] = ()
    held_bytes: int = 0
    time_s: float = 0.0

    def add_to(self, prediction: Prediction) -> Prediction:
        """The prediction with memory and time of the search."""
        rss = BASE_RSS_BYTES + (self.held_bytes if self.device == "cpu" else 0)
        return replace(
            prediction,
            peak_rss_bytes=max(prediction.peak_rss_bytes, rss),
            time_s=prediction.time_s + self.time_s,
        )

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        spec = self.spec
        documents = counted(spec.search_documents, "document")
        others = counted(spec.accept_documents, "other document")
        return (
            f"factors: searched by {spec.objective} on {documents} of {self.tokens:,} tokens, "
            f"{self.candidates} candidates in {counted(spec.generations, 'generation')}, about "
            f"{duration(self.time_s)} on this machine",
            f"they are taken where they beat YaRN on {others} and cost short ones no more; else YaRN is",
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``compress plan --json``."""
        return self.spec.content | {
            "device": self.device,
            "tokens": self.tokens,
            "candidates": self.candidates,
            "held_bytes": self.held_bytes,
            "time_s": self.time_s,
        }

    def warnings(self) -> list[str]:
        """Whether this machine looks too small for it."""
        found = list(self.shorter)
        free = available_device_bytes() if self.device == "cuda" else available_memory_bytes()
        if self.held_bytes > free:
            found.append(
                f"{_WHERE} holds the model and a document of {self.tokens:,} tokens, about "
                f"{self.held_bytes / 1e9:.1f} GB; this machine has {free / 1e9:.1f} GB free"
            )
        if self.device == "cpu" and self.time_s > _LONG_S:
            found.append(
                f"{_WHERE} takes about {duration(self.time_s)} on this machine, which has no GPU; fewer "
                "search_documents, generations or tokens take less"
            )
        return found

    def costed(self, claims: Sequence[Claim], config: dict[str, Any]) -> SearchPlan:
        """With memory and time, of a model with these tensors."""
        spec = self.spec
        each = pass_flops(claims, config, self.tokens)
        each += STRETCHES * pass_flops(claims, config, self.original_length)
        scored = self.candidates * spec.search_documents + 2 * spec.accept_documents
        if spec.objective == "needle":
            scored += 2 * spec.accept_documents
        width = DTYPE_BYTES["bfloat16" if self.device == "cuda" else "float32"]
        weights = sum(claim.tensor.numel for claim in claims)
        states = _HIDDEN_STATES * self.tokens * hidden_size(config)
        windows = any(layer.kind in ("sliding", "chunked") for layer in kv_layers(config)[0])
        mask = _MASK_BYTES * self.tokens**2 if windows else 0
        return replace(
            self,
            held_bytes=width * (weights + states) + _LOGIT_BYTES + mask,
            time_s=scored * each / FLOPS[self.device],
        )


def plan_search(
    section: SearchSection, loaded: LoadedRecipe, space: SearchSpace, context: ContextSpec
) -> SearchPlan:
    """The section with its files found and checked; memory and time come by ``costed``.

    Raises:
        PlanError: a file is missing, too short for sure, or also what the result is measured on.
    """
    faults: list[UserError] = []
    evaluated = _evaluated(loaded)
    found: dict[str, tuple[Path, str]] = {}
    counts = {"documents": section.search_documents, "held_out": section.accept_documents}
    if section.held_out is None:
        counts = {"documents": section.search_documents + section.accept_documents}
    tokens = section.tokens or context.target_length
    shorter: list[str] = []
    for key, count in counts.items():
        try:
            found[key] = _file(getattr(section, key), loaded.folder, f"{_WHERE}.{key}")
            _check(found[key], evaluated, f"{_WHERE}.{key}")
            least = space.original_length + LEAST_PAST
            shorter += _short(found[key][0], count, least, tokens, f"{_WHERE}.{key}")
        except UserError as error:
            faults.append(error)
    if len(found) == 2 and found["documents"][1] == found["held_out"][1]:
        what = "the same text as context.search.documents, which factors are searched on"
        faults.append(UserError(what, where=f"{_WHERE}.held_out", fix="leave it out, or name another"))
    if tokens <= space.original_length:
        what = f"{tokens:,} tokens are not more than the original length, {space.original_length:,}"
        faults.append(UserError(what, where=f"{_WHERE}.tokens", fix="leave it out, or set it higher"))
    if faults:
        raise PlanError(faults)
    documents, held_out = found["documents"], found.get("held_out")
    told = section.model_dump(exclude={"documents", "held_out", "seed"})
    spec = SearchSpec(
        documents=documents[0],
        documents_sha256=documents[1],
        held_out=held_out and held_out[0],
        held_out_sha256=held_out and held_out[1],
        seed=loaded.recipe.seed if section.seed is None else section.seed,
        **told,
    )
    candidates = len(space.seeds()) + spec.generations * spec.children
    return SearchPlan(
        spec, planned_device(), tokens, space.original_length, candidates, shorter=tuple(shorter)
    )


def _file(name: str, beside: Path, where: str) -> tuple[Path, str]:
    """A file of documents, and the sha256 of its text."""
    path = data.find(name, beside=beside, what="file of long documents")
    if not path.is_file():
        raise UserError("is not a file", where=where, fix="name a file of long documents")
    return path, data.scan_text(path)[0]


def _check(found: tuple[Path, str], evaluated: Mapping[str, str], where: str) -> None:
    """Raises UserError for a text that the result is measured on."""
    sha256 = found[1]
    if sha256 in evaluated:
        raise UserError(
            f"is what {evaluated[sha256]} reads: a result must be measured on other texts",
            where=where,
            fix="name another file",
        )


def _short(path: Path, count: int, least: int, tokens: int, where: str) -> list[str]:
    """What to say where fewer than ``count`` documents look as long as ``tokens``: a guess, by their bytes.

    Raises:
        UserError: fewer have ``least`` tokens for sure, since no token has less than a byte; or the file
            cannot be read.
    """
    enough = full = 0
    for document in open_documents(DatasetSpec(path.name, path=path), 0, 0):
        size = len(document.encode()) if isinstance(document, str) else 0
        enough += size >= least
        full += size >= _LIKELY_BYTES * tokens
        if full == count:
            return []
    if enough < count:
        raise UserError(
            f"{path.name} has {counted(enough, 'document')} that can have {least:,} tokens; {count} are "
            "asked for",
            where=where,
            fix="name a file of longer documents, or lower search_documents and accept_documents",
        )
    return [
        f"{where}: about {full} of {count} documents of {path.name} look as long as {tokens:,} tokens; "
        "shorter ones are used for the rest"
    ]


def _evaluated(loaded: LoadedRecipe) -> dict[str, str]:
    """sha256 of the texts that the result is measured on -> the key that names them; missing ones are faults
    of that key.
    """
    section = loaded.recipe.evaluate
    if section is None:
        return {}
    named = {"evaluate.text": section.text}
    if section.long is not None:
        named["evaluate.long.documents"] = section.long.documents
    found = {}
    for key, name in named.items():
        with suppress(UserError, OSError):
            found[data.scan_text(data.find(name, beside=loaded.folder))[0]] = key
    return found
