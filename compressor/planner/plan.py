"""Recipe + tensor headers -> Plan. Reads no weights; finds every fault that can be found early, together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from compressor import data
from compressor.budget.gates import Gate, check_gate_metric
from compressor.checkpoint.base import Source
from compressor.checkpoint.sources import open_source
from compressor.dialects import DIALECTS
from compressor.dialects.base import Dialect
from compressor.errors import PlanError, UserError
from compressor.evals.base import SHIPPED_TASKS, EvalSpec
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.kv_bytes import full_context
from compressor.planner.layout import group_units, pack_shards
from compressor.planner.places import check_disk, check_places, check_text
from compressor.planner.predict import Prediction, RuleRow, predict, rule_rows
from compressor.recipe.load import LoadedRecipe
from compressor.stages.base import Claim, Shard
from compressor.stages.evaluate import memory_needed
from compressor.stages.modules import modules_of
from compressor.workspace import Workspace, stage_key

T = TypeVar("T")

STREAM_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, decided before it reads a weight.

    Attributes:
        loaded: the resolved recipe and where it came from.
        source: the opened source (headers only so far).
        family: the family's name, and what the fallback inferred ("" for named families).
        claims: one for each source tensor.
        dialect: how the result is spelled.
        shards: the output files' contents.
        rows: the claims summed by rule.
        prediction: bytes, memory, disk, time, GPUs.
        evaluation: what to measure, or None where the recipe switches it off.
        gates: what the measured losses must not exceed.
        output: the output folder.
        workspace: where stages are kept.
        warnings: things the user should know before starting.
    """

    loaded: LoadedRecipe
    source: Source
    family: str
    inferred: str
    claims: tuple[Claim, ...]
    dialect: Dialect
    shards: tuple[Shard, ...]
    rows: tuple[RuleRow, ...]
    prediction: Prediction
    evaluation: EvalSpec | None
    gates: tuple[Gate, ...]
    output: Path
    workspace: Workspace
    warnings: tuple[str, ...]

    @property
    def reload_rss_bytes(self) -> int:
        """Memory to load the result back, and to measure it against its source where that is asked for."""
        return memory_needed(self.claims, self.evaluation)


def make_plan(
    loaded: LoadedRecipe, *, output: Path | None = None, workspace: Path | None = None, planning: bool = True
) -> Plan:
    """Plans a recipe.

    Args:
        loaded: the recipe.
        output: the output folder; default ``out/<name>`` in the current folder.
        workspace: the workspace folder; default ``.compress-workspace`` beside the output folder, so that
            finished shards can be linked instead of copied.
        planning: True allows shipped headers in place of an unreachable source, and skips checks of this
            machine's disk.

    Raises:
        PlanError: every fault found.
        UserError: the source cannot be opened at all.
    """
    recipe = loaded.recipe
    output = (output or Path("out") / recipe.name).resolve()
    space = Workspace((workspace or output.parent / ".compress-workspace").resolve())
    source = open_source(
        recipe.model.source,
        revision=recipe.model.revision,
        sha256=recipe.model.sha256,
        headers=data.find(recipe.model.headers, beside=loaded.folder) if recipe.model.headers else None,
        beside=loaded.folder,
        cache=space.hub,
        planning=planning,
    )
    faults: list[UserError] = []
    evaluation = _collect(faults, lambda: evaluation_spec(loaded, full_context(source.config)))
    family = family_for(source.config)
    dialect = DIALECTS[recipe.export.format]
    claims = _collect(
        faults, lambda: claim_tensors(source.headers, source.config, family, recipe.weights, dialect)
    )
    if claims is None or faults:
        raise PlanError(_placed(faults, loaded))
    units = group_units(claims)
    # Only Hub sources have a revision: their shards are downloaded into the workspace.
    download = sum(header.nbytes for header in source.headers.values()) if source.revision else 0
    prediction = predict(claims, units, source.config, download)
    check_places(output, space.root, source.model_dir() if source.revision is None else None, faults)
    plan = Plan(
        loaded=loaded,
        source=source,
        family=family.name,
        inferred=family.inferred,
        claims=tuple(claims),
        dialect=dialect,
        shards=tuple(pack_shards(units, recipe.export.max_shard_bytes)),
        rows=tuple(rule_rows(claims)),
        prediction=prediction,
        evaluation=evaluation,
        gates=tuple(recipe.evaluate.gates) if recipe.evaluate else (),
        output=output,
        workspace=space,
        warnings=(*_warnings(loaded, source), *dialect.warnings(modules_of(source, claims))),
    )
    if not planning:
        check_disk(prediction, output, space, stream_key(plan), faults)
    if faults:
        raise PlanError(faults)
    return plan


