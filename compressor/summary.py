"""From a finished run to its report: adds up claims, shard receipts and measurements."""

from __future__ import annotations

import platform
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from compressor import device
from compressor.budget.gates import GateVerdict
from compressor.evals.base import EvalSpec
from compressor.evals.long_spec import LongSpec
from compressor.planner.plan import Plan
from compressor.report.adapters import AdapterFacts
from compressor.report.budget import BudgetFacts
from compressor.report.calibration import (
    CalibratedMatrix,
    CalibrationFacts,
    CalibrationText,
    ExpertCoverage,
    LearnedBlock,
    PolishFacts,
    SmoothedInput,
    SmoothedMatrix,
)
from compressor.report.context import ContextFacts
from compressor.report.drafts import DraftFacts
from compressor.report.kv import KvFacts
from compressor.report.long import long_facts
from compressor.report.measured import Evaluated, Gate
from compressor.report.model import (
    Device,
    Divergence,
    Kept,
    Perplexity,
    Quality,
    Report,
    ResultFacts,
    SchemeBytes,
    SchemeError,
    SourceFacts,
    StageCost,
    TensorError,
    WeightFacts,
    utc_now,
)
from compressor.report.parts import layer_matrices, part_bytes
from compressor.report.serve import serve_facts
from compressor.stages.base import Claim, needs_calibration
from compressor.stages.receipts import all_receipts
from compressor.workspace import STAGE_FILE

PACKAGES = (
    "compressor",
    "torch",
    "transformers",
    "compressed-tensors",
    "llmcompressor",
    "safetensors",
    "lm-eval",
    "numba",
    "gguf",
)
_WORST = 5
# Local names of codes; everything else that a scheme writes is overhead.
_CODES = ("weight_packed", "weight")


def summarize(
    plan: Plan,
    streamed: Path,
    checkpoint: Path,
    evaluation: Mapping[str, Any] | None,
    walked: Mapping[str, Any] | None,
    gates: Sequence[GateVerdict],
    costs: Sequence[StageCost],
    output: Path,
    kv: KvFacts | None = None,
    context: ContextFacts | None = None,
    adapters: AdapterFacts | None = None,
    drafts: DraftFacts | None = None,
    budget: BudgetFacts | None = None,
) -> Report:
    """The report of a run, from the artefact folders of its stages.

    ``walked``: what the walk was shown (``texts``: name -> tokens, ``samples``, ``sequence_length``,
    ``seed``, ``dtype``, and ``polish`` if one followed), or None where none was needed. ``output`` is where
    the checkpoint will be: below the current folder it is named relative to it. ``kv``: its cache, if the
    recipe says how it is stored. ``context``: how its positions are scaled, if they are. ``adapters``: what
    was trained on long documents, if anything was. ``drafts``: what proposes tokens for it. ``budget``: how
    schemes were chosen, if they were.
    """
    prediction = plan.prediction
    schemes = _by_scheme(plan.claims)
    return Report(
        name=plan.loaded.recipe.name,
        created=utc_now(),
        source=SourceFacts(
            label=plan.source.label,
            kind=plan.source.kind,
            note=plan.source.note,
            revision=plan.source.revision,
            base_model=plan.source.label.split("@")[0] if plan.source.revision else None,
            license=plan.source.license,
            bytes=prediction.source_bytes,
            parameters=prediction.parameters,
        ),
        result=ResultFacts(
            format=plan.dialect.name,
            bytes=prediction.result_bytes,
            bits_per_weight=prediction.bits_per_weight,
            bits_per_target_weight=prediction.bits_per_target_weight,
            target_parameters=prediction.target_parameters,
            schemes={label: _scheme_bytes(claims) for label, claims in schemes.items()},
            left_16bit=_kept(plan.claims),
            parts=part_bytes(plan.claims, plan.source.config),
        ),
        weights=_weight_errors(streamed, plan.claims),
        quality=_quality(plan, evaluation, output) if evaluation else None,
        gates=tuple(Gate(**vars(gate)) for gate in gates),
        stages=tuple(costs),
        versions=package_versions(),
        device=_device(),
        serve=serve_facts(
            _shown(output),
            schemes,
            str(plan.source.config.get("model_type", "")),
            plan.loaded.recipe.model.factory,
            kv,
            None if context is None else context.length,
            adapters,
            drafts,
        ),
        files={
            path.relative_to(checkpoint).as_posix(): path.stat().st_size
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name != STAGE_FILE
        },
        calibration=_calibration(walked, streamed, plan.claims) if walked else None,
        kv=kv,
        context=context,
        long=long_facts(evaluation["long"]) if evaluation and "long" in evaluation else None,
        adapters=adapters,
        drafts=drafts,
        budget=budget,
    )


