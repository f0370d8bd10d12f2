"""The only loop: resume or execute each stage of a plan, then export what came out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.budget.gates import check_gates
from compressor.errors import GateError, UserError
from compressor.evals.base import EvalResult
from compressor.export import (
    already_exported,
    describe,
    export_folder,
    exported,
    failed_folder,
    refuse_foreign,
)
from compressor.meter import metered
from compressor.model.aliases import linear_aliases
from compressor.model.load import check_known
from compressor.planner.adapter_result import adapter_facts
from compressor.planner.calibrated import walk_key
from compressor.planner.context_result import context_facts
from compressor.planner.evaluated import measured_content
from compressor.planner.keys import stream_key
from compressor.planner.kv_result import told_kv
from compressor.planner.oneshot import oneshot_key
from compressor.planner.plan import Plan
from compressor.planner.polished import polish_key
from compressor.planner.relocated import recipe_seen_from
from compressor.planner.staged import base_source, scaled_source, trained_source, weights_source
from compressor.progress import Progress
from compressor.recipe.load import dump_recipe
from compressor.report.manifest import Manifest, write_manifest
from compressor.report.model import Report, StageCost, load_report
from compressor.stages.adapt import adapt_stage
from compressor.stages.adapt_files import copy_adapter
from compressor.stages.assemble import assemble
from compressor.stages.context import context_stage
from compressor.stages.evaluate import check_tokens, evaluate_stage, measure, reload
from compressor.stages.kv import kv_stage
from compressor.stages.kv_export import result_names
from compressor.stages.oneshot import check_oneshot, oneshot_stage
from compressor.stages.polish import polish_stage
from compressor.stages.receipts import all_receipts
from compressor.stages.stream import stream
from compressor.stages.walk import walk_stage
from compressor.stages.walked import WalkedTensors
from compressor.summary import package_versions, summarize
from compressor.workspace import stage_key

ASSEMBLE_VERSION = 1
EVALUATE_VERSION = 2


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        output: the folder that holds the checkpoint: the plan's, or the one aside where a gate failed.
        report: its report.
    """

    output: Path
    report: Report

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.report.gates)

    def raise_if_failed(self) -> None:
        """Raises GateError unless every gate passed."""
        failed = [
            f"{gate.metric} {gate.value:.4g} > {gate.max_increase:.4g}"
            for gate in self.report.gates
            if not gate.passed
        ]
        if failed:
            raise GateError(f"{'; '.join(failed)}; the result is kept in {self.output}")


@dataclass(frozen=True)
class _Stage:
    """One step: its name, content key, and the work that fills the folder it is given."""

    name: str
    key: str
    work: Callable[[Path], Mapping[str, Any]]


def execute(plan: Plan, progress: Progress, *, fresh: bool = False) -> RunResult:
    """Runs the plan; finished stages are taken from the workspace, finished exports are left as they are.

    Args:
        plan: made with ``planning=False``.
        progress: told of everything.
        fresh: forget this plan's stages first.

    Raises:
        UserError: the output folder holds something else, the disk is full, the source is broken.
    """
    _check_alone()
    for warning in plan.warnings:
        progress.warn(warning)
    recipe_yaml = dump_recipe(recipe_seen_from(plan.output, plan))
    with plan.workspace.locked():
        stages = _stages(plan, progress)
        for done in (plan.output, failed_folder(plan.output)):
            if not fresh and already_exported(done, recipe_yaml, stages[-1].key):
                progress.log(f"{done} already holds this recipe's result")
                return RunResult(done, load_report(done))
        _check_target(plan, recipe_yaml, stages[-1].key)
        check_known(plan.source)
        costs = []
        with _placed(plan):
            # Stages before the weights may be another recipe's, for which other things were checked.
            if not plan.workspace.finished("stream", stream_key(plan)):
                _check_early(plan)
            for stage in stages:
                if fresh:
                    plan.workspace.discard(stage.name, stage.key)
                costs.append(_resume_or_execute(plan, stage, progress))
        return _export(plan, recipe_yaml, stages, costs, progress)


def _check_alone() -> None:
    """Refuses the several processes of ``torchrun`` or ``accelerate launch``: each would run all stages."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.isdecimal() and processes not in ("0", "1"):
        what = f"WORLD_SIZE is {processes}: several processes were started, and a recipe is run by one"
        raise UserError(what, fix="start it by itself; docs/context.md says how GPUs share a training")


@contextmanager
def _placed(plan: Plan) -> Iterator[None]:
    """Puts file:line:column in the place of a recipe's key, as the plan does for the faults that it finds."""
    try:
        yield
    except UserError as error:
        place = plan.loaded.places.get(error.where)
        if place is None:
            raise
        raise UserError(error.what, where=place, fix=error.fix) from error


