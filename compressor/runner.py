"""The only loop: resume or execute each stage of a plan, then export what came out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor.budget.gates import GateVerdict, acceptance_sample, check_gates
from compressor.budget.samples import sample_from_json
from compressor.checkpoint.made_by import allowed_factory
from compressor.errors import GateError, UserError
from compressor.evals.base import EvalResult
from compressor.export import already_exported, check_target, describe, export_folder, failed_folder
from compressor.meter import metered
from compressor.model.aliases import linear_aliases
from compressor.model.load import check_known
from compressor.pipeline import Stage, stages_of, stages_to_choose
from compressor.planner.adapter_result import adapter_facts
from compressor.planner.budget_result import budget_facts
from compressor.planner.compounding_result import with_compounding
from compressor.planner.context_result import context_facts
from compressor.planner.draft_result import draft_facts
from compressor.planner.keys import stream_key
from compressor.planner.kv_result import told_kv
from compressor.planner.plan import Plan, make_plan
from compressor.planner.relocated import recipe_seen_from
from compressor.progress import Progress
from compressor.recipe.load import dump_recipe
from compressor.report.manifest import Manifest, write_manifest
from compressor.report.model import Report, StageCost, load_report
from compressor.report.rows import gate_sentence
from compressor.stages.budget import choice_of
from compressor.stages.drafts import check_drafts, name_verifier
from compressor.stages.evaluate import check_tokens, measure, reload
from compressor.stages.kv_export import result_names
from compressor.stages.oneshot import check_oneshot
from compressor.stages.receipts import all_receipts
from compressor.summary import package_versions, summarize


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
        failed = [gate_sentence(gate) for gate in self.report.gates if not gate.passed]
        if failed:
            raise GateError(f"{'; '.join(failed)}; the result is kept in {self.output}")


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
        plan, costs = _chosen(plan, progress, fresh=fresh)
        stages = _stages(plan, progress, fresh=fresh)
        for done in (plan.output, failed_folder(plan.output)):
            if not fresh and already_exported(done, recipe_yaml, stages[-1].key):
                progress.log(f"{done} already holds this recipe's result")
                return RunResult(done, load_report(done))
        check_target(plan.output, recipe_yaml, stages[-1].key)
        check_known(plan.source)
        with _placed(plan):
            # Stages before the weights may be another recipe's, for which other things were checked.
            if not plan.workspace.finished("stream", stream_key(plan)):
                _check_early(plan)
            _check_drafts(plan)
            for stage in stages[len(costs) :]:
                if fresh:
                    plan.workspace.discard(stage.name, stage.key)
                costs.append(_resume_or_execute(plan, stage, progress))
        return _export(plan, recipe_yaml, stages, costs, progress)


def _chosen(plan: Plan, progress: Progress, *, fresh: bool) -> tuple[Plan, list[StageCost]]:
    """The plan with its schemes chosen, and the costs of the stages that are done by then: its first ones."""
    if plan.budget is None or plan.budget.choice is not None:
        return plan, []
    stages = stages_to_choose(plan, progress)
    costs = []
    with _placed(plan):
        if not plan.workspace.finished(stages[-1].name, stages[-1].key):
            check_known(plan.source)
            _check_early(plan)
        for stage in stages:
            if fresh:
                plan.workspace.discard(stage.name, stage.key)
            costs.append(_resume_or_execute(plan, stage, progress))
        choice = choice_of(plan.workspace.facts(stages[-1].name, stages[-1].key))
        chosen = make_plan(
            plan.loaded,
            output=plan.output,
            workspace=plan.workspace.root,
            planning=False,
            allow_code=allowed_factory(plan.source) is not None,
            choice=choice,
        )
    return chosen, costs


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


def _check_drafts(plan: Plan) -> None:
    """Refuses a draft model of other tokens, and texts too short to measure decoding on."""
    if plan.drafts is None:
        return
    model = plan.drafts.model
    if model is not None:
        check_known(model.source)
    check_drafts(plan.source, plan.drafts.spec, None if model is None else model.source, plan.workspace)


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
    return measure(plan.source, plan.output, result, plan.evaluation, progress, space=plan.workspace)


def _stages(plan: Plan, progress: Progress, *, fresh: bool = False) -> list[Stage]:
    return stages_of(plan, progress, lambda within: _made(within, progress, fresh=fresh))


def _made(plan: Plan, progress: Progress, *, fresh: bool) -> Path:
    """The checkpoint of a plan within another's, without what describes its run."""
    progress.log(f"draft model: {plan.source.label}")
    # The other plan has told its warnings.
    execute(replace(plan, warnings=()), progress, fresh=fresh)
    stage = next(stage for stage in _stages(plan, progress) if stage.name == "assemble")
    return plan.workspace.artefact(stage.name, stage.key)