def _device() -> Device:
    return Device(
        name=device.device_name(),
        cores=psutil.cpu_count(logical=True) or 1,
        memory_bytes=psutil.virtual_memory().total,
    )


def _quality(plan: Plan, evaluation: Mapping[str, Any], output: Path) -> Quality:
    """The measurements (``EvalResult.to_json``) as the report holds them."""
    perplexity, kl = evaluation["perplexity"], evaluation["kl"]
    interval = perplexity["increase_ci95"]
    return Quality(
        perplexity=Perplexity(
            source=perplexity["source"],
            result=perplexity["result"],
            increase=perplexity["increase"],
            increase_ci95=tuple(interval) if interval else None,
        ),
        kl=Divergence(mean=kl["mean"], p999=kl["p999"]),
        **dict(Evaluated.of(evaluation)),
        top1_agreement=evaluation["top1_agreement"],
        tokens=evaluation["tokens"],
        context=evaluation["context"],
        text=evaluation["text"],
        command=_eval_command(plan, evaluation, output),
        text_dtype=evaluation["text_dtype"],
        task_dtype=evaluation["task_dtype"],
        loaded_via=evaluation["loaded_via"],
        activations_simulated=evaluation["activations_simulated"],
    )


def _eval_command(plan: Plan, evaluation: Mapping[str, Any], output: Path) -> str:
    """What measures the same again, from the present folder."""
    spec, source = plan.evaluation, plan.source
    assert spec is not None
    said = plan.loaded.recipe.model
    named = said.source
    local = source.model_dir() if source.revision is None and not named.startswith("pkg:") else None
    if local is not None:
        named = _shown(local / (source.gguf_file() or ""))
    words = [
        *("compress", "eval", _shown(output), "--source", named),
        *(("--revision", source.revision) if source.revision else ()),
        *(("--from", "dequantize") if said.from_ else ()),
        *("--text", spec.text_label if spec.text_is_shipped else _shown(spec.text)),
        *("--tokens", str(evaluation["tokens"]), "--context", str(evaluation["context"])),
        *_more_words(spec),
        *(_long_words(spec.long) if spec.long else ()),
    ]
    return shlex.join(words)


def _more_words(spec: EvalSpec) -> list[str]:
    """Options of ``compress eval`` that measure the same tasks, continuations and speed."""
    words = []
    for task, limit in spec.tasks.items():
        words += ["--task", task if limit is None else f"{task}={limit}"]
    if spec.tasks and spec.seeds != (0,):
        words += ["--task-seeds", ",".join(map(str, spec.seeds))]
    if (asked := spec.generation) is not None:
        words += ["--continuations", str(asked.prompts), "--continuation-prompt", str(asked.prompt_tokens)]
        words += ["--continuation-tokens", str(asked.new_tokens)]
    if (speed := spec.speed) is not None:
        words += ["--speed", str(speed.runs), "--speed-prompt", str(speed.prompt_tokens)]
        words += ["--speed-tokens", str(speed.new_tokens), "--speed-batch", str(speed.batch)]
    return words


def _long_words(spec: LongSpec) -> list[str]:
    """Options of ``compress eval`` that measure the same at long context."""
    documents = spec.documents_label if spec.documents_are_shipped else _shown(spec.documents)
    words = ["--long", documents, "--long-documents", str(spec.count), "--long-tokens", str(spec.tokens)]
    words += ["--long-window", str(spec.trained), "--long-stride", str(spec.stride)]
    if (asked := spec.needles) is not None:
        words += ["--long-needles", ",".join(map(str, asked.lengths)), "--long-trials", str(asked.trials)]
        words += ["--long-depths", ",".join(f"{depth:g}" for depth in asked.depths)]
        words += ["--long-kinds", ",".join(asked.kinds)]
    if (ruler := spec.ruler) is not None:
        words += ["--long-ruler", ",".join(ruler.tasks), "--long-limit", str(ruler.limit)]
        words += ["--long-ruler-tokens", ",".join(map(str, ruler.lengths))]
    return [*words, "--long-seed", str(spec.seed)]


