"""What a recipe may say: frozen pydantic models. Field descriptions are the reference that editors show.

``extends``, ``${VAR}`` and ``--set`` are gone by the time a ``Recipe`` exists (``compressor.recipe.load``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from compressor.dialects.base import DialectName
from compressor.recipe.adapters import AdaptersSection
from compressor.recipe.budget import AUTO, DEFAULT_CANDIDATES, WeightBudgetSection
from compressor.recipe.calibration import CalibrationSection
from compressor.recipe.context import ContextSection
from compressor.recipe.drafts import DraftsSection
from compressor.recipe.evaluate import EvaluateSection
from compressor.recipe.fields import (
    Bytes,
    Factory,
    Pattern,
    Patterns,
    Revision,
    SchemeOrAuto,
    SchemeOrCopy,
    Seed,
    Sha256,
    Slug,
    SolverOrNone,
    Text,
)
from compressor.recipe.kv_cache import KvCacheSection
from compressor.recipe.polish import PolishSection
from compressor.recipe.section import Section, blamed, is_none
from compressor.recipe.serve import ServeSection
from compressor.schemes import parse_scheme
from compressor.schemes.base import Scheme
from compressor.solvers import SolverField, parse_solver

# Keys that the language reserves and that no stage serves yet: path in the recipe -> how faults name it.
RESERVED: dict[tuple[str, ...], str] = {
    ("publish",): "section 'publish'",
}


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

    scheme: SchemeOrAuto = Field(
        description="The scheme of every linear weight that no rule or ignore claims, or `auto`: chosen "
        "among `candidates` under `budget`, one for all matrices that the engine fuses."
    )
    budget: WeightBudgetSection | None = Field(
        default=None, exclude_if=is_none, description="For auto: what the weights may take, or may lose."
    )
    candidates: tuple[SchemeOrCopy, ...] = Field(
        default=(),
        exclude_if=lambda candidates: not candidates,
        description="For auto: schemes to choose among, and `copy` for 16 bit; by default nvfp4a16, "
        "fp8_dynamic, int8 and copy.",
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

    @model_validator(mode="after")
    def _budget_goes_with_auto(self) -> WeightsSection:
        if self.scheme == AUTO and self.budget is None:
            raise blamed(("scheme",), "auto needs a budget beside it, such as {bits_per_target_weight: 4.75}")
        for name in ("budget", "candidates"):
            if self.scheme != AUTO and getattr(self, name):
                raise blamed((name,), f"{name} goes with `scheme: auto` only")
        if len(self.candidates) == 1:
            raise blamed(("candidates",), "one candidate leaves nothing to choose; name its scheme instead")
        for index, candidate in enumerate(self.candidates):
            if candidate in self.candidates[:index]:
                raise blamed(("candidates", index), "the same candidate is listed twice")
        return self

    def without_budget(self) -> WeightsSection:
        """The section for a model that the budget is not for: the first candidate instead of ``auto``."""
        if self.budget is None:
            return self
        first = next((scheme for scheme in self.auto_candidates if not isinstance(scheme, str)), None)
        if first is None:
            return self
        return self.model_copy(update={"scheme": first, "budget": None, "candidates": ()})

    @property
    def auto_candidates(self) -> tuple[Scheme | Literal["copy"], ...]:
        """What ``auto`` chooses among."""
        if self.candidates:
            return self.candidates
        return tuple("copy" if name == "copy" else parse_scheme(name) for name in DEFAULT_CANDIDATES)


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
    serve: ServeSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="On what and for whom it is to be served, which plan and report compute memory, users, "
        "speed and cost for; by default one user on one common GPU.",
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
