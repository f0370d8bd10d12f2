"""The draft of a finished run, for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.report.drafts import (
    DraftDecoding,
    DraftFacts,
    DraftMeasure,
    DraftTraining,
)
from compressor.stages.drafts_spec import DraftSpec

if TYPE_CHECKING:
    from compressor.planner.plan import Plan


def draft_facts(plan: Plan, shown: Mapping[str, Any]) -> DraftFacts | None:
    """The report's part; ``shown``: stage -> its facts. None where nothing proposes."""
    if plan.drafts is None:
        return None
    told, model = shown["drafts"]["drafts"], plan.drafts.model
    training, decoding = told.get("training"), shown.get("decode", {}).get("decoding")
    return DraftFacts(
        kind=told["kind"],
        tokens=told["tokens"],
        bytes=told["bytes"],
        model=None if model is None else model.source.label,
        training=None if training is None else _training(plan.drafts.spec, training),
        decoding=decoding and DraftDecoding.model_validate_json(json.dumps(decoding)),
    )


def _training(spec: DraftSpec, told: Mapping[str, Any]) -> DraftTraining:
    assert spec.rows is not None
    assert spec.train is not None
    curves = told["curves"]
    return DraftTraining(
        texts=tuple(dataset.name for dataset in spec.rows.calibration.datasets),
        rows=told["rows"],
        held_out_rows=told["held_out_rows"],
        sequence_length=told["sequence_length"],
        written=told["written"],
        temperature=float(spec.rows.temperature) if spec.rows.new_tokens else None,
        looping=told["looping"],
        parameters=told["parameters"],
        planned_steps=spec.train.steps,
        steps=told["steps"],
        best_step=told["best_step"],
        batch=spec.train.batch,
        before=_measure(told["before"]),
        after=_measure(told["after"]),
        by_text={name: _measure(found) for name, found in told["by_dataset"].items()},
        losses=_curve(curves, "loss"),
        lengths=_curve(curves, "length"),
        held_out_steps=tuple(int(step) for step in curves.get("held_out_step", [])),
        held_out_losses=_curve(curves, "held_out_loss"),
        held_out_lengths=_curve(curves, "held_out_length"),
        seconds=float(told["seconds"]),
    )


def _measure(found: Mapping[str, Any]) -> DraftMeasure:
    return DraftMeasure(
        loss=float(found["loss"]),
        losses=tuple(map(float, found["losses"])),
        accepted=tuple(map(float, found["accepted"])),
        places=found["places"],
        length=float(found["length"]),
    )


def _curve(curves: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(map(float, curves.get(name, [])))
