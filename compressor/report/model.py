"""The report of one run: what was gained, what was lost, what it cost. ``report.json`` is its only storage.

Terminal, page and card are views of a ``Report``, so each can be made again from the file alone. Fields are
required: a number that was not measured is an explicit ``null``, never an absence.
"""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from compressor.dialects.base import DialectName
from compressor.errors import CheckpointError
from compressor.report.adapters import AdapterFacts
from compressor.report.budget import BudgetFacts
from compressor.report.calibration import CalibrationFacts
from compressor.report.compounding import CompoundingFacts
from compressor.report.context import ContextFacts
from compressor.report.drafts import DraftFacts
from compressor.report.kv import KvFacts
from compressor.report.long import LongFacts
from compressor.report.measured import Evaluated, Gate
from compressor.report.parts import LayerMatrix, PartBytes
from compressor.report.record import Count, Measure, Ordered, Record
from compressor.report.verification import Verification

REPORT_FILE = "report.json"
SCHEMA_VERSION: Final = 1
_MAX_BYTES = 64 << 20
_SHOWN_FAULTS = 5


class SourceFacts(Record):
    """The checkpoint that was compressed.

    Attributes:
        label: path, Hub id@revision or file, as plan and card name it.
        kind: ``safetensors``, ``gguf`` or ``headers``.
        note: what a reader of any table must know about it ("dequantized from GGUF Q4_1"), or "".
        revision: Hub commit, or None.
        base_model: Hub id (``org/name``) of the model that was compressed, where known; the card links it.
        license: Hub licence identifier ("apache-2.0") that the source states, or None.
        bytes: tensor bytes in safetensors, after dequantization to 16 bit.
        parameters: weights of the model, tied tensors counted once.
    """

    label: str
    kind: Literal["safetensors", "gguf", "headers", "dequantized"]
    note: str
    revision: str | None
    base_model: str | None
    license: str | None
    bytes: Count
    parameters: Annotated[int, Field(gt=0)]


class SchemeBytes(Record):
    """The tensors stored in one scheme.

    Attributes:
        tensors: source tensors quantized so.
        parameters: their weights.
        source_bytes: their bytes in the source, after dequantization to 16 bit.
        bytes: their bytes in the result: codes, scales, zero points, shapes.
        scale_bytes: the part of ``bytes`` that is not codes.
    """

    tensors: Count
    parameters: Count
    source_bytes: Count
    bytes: Count
    scale_bytes: Count


class Kept(Record):
    """Tensors left in 16 bit for one reason (a sentence of the plan); ``bytes`` in the result."""

    reason: str
    tensors: Count
    bytes: Count


class ResultFacts(Record):
    """The compressed checkpoint.

    Attributes:
        format: the dialect that it is written in (``export.format``).
        bytes: tensor bytes in safetensors.
        bits_per_weight: 8 * ``bytes`` / source parameters (tied once).
        bits_per_target_weight: the same over the tensors that the rules target, scales included.
        target_parameters: weights of those tensors.
        schemes: scheme label -> what is stored so.
        left_16bit: what is not, by reason.
        parts: all of it, by what it is for.
    """

    format: DialectName = "compressed-tensors"
    bytes: Count
    bits_per_weight: Measure
    bits_per_target_weight: Measure
    target_parameters: Count
    schemes: Ordered[SchemeBytes]
    left_16bit: tuple[Kept, ...]
    parts: tuple[PartBytes, ...] = ()


class TensorError(Record):
    """Relative squared error, sum((decoded - w)^2) / sum(w^2), of one weight matrix."""

    name: str
    relative_error: Measure


class SchemeError(Record):
    """Relative squared error of all matrices of one scheme.

    Attributes:
        mean: squared errors of all matrices over their squared norms: the mean weighted by energy.
        worst: the matrices with the largest errors, largest first, five at most.
    """

    mean: Measure
    worst: Annotated[tuple[TensorError, ...], Field(max_length=5)]


class WeightFacts(Record):
    """What quantization did to the weights.

    Attributes:
        relative_error: scheme label -> errors.
        layers: how every matrix of every layer is stored, and its errors.
    """

    relative_error: Ordered[SchemeError]
    layers: tuple[LayerMatrix, ...] = ()


class Perplexity(Record):
    """Perplexity of source and result on the same tokens.

    Attributes:
        source: exp of the mean negative log-likelihood in nats.
        result: the same, of the result as reloaded from disk.
        increase: result / source - 1.
        increase_ci95: 95% confidence interval of ``increase``, low and high, or None.
    """

    source: Measure
    result: Measure
    increase: Measure
    increase_ci95: tuple[Measure, Measure] | None


class Divergence(Record):
    """KL(source || result) of the next-token distributions, nats per token: mean and 99.9th percentile."""

    mean: Measure
    p999: Measure