def _shown(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def package_versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _by_scheme(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    grouped: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.stored is not None:
            grouped[claim.stored.label].append(claim)
    return dict(grouped)


def _scheme_bytes(claims: Sequence[Claim]) -> SchemeBytes:
    outputs = [output for claim in claims for output in claim.outputs]
    codes = sum(output.nbytes for output in outputs if output.name.rsplit(".", 1)[-1] in _CODES)
    total = sum(output.nbytes for output in outputs)
    return SchemeBytes(
        tensors=len(claims),
        parameters=sum(claim.tensor.numel for claim in claims),
        source_bytes=sum(claim.bytes_16bit for claim in claims),
        bytes=total,
        scale_bytes=total - codes,
    )


def _kept(claims: Sequence[Claim]) -> tuple[Kept, ...]:
    grouped: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.stored is None:
            grouped[claim.reason].append(claim)
    kept = [
        Kept(reason=reason, tensors=len(members), bytes=sum(claim.result_bytes for claim in members))
        for reason, members in grouped.items()
    ]
    return tuple(sorted(kept, key=lambda row: -row.bytes))


def _weight_errors(streamed: Path, claims: Sequence[Claim]) -> WeightFacts:
    """Errors from the shard receipts, by scheme and by layer."""
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    told = list(_part_errors(streamed))
    for error in told:
        grouped[error["scheme"]].append(error)
    found = {}
    for label, errors in grouped.items():
        ranked = sorted(
            (TensorError(name=error["module"], relative_error=_relative(error)) for error in errors),
            key=lambda error: -error.relative_error,
        )
        squared = sum(error["squared_error"] for error in errors)
        norm = sum(error["squared_norm"] for error in errors)
        found[label] = SchemeError(mean=squared / norm if norm else 0.0, worst=tuple(ranked[:_WORST]))
    return WeightFacts(relative_error=found, layers=layer_matrices(claims, told))


def _part_errors(streamed: Path) -> Iterator[Mapping[str, Any]]:
    """``PartError`` of every stored matrix, as JSON."""
    for receipt in all_receipts(streamed):
        yield from receipt["errors"]


def _calibration(walked: Mapping[str, Any], streamed: Path, claims: Sequence[Claim]) -> CalibrationFacts:
    """What the walk was shown, and the errors of the matrices that a solver fitted to it."""
    asked = {part.module for claim in claims if needs_calibration(claim) for part in claim.role.parts}
    return CalibrationFacts(
        texts=tuple(CalibrationText(name=name, tokens=tokens) for name, tokens in walked["texts"].items()),
        samples=walked["samples"],
        sequence_length=walked["sequence_length"],
        seed=walked["seed"],
        dtype=walked["dtype"],
        matrices=tuple(
            CalibratedMatrix(
                name=error["module"],
                scheme=error["scheme"],
                solver=error["solver"],
                # Without a token there is no output to be wrong.
                output_error=error["output_error"] if _has_rows(error) else None,
                rtn_output_error=error["rtn_output_error"] if _has_rows(error) else None,
                tokens=error["tokens"],
                note=error["note"],
                topped_up=error.get("topped_up", 0),
            )
            for error in _part_errors(streamed)
            # What could not be heard is streamed, by no solver's name, be it an expert's or the head's.
            if error["module"] in asked and error["solver"] is not None
        ),
        blocks=tuple(LearnedBlock(**block) for block in walked.get("blocks", ())),
        polish=_polish(walked["polish"]) if "polish" in walked else None,
        changed_16bit=tuple(walked.get("changed_16bit", ())),
        smoothed=tuple(_smoothed(facts) for facts in walked.get("smoothed", ())),
        experts=tuple(_coverage(facts) for facts in walked.get("experts", ())),
    )


def _has_rows(error: Mapping[str, Any]) -> bool:
    """Whether a matrix was solved on any token."""
    return bool(error["tokens"] or error.get("topped_up"))


def _coverage(facts: Mapping[str, Any]) -> ExpertCoverage:
    """What the experts of one layer were sent, as the walk has it (``receipts.Coverage``)."""
    tokens, topped_up = facts["tokens"], facts["topped_up"]
    return ExpertCoverage(
        name=facts["name"],
        experts=len(tokens),
        tokens=(min(tokens), float(median(tokens)), max(tokens)),
        enough=facts["enough"],
        starved=sum(count < facts["enough"] for count in tokens),
        topped_up=sum(map(bool, topped_up)),
        topped_up_tokens=sum(topped_up),
        never_reached=tokens.count(0),
        scored=facts["scored"],
        shared_range=facts["shared_range"],
    )


def _polish(facts: Mapping[str, Any]) -> PolishFacts:
    return PolishFacts(**{**facts, "changed_16bit": tuple(facts["changed_16bit"])})


def _smoothed(facts: Mapping[str, Any]) -> SmoothedInput:
    """What smoothing did about one input, as the walk's receipts hold it."""
    matrices = tuple(
        SmoothedMatrix(name=name, error_before=before, error_after=after)
        for name, (before, after) in facts["errors"].items()
    )
    rest = {name: value for name, value in facts.items() if name not in ("errors", "readers")}
    return SmoothedInput(**rest, readers=tuple(facts["readers"]), matrices=matrices)


def _relative(error: Mapping[str, Any]) -> float:
    return float(error["squared_error"] / error["squared_norm"]) if error["squared_norm"] else 0.0