def stream_key(plan: Plan) -> str:
    """Content key of the weights stage: the source and every claim, not the recipe's spelling of them."""
    spec = {
        "claims": [
            [
                claim.tensor.name,
                claim.action,
                claim.scheme.model_dump(mode="json") if claim.scheme else None,
                claim.solver.model_dump(mode="json") if claim.solver else None,
                asdict(claim.role),
                [[output.name, output.dtype, output.shape] for output in claim.outputs],
            ]
            for claim in plan.claims
        ],
        "shards": [len(shard.units) for shard in plan.shards],
        "seed": plan.loaded.recipe.seed,
    }
    if plan.dialect.name != "compressed-tensors":
        # Left out for the first dialect: its stages from before there were others stay valid.
        spec["dialect"] = plan.dialect.name
    return stage_key("stream", STREAM_VERSION, spec, [plan.source.fingerprint])


def evaluation_spec(loaded: LoadedRecipe, longest: int | None) -> EvalSpec | None:
    """The recipe's ``evaluate`` section with its files found and its names checked.

    ``longest`` is the model's context, in tokens, if it is known.

    Raises:
        PlanError: a missing text, an unknown task or metric; all of them together.
    """
    section = loaded.recipe.evaluate
    if section is None:
        return None
    faults: list[UserError] = []
    text = _collect(faults, lambda: check_text(section.text, loaded.folder))
    if longest is not None and section.context > longest:
        what = f"windows of {section.context} tokens are longer than the model's context of {longest}"
        faults.append(UserError(what, where="evaluate.context", fix=f"set it to {longest} at most"))
    for index, task in enumerate(section.tasks):
        if task.name not in SHIPPED_TASKS:
            faults.append(
                UserError(
                    f"unknown task {task.name!r}; shipped: {', '.join(SHIPPED_TASKS)}",
                    where=f"evaluate.tasks.{index}",
                )
            )
    tasks = {task.name: task.limit for task in section.tasks}
    for index, gate in enumerate(section.gates):
        check = partial(check_gate_metric, gate.metric, tuple(tasks), where=f"evaluate.gates.{index}")
        _collect(faults, check)
    if text is None or faults:
        raise PlanError(faults)
    return EvalSpec(
        text=text,
        text_label=section.text,
        tokens=section.tokens,
        context=section.context,
        tasks=tasks,
        seed=loaded.recipe.seed,
        text_is_shipped=text.is_relative_to(data.shipped_root() / "calibration"),
    )


def _placed(faults: list[UserError], loaded: LoadedRecipe) -> list[UserError]:
    """The same faults, with file:line:column in the place of recipe keys."""
    return [
        UserError(fault.what, where=loaded.places.get(fault.where, fault.where), fix=fault.fix)
        for fault in faults
    ]


def _collect(faults: list[UserError], make: Callable[[], T]) -> T | None:
    try:
        return make()
    except PlanError as error:
        faults.extend(error.faults)
    except UserError as error:
        faults.append(error)
    return None


def _warnings(loaded: LoadedRecipe, source: Source) -> list[str]:
    found = []
    if loaded.recipe.evaluate is None:
        found.append("evaluate is switched off: nothing will be measured, and the report will say so")
    if source.kind == "safetensors" and source.revision and loaded.recipe.model.revision != source.revision:
        found.append(f"model.revision is not pinned; this run uses {source.revision}")
    return found
