"""What a recipe may say: frozen pydantic models. Field descriptions are the reference that editors show.

``extends``, ``${VAR}`` and ``--set`` are gone by the time a ``Recipe`` exists (``compressor.recipe.load``).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compressor.dialects.base import DialectName
from compressor.recipe.adapters import AdaptersSection
from compressor.recipe.calibration import CalibrationSection
from compressor.recipe.context import ContextSection
from compressor.recipe.drafts import DraftsSection
from compressor.recipe.evaluate_long import LongSection
from compressor.recipe.fields import (
    Bytes,
    Count,
    Factory,
    Metric,
    Pattern,
    Patterns,
    Revision,
    SchemeOrCopy,
    Seed,
    Sha256,
    Slug,
    SolverOrNone,
    Text,
    Window,
    no_bool,
)
from compressor.recipe.kv_cache import KvCacheSection
from compressor.recipe.polish import PolishSection
from compressor.recipe.section import Section, blamed, is_none
from compressor.schemes import SchemeField
from compressor.solvers import SolverField, parse_solver

# Keys that the language reserves and that no stage serves yet: path in the recipe -> how faults name it.
RESERVED: dict[tuple[str, ...], str] = {
    ("publish",): "section 'publish'",
}


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _false_is_none(value: object) -> object:
    return None if value is False else value


class ModelSection(Section):
    """Where the weights come from."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Text = Field(
        description="A local folder, a Hub id (org/name), a .gguf file, or pkg:PACKAGE/FILE.gguf: a file "
        "inside an installed Python package."
    )
    revision: Revision | None = Field(
        default=None, description="Hub commit, tag or branch. Pin a commit to make the run repeatable."
    )
    sha256: Sha256 | None = Field(
        default=None,
        description="Hex SHA-256 that the single .gguf file must have; the run stops if it differs.",
    )
    # Left out of what is written where nothing was said: recipes from before it existed stay the same bytes.
    from_: Literal["dequantize", "keep"] | None = Field(
        default=None,
        alias="from",
        exclude_if=is_none,
        description="What becomes of weights that the source stores quantized (FP8 blocks, MXFP4, "
        "compressed-tensors, ModelOpt): `dequantize` reads them as bfloat16; `keep` carries those of "
        "compressed-tensors into the result as they are, whatever rules say. By default they are refused.",
    )
    factory: Factory | None = Field(
        default=None,
        exclude_if=is_none,
        description="MODULE:CALLABLE of an installed package that makes the model, where transformers does "
        "not know it. Called with what config.json holds as keyword arguments, it gives a torch module that "
        "makes logits of token ids. `compress run` calls it with --allow-code only.",
    )
    headers: Text | None = Field(
        default=None,
        description="A folder with config.json and tensors.json; `compress plan` uses it where the source "
        "itself cannot be reached. A run still needs the source.",
    )

    @model_validator(mode="after")
    def _sha256_of_one_file(self) -> ModelSection:
        if self.sha256 is not None and not self.source.lower().endswith(".gguf"):
            raise blamed(
                ("sha256",), "sha256 is checked of a single .gguf file only; pin other sources by revision"
            )
        return self


class WeightRule(Section):
    """How the tensors that match are stored; of all rules the first that matches wins."""

    match: Patterns = Field(
        description="One pattern or several over checkpoint names: tensor names, or module names (the tensor "
        "name without .weight). A glob over the whole name (* crosses dots), or re: and a regular expression."
    )
    scheme: SchemeOrCopy = Field(
        description="A scheme by name or with options, or `copy`: keep the source's 16 bit."
    )
    solver: SolverOrNone = Field(
        default=None, description="The solver of these tensors; by default that of the section."
    )

    @model_validator(mode="after")
    def _copies_need_no_solver(self) -> WeightRule:
        if self.scheme == "copy" and self.solver is not None:
            raise blamed(("solver",), "a solver has no effect with `scheme: copy`")
        return self


class WeightsSection(Section):
    """How the weights are stored and how the stored values are chosen."""

    scheme: SchemeField = Field(
        description="The scheme of every linear weight that no rule or ignore claims."
    )
    solver: SolverField = Field(
        default_factory=lambda: parse_solver("rtn"), description="How the stored values are chosen."
    )
    ignore: tuple[Pattern, ...] = Field(
        default=(), description="Patterns (as in rules) of tensors to copy in 16 bit; they precede the rules."
    )
    rules: tuple[WeightRule, ...] = Field(default=(), description="Exceptions, first match wins.")
    polish: PolishSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="A short distillation of scales, norms and biases after all layers; by default none.",
    )


class EvalTask(Section):
    """An lm-eval task to run on source and result."""

    name: Slug = Field(description="The task's name; `piqa` runs offline from shipped items.")
    limit: Count | None = Field(default=None, description="Use only the first N items; all by default.")