def _check_early(plan: Plan) -> None:
    """Refuses, before anything is spent, what cannot be loaded or walked, and a text that is too short."""
    source = plan.configured
    linear_aliases(source)  # the config names them, when all else is done
    if plan.walk is not None:
        from compressor.model.tape import check_walkable

        check_walkable(source)
    if plan.oneshot is not None:
        check_oneshot(source, plan.claims)
    if plan.evaluation is not None:
        check_tokens(plan.source, plan.evaluation, plan.workspace)


def evaluate_again(plan: Plan, progress: Progress) -> EvalResult:
    """Measures the exported result of a plan, as its ``evaluate`` section says.

    Raises:
        UserError: evaluation is switched off, or the output folder holds no result.
    """
    if plan.evaluation is None:
        raise UserError("the recipe switches evaluation off", where="evaluate")
    if not (plan.output / "config.json").is_file():
        raise UserError("no result to measure", where=str(plan.output), fix="run the recipe first")
    result = reload(plan.output, plan.source)
    return measure(plan.source, plan.output, result, plan.evaluation, progress)


def _stages(plan: Plan, progress: Progress) -> list[_Stage]:
    space = plan.workspace
    walk = plan.walk
    zeroth = None if walk is None else walk_key(walk, plan.claims, plan.weights_source)
    found = None if zeroth is None else space.artefact("walk", zeroth)
    polish = None
    if plan.polish is not None and zeroth is not None:
        polish = _polish(plan, zeroth, progress)
        found = space.artefact(polish.name, polish.key)
    oneshot = _oneshot(plan, progress)
    if oneshot is not None:
        found = space.artefact(oneshot.name, oneshot.key)
    first = stream_key(plan)
    kv = _kv(plan, progress)
    adapt = _adapt(plan, progress)
    needs = [first] if kv is None else [first, kv.key]
    # Merged adapters are in the weights.
    needs += [adapt.key] if adapt is not None and plan.base_source == plan.scaled_source else []
    second = stage_key("assemble", ASSEMBLE_VERSION, {}, needs)
    streamed, checkpoint = space.artefact("stream", first), space.artefact("assemble", second)
    spec = plan.evaluation
    third = stage_key("evaluate", EVALUATE_VERSION, measured_content(plan.evaluation), [second])

    def run_stream(folder: Path) -> Mapping[str, Any]:
        walked = None if found is None else WalkedTensors(found)
        shards, dialect, evict = plan.shards, plan.dialect, plan.evicts
        return {
            "resumed": stream(weights_source(plan), shards, dialect, folder, progress, walked, evict=evict)
        }

    def run_assemble(folder: Path) -> Mapping[str, Any]:
        heard = None if kv is None else space.artefact(kv.name, kv.key)
        assemble(base_source(plan), plan.shards, plan.dialect, streamed, folder, heard)
        if adapt is not None:
            copy_adapter(space.artefact(adapt.name, adapt.key), folder)
        return {}

    def run_evaluate(folder: Path) -> Mapping[str, Any]:
        bounds = plan.loaded.recipe.workspace
        most = bounds.max_memory_bytes if bounds is not None else None
        apart = plan.context is not None and plan.context.measured_tokens
        scaled = scaled_source(plan) if apart else None
        return evaluate_stage(plan.source, checkpoint, plan.claims, spec, progress, most, scaled, folder)

    before = [stage for stage in (_context(plan, progress), adapt, kv) if stage is not None]
    stages = [
        _Stage("stream", first, run_stream),
        _Stage("assemble", second, run_assemble),
        _Stage("evaluate", third, run_evaluate),
    ]
    if oneshot is not None:
        return [*before, oneshot, *stages]
    if walk is None or zeroth is None:
        return [*before, *stages]

    def run_walk(folder: Path) -> Mapping[str, Any]:
        shown, how, evict = walk.calibration, walk.walk, plan.evicts
        return walk_stage(weights_source(plan), plan.claims, shown, how, folder, progress, evict=evict)

    walked = [*before, _Stage("walk", zeroth, run_walk)]
    return [*walked, *stages] if polish is None else [*walked, polish, *stages]


def _context(plan: Plan, progress: Progress) -> _Stage | None:
    """The first stage, where positions are scaled."""
    planned = plan.context
    if planned is None:
        return None

    def run_context(folder: Path) -> Mapping[str, Any]:
        return context_stage(plan.source, planned.job, folder, progress)

    return _Stage("context", planned.key(plan.source.fingerprint), run_context)


def _adapt(plan: Plan, progress: Progress) -> _Stage | None:
    """The stage after it that trains adapters."""
    planned = plan.adapters
    if planned is None:
        return None

    spec, key = planned.spec, planned.key(plan.scaled_source)
    return _Stage("adapt", key, lambda folder: adapt_stage(trained_source(plan), spec, folder, progress))


def _kv(plan: Plan, progress: Progress) -> _Stage | None:
    """The stage before the weights that fits what the KV cache needs."""
    planned = plan.kv_stage
    if planned is None:
        return None

    def run_kv(folder: Path) -> Mapping[str, Any]:
        return kv_stage(base_source(plan), planned.job, planned.calibration, folder, progress)

    return _Stage("kv", planned.key(plan.base_source), run_kv)


