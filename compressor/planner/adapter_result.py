"""The adapters of a finished run, for its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.report.adapters import AdapterFacts

if TYPE_CHECKING:
    from compressor.planner.plan import Plan


def adapter_facts(plan: Plan, shown: Mapping[str, Any]) -> AdapterFacts | None:
    """The report's part; ``shown``: stage -> its facts. None where nothing was trained."""
    if plan.adapters is None:
        return None
    spec, told = plan.adapters.spec, shown["adapt"]["adapt"]
    return AdapterFacts(
        rank=spec.rank,
        layers=told["layers"],
        targets=tuple(told["targets"]),
        norms=spec.norms,
        embeddings=spec.embeddings,
        trained=told["trained_parameters"],
        documents=tuple(document.name for document in spec.documents),
        read=told["documents"],
        sequences=told["sequences"],
        joined=told["joined"],
        sequence_length=spec.sequence_length,
        tokens=told["tokens"],
        retrieval=float(spec.retrieval),
        losses=tuple(map(float, told["losses"])),
        answers=tuple(told["answers"]),
        seconds=float(told["seconds"]),
        merged=spec.merge,
        served_rank=plan.adapters.served_rank,
        changed=tuple(told["changed"]),
    )