def _resume_or_execute(plan: Plan, stage: Stage, progress: Progress) -> StageCost:
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
    plan: Plan, recipe_yaml: str, stages: list[Stage], costs: list[StageCost], progress: Progress
) -> RunResult:
    """Adds report, page, card and manifest to the checkpoint, and lets the output folder appear."""
    space = plan.workspace
    artefacts = {stage.name: space.artefact(stage.name, stage.key) for stage in stages}
    facts = space.facts("evaluate", stages[-1].key)
    shown = {stage.name: space.facts(stage.name, stage.key) for stage in stages}
    gates = _judged(plan, shown, progress)
    passed = all(gate.passed for gate in gates)
    result_folder = plan.output if passed else failed_folder(plan.output)
    calibrated = shown.get("walk") or shown.get("oneshot")
    walked = calibrated["calibration"] if calibrated else None
    if walked is not None and plan.polish is not None:
        walked = walked | {"polish": shown["polish"]["polish"]}
    checkpoint = artefacts.get("drafts", artefacts["assemble"])
    report = summarize(
        plan,
        artefacts["stream"],
        checkpoint,
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
        draft_facts(plan, shown),
        budget_facts(shown),
    )
    report = with_compounding(report, plan, artefacts.get("kv"))
    with export_folder(space, result_folder, checkpoint) as folder:
        name_verifier(folder, report.serve.model)
        describe(folder, report, recipe_yaml)
        manifest = write_manifest(
            folder,
            key=stages[-1].key,
            source=plan.source,
            versions=package_versions(),
            seed=plan.loaded.recipe.seed,
            refused=tuple(gate.sentence() for gate in gates if not gate.passed),
            progress=progress,
        )
        replaced = shown["drafts"]["drafts"]["replaced"] if plan.drafts is not None else {}
        _check_shards(plan, stages, manifest, artefacts["stream"], replaced)
    progress.log(f"exported to {result_folder}")
    return RunResult(result_folder, report)


def _judged(plan: Plan, shown: Mapping[str, Mapping[str, Any]], progress: Progress) -> list[GateVerdict]:
    """The gates' verdicts on what the stages measured; warns of what a person should look at."""
    samples = {name: sample_from_json(kept) for name, kept in shown["evaluate"]["gate_samples"].items()}
    if "decode" in shown:
        samples |= acceptance_sample(shown["decode"]["decoding"])
    gates = check_gates(plan.gates, samples, plan.loaded.recipe.seed)
    for gate in gates:
        if gate.passed and gate.note:
            progress.warn(f"gate {gate.sentence()}")
    return gates


def _check_shards(
    plan: Plan, stages: list[Stage], manifest: Manifest, streamed: Path, replaced: Mapping[str, str]
) -> None:
    """Compares what is about to be exported with what was hashed when it was written, or ``replaced``."""
    scales = plan.kv_stage is not None and bool(plan.kv_stage.job.scales)
    names, _ = result_names(len(plan.shards), scales=scales)
    for name, receipt in zip(names, all_receipts(streamed), strict=True):
        if manifest.files[name].sha256 != replaced.get(name, receipt["sha256"]):
            for stage in stages:
                plan.workspace.discard(stage.name, stage.key)
            raise UserError(
                "a shard in the workspace has changed since it was written (a failing disk, or an edit)",
                where=name,
                fix="run again: the stage will be done anew",
            )
