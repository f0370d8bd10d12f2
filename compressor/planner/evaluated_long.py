"""What a plan says of ``evaluate.long``: its documents, what each model reads, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import data
from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError, PlanError, UserError
from compressor.evals.long_spec import LongNeedles, LongRuler, LongSpec, missing_packages
from compressor.evals.long_text import Sliding
from compressor.evals.text import read_documents
from compressor.planner.faults import collect
from compressor.planner.kv_bytes import full_context
from compressor.planner.sizes import FLOPS, Device, pass_flops, planned_device
from compressor.recipe.evaluate_long import LongSection
from compressor.report.words import counted, duration
from compressor.rope.positions import read_positions
from compressor.stages.base import Claim

if TYPE_CHECKING:
    from compressor.evals.base import EvalSpec

_WHERE = "evaluate.long"
_LONG_S = 3600.0


@dataclass(frozen=True)
class LongCost:
    """What measuring at long context takes.

    Attributes:
        spec: what is measured.
        device: where.
        time_s: seconds, an estimate of the operations alone; loading is not in it.
    """

    spec: LongSpec
    device: Device
    time_s: float

    def described(self) -> tuple[str, ...]:
        """Lines for people."""
        spec = self.spec
        lines = [
            f"{counted(spec.count, 'document')} of {spec.tokens:,} tokens of {spec.documents_label}, by "
            f"source, result and the source in a window of {spec.trained:,} tokens that slides by "
            f"{spec.stride:,}"
        ]
        if spec.needles:
            asked = spec.needles
            texts = counted(len(asked.lengths) * len(asked.depths) * asked.trials, "text")
            kinds = " and as many with a ".join(asked.kinds)
            lines.append(f"{texts} with a {kinds}, at {_all(asked.lengths)}")
        if spec.ruler:
            tasks = ", ".join(spec.ruler.tasks)
            lines.append(
                f"RULER: {counted(spec.ruler.limit, 'sample')} of {tasks} at {_all(spec.ruler.lengths)}"
            )
        where = "on the GPU" if self.device == "cuda" else "on two cores, far less on a GPU"
        return (*lines, f"about {duration(self.time_s)} {where} (an estimate)")

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for ``compress plan --json``."""
        described = asdict(self.spec) | {"documents": str(self.spec.documents)}
        return described | {"device": self.device, "time_s": self.time_s}