class Quality(Evaluated):
    """What was lost, measured on held-out text and tasks.

    Attributes:
        perplexity: of both models.
        kl: of the result's predictions from the source's.
        top1_agreement: fraction of positions where both predict the same token.
        tokens: tokens of the text that both models read.
        context: tokens of one window.
        text: label of the text.
        command: the exact command that measures the same again.
        text_dtype: what the models computed in on the text.
        task_dtype: the same on the tasks.
        loaded_via: ``transformers`` where its loader read the result, ``decoded`` where its weights were
            decoded here and given to it.
        activations_simulated: whether activations were quantized as the scheme says; None where it leaves
            them alone.
    """

    perplexity: Perplexity
    kl: Divergence
    top1_agreement: Measure
    tokens: Count
    context: Count
    text: str
    command: str
    text_dtype: str
    task_dtype: str
    loaded_via: Literal["transformers", "decoded", "factory"]
    activations_simulated: bool | None


class StageCost(Record):
    """What one stage cost.

    Attributes:
        name: the stage.
        wall_s: seconds of this run.
        peak_rss_bytes: resident memory at its highest.
        peak_device_bytes: accelerator memory at its highest; 0 without one.
        resumed: the workspace already held all of its result.
    """

    name: str
    wall_s: Measure
    peak_rss_bytes: Count
    peak_device_bytes: Count
    resumed: bool


class Device(Record):
    """The machine that did the work: accelerator or CPU name, CPU cores, RAM in bytes."""

    name: str
    cores: Count
    memory_bytes: Count


class Serve(Record):
    """How to serve the result: the exact command, the model name that requests use, what to know."""

    command: str
    model: str
    notes: tuple[str, ...]


class Report(Record):
    """One run, as ``report.json`` holds it.

    Attributes:
        schema_version: of this layout.
        name: of the result.
        created: UTC, ``YYYY-MM-DDTHH:MM:SSZ``.
        source: what was compressed.
        result: what came out.
        weights: errors of the weights.
        quality: what was lost, or None where evaluation was skipped.
        gates: the recipe's limits.
        stages: cost of each stage, in running order.
        versions: package -> version.
        device: what it ran on.
        serve: how to serve the result.
        files: name -> bytes of the output folder's files, without those that describe the run.
        verification: what ``compress verify`` found, or None until it has run.
        calibration: what solvers were shown, and what it did for each matrix, or None where none was.
        kv: how the KV cache is stored, or None where the recipe does not say.
        context: how positions are scaled, or None where they are the source's.
        long: what was measured at long context, or None.
        adapters: what was trained on long documents, or None.
        drafts: what proposes tokens for the result, or None.
        compounding: what it is worth to who serves it, or None where that cannot be computed.
        budget: how schemes were chosen under a budget, or None where rules say them.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    source: SourceFacts
    result: ResultFacts
    weights: WeightFacts
    quality: Quality | None
    gates: tuple[Gate, ...]
    stages: tuple[StageCost, ...]
    versions: dict[str, str]
    device: Device
    serve: Serve
    files: dict[str, Count]
    verification: Verification | None = None
    calibration: CalibrationFacts | None = None
    kv: KvFacts | None = None
    context: ContextFacts | None = None
    long: LongFacts | None = None
    adapters: AdapterFacts | None = None
    drafts: DraftFacts | None = None
    compounding: CompoundingFacts | None = None
    budget: BudgetFacts | None = None

    def to_json(self) -> str:
        """Indented JSON; infinities and NaN as the words ``Infinity``, ``-Infinity`` and ``NaN``."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = REPORT_FILE) -> Report:
        """The report that ``to_json`` wrote.

        Raises:
            CheckpointError: not JSON, of another version, or not exactly this layout.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise CheckpointError(
                _explain(error), where=where, fix="make it again with this version"
            ) from None


def load_report(folder: Path) -> Report:
    """The report in an output folder.

    Raises:
        CheckpointError: there is none, it is no ordinary file of sane size, or it does not parse.
    """
    path = folder / REPORT_FILE
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX_BYTES:
            raise CheckpointError("not an ordinary file of less than 64 MB", where=str(path))
        return Report.from_json(path.read_bytes(), where=str(path))
    except OSError as error:
        raise CheckpointError(
            f"no report can be read: {error.strerror}",
            where=str(path),
            fix="name the output folder of a finished run",
        ) from error


def utc_now() -> str:
    """The present second as ``Report.created`` holds it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _explain(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    for fault in faults:
        if fault["loc"] == ("schema_version",):
            return f"written by another version of this program (this one reads layout {SCHEMA_VERSION})"
    lines = [
        f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in faults[:_SHOWN_FAULTS]
    ]
    more = len(faults) - len(lines)
    return "not a report: " + "; ".join(lines) + (f"; and {more} more" if more else "")