def _oneshot(plan: Plan, progress: Progress) -> _Stage | None:
    """The stage in the walk's place where llm-compressor chooses the values."""
    oneshot = plan.oneshot
    if oneshot is None:
        return None

    def run_oneshot(folder: Path) -> Mapping[str, Any]:
        return oneshot_stage(base_source(plan), plan.claims, oneshot.calibration, folder, progress)

    return _Stage("oneshot", oneshot_key(oneshot, plan.claims, plan.base_source), run_oneshot)


def _polish(plan: Plan, walked: str, progress: Progress) -> _Stage:
    """The stage after the walk, whose key is ``walked``."""
    assert plan.polish is not None
    assert plan.walk is not None
    calibration, spec = plan.walk.calibration, plan.polish.spec

    def run_polish(folder: Path) -> Mapping[str, Any]:
        artefact = plan.workspace.artefact("walk", walked)
        return polish_stage(weights_source(plan), plan.claims, calibration, spec, artefact, folder, progress)

    return _Stage("polish", polish_key(plan.polish, walked), run_polish)


def _resume_or_execute(plan: Plan, stage: _Stage, progress: Progress) -> StageCost:
    space = plan.workspace
    if space.finished(stage.name, stage.key):
        progress.log(f"{stage.name}: already done")
        cost = space.facts(stage.name, stage.key)["cost"]
        return StageCost.model_validate(cost | {"resumed": True})
    folder = space.begin(stage.name, stage.key)
    with metered() as meter:
        facts = stage.work(folder)
    cost = {
        "name": stage.name,
        "wall_s": round(meter.wall_s, 3),
        "peak_rss_bytes": meter.peak_rss_bytes,
        "peak_device_bytes": meter.peak_device_bytes,
        "resumed": bool(facts.get("resumed", False)),
    }
    space.publish(stage.name, stage.key, {**facts, "cost": cost})
    return StageCost.model_validate(cost)


def _export(
    plan: Plan, recipe_yaml: str, stages: list[_Stage], costs: list[StageCost], progress: Progress
) -> RunResult:
    """Adds report, page, card and manifest to the checkpoint, and lets the output folder appear."""
    space = plan.workspace
    artefacts = {stage.name: space.artefact(stage.name, stage.key) for stage in stages}
    facts = space.facts("evaluate", stages[-1].key)
    gates = check_gates(plan.gates, facts["gate_values"])
    passed = all(gate.passed for gate in gates)
    result_folder = plan.output if passed else failed_folder(plan.output)
    shown = {stage.name: space.facts(stage.name, stage.key) for stage in stages}
    calibrated = shown.get("walk") or shown.get("oneshot")
    walked = calibrated["calibration"] if calibrated else None
    if walked is not None and plan.polish is not None:
        walked = walked | {"polish": shown["polish"]["polish"]}
    report = summarize(
        plan,
        artefacts["stream"],
        artefacts["assemble"],
        facts["evaluation"],
        walked,
        gates,
        costs,
        result_folder,
        told_kv(plan, artefacts.get("kv"), shown),
        context_facts(plan, artefacts["context"], shown["context"]["context"], facts)
        if plan.context is not None
        else None,
        adapter_facts(plan, shown),
    )
    with export_folder(space, result_folder, artefacts["assemble"]) as folder:
        describe(folder, report, recipe_yaml)
        manifest = write_manifest(
            folder,
            key=stages[-1].key,
            source=plan.source,
            versions=package_versions(),
            seed=plan.loaded.recipe.seed,
            progress=progress,
        )
        _check_shards(plan, stages, manifest, artefacts["stream"])
    progress.log(f"exported to {result_folder}")
    return RunResult(result_folder, report)


def _check_shards(plan: Plan, stages: list[_Stage], manifest: Manifest, streamed: Path) -> None:
    """Compares what is about to be exported with what was hashed when it was written."""
    scales = plan.kv_stage is not None and bool(plan.kv_stage.job.scales)
    names, _ = result_names(len(plan.shards), scales=scales)
    for name, receipt in zip(names, all_receipts(streamed), strict=True):
        if manifest.files[name].sha256 != receipt["sha256"]:
            for stage in stages:
                plan.workspace.discard(stage.name, stage.key)
            raise UserError(
                "a shard in the workspace has changed since it was written (a failing disk, or an edit)",
                where=name,
                fix="run again: the stage will be done anew",
            )


def _check_target(plan: Plan, recipe_yaml: str, key: str) -> None:
    """Refuses, before hours are spent, an output folder that the result could not go to."""
    try:
        plan.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the output folder cannot be made: {error.strerror}",
            where=str(plan.output),
            fix="choose another --output",
        ) from error
    refuse_foreign(plan.output)
    if exported(plan.output) is not None and not already_exported(plan.output, recipe_yaml, key):
        raise UserError(
            "the output folder holds the result of another recipe, source or version",
            where=str(plan.output),
            fix="choose another --output, or move it away",
        )