class Gate(Section):
    """A bound on the loss of quality; beyond it the run ends with exit code 1 and the result kept aside."""

    metric: Metric = Field(
        description="`perplexity`: relative increase of the result's perplexity over the source's. `kl`: "
        "mean Kullback-Leibler divergence from source to result, in nats per token. `task:NAME`: how far the "
        "accuracy on that task of evaluate.tasks may fall."
    )
    max_increase: Annotated[float, Field(ge=0)] = Field(
        description="The largest loss that passes: 0.3 or '30%' for perplexity (result at most 1.3 times the "
        "source), nats for kl, 0.02 or '2%' (two points of accuracy) for a task.",
        json_schema_extra={"type": ["number", "string"]},
    )

    @field_validator("max_increase", mode="before")
    @classmethod
    def _percent(cls, value: object, info: ValidationInfo) -> object:
        no_bool(value)
        if not isinstance(value, str):
            return value
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})? ?%", value, re.ASCII):
            raise ValueError(f"{value!r} is neither a number nor a percentage such as '30%'")
        if info.data.get("metric") == "kl":
            raise ValueError(
                "kl is absolute, in nats per token: write a number such as 0.05, not a percentage"
            )
        return float(Decimal(value.rstrip(" %")) / 100)


class EvaluateSection(Section):
    """What is measured on source and result after the run, and what the result must not exceed."""

    text: Text = Field(
        default="calibration/heldout.jsonl",
        description="Held-out text for perplexity and KL: UTF-8, plain or JSON lines with the field `text`. "
        "Looked for from the current folder, beside the recipe, then among the shipped files.",
    )
    tokens: Count = Field(default=16384, ge=2, description="How many tokens of it are read.")
    context: Window = Field(
        default=1024, description="Tokens in one window; each window is scored on its own."
    )
    tasks: tuple[Annotated[EvalTask, BeforeValidator(_named, json_schema_input_type=EvalTask | str)], ...] = (
        Field(default=(), description="lm-eval tasks, by name or as {name, limit}.")
    )
    gates: tuple[Gate, ...] = Field(
        default=(), description="Bounds that decide whether the result is exported."
    )
    long: LongSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="What is measured at long context, beyond the text: by default nothing.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSection:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise blamed(("tasks", index), f"task {name!r} is listed twice")
        for index, gate in enumerate(self.gates):
            if gate.metric.startswith("task:") and gate.metric[5:] not in names:
                raise blamed(
                    ("gates", index, "metric"), f"no task {gate.metric[5:]!r} in evaluate.tasks to measure"
                )
        return self


class ExportSection(Section):
    """How the result's files are laid out."""

    format: DialectName = Field(
        default="compressed-tensors",
        description="Names and shapes of what is written, and the engine's config: `compressed-tensors`, or "
        "`modelopt`, as NVIDIA ModelOpt exports (the nvfp4 and fp8 schemes only).",
    )
    max_shard_bytes: Bytes = Field(
        default=2_000_000_000,
        description="Largest safetensors shard: bytes, or text such as 2GB or 512MiB. A larger tensor has a "
        "shard of its own.",
    )


class WorkspaceSection(Section):
    """What the run may take of this machine."""

    max_bytes: Bytes | None = Field(
        default=None,
        exclude_if=is_none,
        description="Most bytes that the run may take on the disk, in workspace and output, such as 60GB. "
        "Where that does not hold a Hub source, its shards are fetched when they are read and removed when "
        "what is made of them is written. A plan that cannot keep to it is refused. By default no bound.",
    )
    max_memory_bytes: Bytes | None = Field(
        default=None,
        exclude_if=is_none,
        description="Most memory that the run may take, such as 8GB; by default what is free. Where blocks "
        "to be calibrated do not fit, their experts are read whenever they are computed.",
    )


class Recipe(Section):
    """One compression job, fully resolved."""

    schema_version: Literal[1] = Field(
        default=1, description="Version of this language; this release reads 1."
    )
    name: Slug = Field(description="Name of the result; by default the recipe file's name.")
    seed: Seed = Field(default=0, description="Seed of everything random in the run.")
    model: ModelSection
    weights: WeightsSection
    # These are left out of what is written where nothing was said: recipes from before they existed stay the
    # same bytes.
    context: ContextSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How far the result is to read; by default as far as its source.",
    )
    adapters: AdaptersSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="Training on long documents before anything is calibrated; by default none.",
    )
    kv_cache: KvCacheSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How the KV cache is stored; by default in 16 bit, and nothing is fitted or folded.",
    )
    drafts: DraftsSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="What proposes tokens ahead of the result, which verifies them; by default nothing.",
    )
    calibration: CalibrationSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="What calibrated solvers and schemes are shown; by default the shipped mixture.",
    )
    evaluate: Annotated[
        EvaluateSection | None,
        BeforeValidator(_false_is_none, json_schema_input_type=EvaluateSection | Literal[False] | None),
    ] = Field(
        default_factory=EvaluateSection,
        description="What is measured; `evaluate: null` measures nothing: the result has no quality figures.",
    )
    export: ExportSection = Field(default_factory=ExportSection)
    workspace: WorkspaceSection | None = Field(
        default=None, exclude_if=is_none, description="Bounds on disk and memory; by default none."
    )