def long_spec(
    section: LongSection,
    config: dict[str, Any],
    longest: int | None,
    *,
    beside: Path,
    target: int | None = None,
    trained: int | None = None,
    seed: int = 0,
) -> LongSpec:
    """The section with its documents found and checked.

    Args:
        section: a recipe's ``evaluate.long``.
        config: of the source as it was given.
        longest: tokens that the result reads, if it is known.
        beside: the recipe's folder.
        target: tokens that the result was asked to read, or None.
        trained: tokens that the source was trained at, or None for what ``config`` says.
        seed: of numbers, samples and intervals.

    Raises:
        PlanError: unusable documents, or lengths that the result does not read.
    """
    faults: list[UserError] = []
    trained = trained or _trained(config)
    tokens = section.tokens or target or longest
    if trained is None or tokens is None:
        what = "how many tokens the model reads is not known from its config.json"
        raise UserError(what, where=f"{_WHERE}.tokens", fix="say it, and context.original_length")
    needles, ruler = section.needles, section.ruler
    asked: dict[str, tuple[int, ...]] = {"tokens": (tokens,)}
    asked["needles.lengths"] = needles.lengths if needles else ()
    asked["ruler.lengths"] = ruler.lengths if ruler else ()
    for key, lengths in asked.items():
        if longest is not None and max(lengths, default=0) > longest:
            what = f"{max(lengths):,} tokens are more than the {longest:,} that the result reads"
            fix = "lower it, or set context.target_length"
            faults.append(UserError(what, where=f"{_WHERE}.{key}", fix=fix))
    stride = section.stride or max(1, trained // 8)
    try:
        Sliding(trained, stride).check()
    except UserError as error:
        faults.append(UserError(error.what, where=f"{_WHERE}.stride", fix=error.fix))
    for index, task in enumerate(ruler.tasks if ruler else ()):
        if missing := missing_packages(task):
            what = f"{task} needs the package {', '.join(missing)}, which is not installed"
            faults.append(UserError(what, where=f"{_WHERE}.ruler.tasks.{index}", fix="install it"))
    path = collect(faults, lambda: _documents(section, beside, tokens))
    if path is None or faults:
        raise PlanError(faults)
    return LongSpec(
        documents=path,
        documents_label=section.documents,
        count=section.count,
        tokens=tokens,
        trained=trained,
        stride=stride,
        needles=None
        if needles is None
        else LongNeedles(needles.kinds, needles.lengths or (tokens,), needles.depths, needles.trials),
        ruler=None if ruler is None else LongRuler(ruler.tasks, ruler.lengths or (tokens,), ruler.limit),
        seed=seed,
        documents_are_shipped=path.is_relative_to(data.shipped_root() / "calibration"),
    )


def long_cost(
    evaluation: EvalSpec | None, claims: Sequence[Claim], config: dict[str, Any]
) -> LongCost | None:
    """What it takes, of a model with these tensors; None where nothing long is measured."""
    if evaluation is None or evaluation.long is None:
        return None
    spec = evaluation.long

    def one(tokens: int) -> float:
        return pass_flops(claims, config, tokens)

    windows = Sliding(spec.trained, spec.stride).forward_tokens(spec.tokens) / spec.trained
    total = spec.count * (2 * one(spec.tokens) + windows * one(spec.trained))
    if spec.needles is not None:
        each = 2 * len(spec.needles.kinds) * len(spec.needles.depths) * spec.needles.trials
        total += each * sum(map(one, spec.needles.lengths))
    if spec.ruler is not None:
        total += 2 * len(spec.ruler.tasks) * spec.ruler.limit * sum(map(one, spec.ruler.lengths))
    device = planned_device()
    return LongCost(spec, device, total / FLOPS[device])


def long_warnings(evaluation: EvalSpec | None, claims: Sequence[Claim], source: Source) -> list[str]:
    """Whether it takes hours: a run shows no plan."""
    cost = long_cost(evaluation, claims, source.config)
    if cost is None or cost.device == "cuda" or cost.time_s < _LONG_S:
        return []
    return [
        f"{_WHERE} takes about {duration(cost.time_s)} on this machine, which has no GPU; fewer tokens, "
        "documents (`count`), trials or samples take less"
    ]


def _all(lengths: Sequence[int]) -> str:
    return f"{', '.join(f'{length:,}' for length in lengths)} tokens"


def _trained(config: dict[str, Any]) -> int | None:
    """Tokens that the source was trained at, before any scaling that its config has."""
    try:
        positions = read_positions(config)
    except CheckpointError:
        return full_context(config)
    return positions.original_length or positions.length


def _documents(section: LongSection, beside: Path, tokens: int) -> Path:
    """The file, with enough documents that may be long enough: a token has a byte at least.

    Raises:
        UserError: it has not.
    """
    where = f"{_WHERE}.documents"
    try:
        path = data.find(section.documents, beside=beside, what="file of long documents")
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from error
    if not path.is_file():
        raise UserError("is not a file", where=where, fix="name a file of long documents")
    sizes = [len(text.encode(errors="replace")) for _, text in read_documents(path)]
    enough = sum(size >= tokens for size in sizes)
    if enough < section.count:
        raise UserError(
            f"{section.documents} has {counted(enough, 'document')} with the bytes of {tokens:,} tokens (of "
            f"{len(sizes):,} in all); {section.count} are asked for",
            where=where,
            fix="lower evaluate.long.count or evaluate.long.tokens, or name longer documents",
        )
    return path
