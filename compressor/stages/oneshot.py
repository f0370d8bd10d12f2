"""The weights stage of solver ``llmcompressor``: its ``oneshot`` chooses the values, all else is ours.

The library gets the whole model in 16 bit, the calibration tokens of the walk, and modifiers with a
quantization config made from the claims. What it leaves in the modules is packed by compressed-tensors as
each scheme says, checked, and laid down as the walk does (``stages/walked.py``); its own saving is not
used. Nothing is kept of a run that is interrupted inside the library: the stage starts again.

The only file that imports llmcompressor. Legend: O out_features, I in_features, N samples, T tokens of each.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.device import has_accelerator
from compressor.errors import UserError
from compressor.model.families import block_index
from compressor.model.quiet import quiet
from compressor.progress import Progress
from compressor.solvers.llmcompressor import QUANTIZERS, LlmCompressor
from compressor.stages.base import Claim
from compressor.stages.receipts import write_receipt
from compressor.stages.tokens import calibration_tokens, source_tokenizer
from compressor.stages.walked import REST_NAME, layer_name

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedModel

    from compressor.stages.oneshot_model import OneshotModel

_WHERE = "solver llmcompressor"
# Told again and again, and of no use to whoever runs this.
_KNOWN_WARNINGS = ("No accelerator available!", "Disabling tokenizer parallelism", "MoE is being linearized")
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "LLM_COMPRESSOR_LOG_LEVEL": "CRITICAL"}
_CHATTY = ("autoround", "torch.fx._symbolic_trace")
# AutoRound knows these by the names of presets only, not by a description.
_AUTOROUND_PRESETS = ("NVFP4", "MXFP4")


@dataclass(frozen=True)
class Worked:
    """What the library did.

    Attributes:
        dtype: in which the model computed.
        changed_16bit: the tensors that stay in 16 bit and are not the source's any more.
    """

    dtype: str
    changed_16bit: tuple[str, ...]


def oneshot_stage(
    source: Source,
    claims: Sequence[Claim],
    calibration: CalibrationSpec,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Makes the calibration tokens and runs the library; facts for the report: ``resumed``, ``calibration``.

    Raises:
        CheckpointError: as ``oneshot``, or the source has no tokenizer.
        UserError: as ``oneshot``, or a text cannot be read or is too short.
    """
    shown = calibration_tokens(source, calibration, folder, progress)
    worked = oneshot(source, claims, shown.ids_NT, calibration.seed, folder, progress)
    facts = {
        "texts": shown.counts,
        "samples": calibration.num_samples,
        "sequence_length": calibration.sequence_length,
        "seed": calibration.seed,
        "dtype": worked.dtype,
        "changed_16bit": list(worked.changed_16bit),
    }
    return {"resumed": False, "calibration": facts}


def check_oneshot(source: Source, claims: Sequence[Claim]) -> None:
    """Refuses, before hours are spent, what the library would fail at; imports it, reads headers only.

    Raises:
        CheckpointError: a claimed matrix is no linear layer of the model that transformers loads.
        UserError: an option is wrong, or a modifier does not run on this machine.
    """
    from compressor.stages.oneshot_model import OneshotModel

    solver = _solver(claims)
    if solver.uses("AWQModifier") and not has_accelerator():
        raise UserError(
            "AWQModifier of llm-compressor does not run without an accelerator (it pins memory for one)",
            where=_WHERE,
            fix="run this on a machine with a GPU, or use SmoothQuantModifier or one of this tool's solvers",
        )
    with _library(None):
        _modifiers(solver, {}, [])
    OneshotModel.on_meta(source, claims).check(experts=False)


def oneshot(
    source: Source,
    claims: Sequence[Claim],
    ids_NT: torch.Tensor,
    seed: int,
    folder: Path,
    progress: Progress,
) -> Worked:
    """Writes a file and a receipt for every block, and one for what lies outside.

    Args:
        source: the checkpoint.
        claims: of all its tensors; the quantized ones have one and the same ``LlmCompressor``.
        ids_NT: int64, one full calibration sequence a row.
        seed: of random rotations.
        folder: of the stage.
        progress: told of what the library logs.

    Raises:
        CheckpointError: a claimed matrix has no place in the model, or came out in another layout, with
            scales that no model has, or no nearer to what was to be rounded than zeros.
        UserError: the library failed.
    """
    import torch

    from compressor.stages.oneshot_model import OneshotModel

    solver = _solver(claims)
    total = sum(claim.tensor.nbytes for claim in claims if claim.scheme is not None)
    progress.start("oneshot", total, "work")
    progress.log(
        "llm-compressor works on the whole model at once: an interrupted run starts this stage again"
    )
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OneshotModel.loaded(source, claims)
        with _library(progress):
            model.split_experts(_linearize)
            model.check(experts=True)
            before = _run(source, model, solver, ids_NT, folder)
        tokens = ids_NT.numel()
        model.check_offline()
        if solver.transforms:
            model.check_rebuilt()
        changed: list[str] = []
        for name, members in _by_file(claims).items():
            changed += _store(model, members, before, tokens, solver.transforms, folder / name, progress)
    progress.finish()
    return Worked(str(model.dtype).removeprefix("torch."), tuple(changed))


def _solver(claims: Sequence[Claim]) -> LlmCompressor:
    found = {claim.solver.model_dump_json(): claim.solver for claim in claims if claim.solver is not None}
    assert len(found) == 1, "the plan gives all claims of this stage one solver"
    [solver] = found.values()
    assert isinstance(solver, LlmCompressor)
    return solver


def _by_file(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """The claims by the file that they go to: one for each block, and one for what lies in none."""
    files: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        index = block_index(claim.tensor.name)
        files[REST_NAME if index is None else layer_name(index)].append(claim)
    return files


def _linearize(model: PreTrainedModel) -> None:
    """Replaces fused experts by linear layers."""
    from llmcompressor.modeling.moe.linearize import linearize_moe

    # For Llama 4's it reads the text part of the whole model's config, which the text model's lacks (0.14).
    with patch.object(model.config, "text_config", model.config.get_text_config(), create=True):
        linearize_moe(model)


def _run(
    source: Source, model: OneshotModel, solver: LlmCompressor, ids_NT: torch.Tensor, folder: Path
) -> dict[str, torch.Tensor] | None:
    """Runs the library; module -> weight as it was before rounding, or None where that is the source's."""
    from llmcompressor import oneshot as run
    from llmcompressor.core import reset_session
    from torch.utils.data import DataLoader

    schemes = model.schemes()
    kept: dict[str, torch.Tensor] = {}
    recipe = _modifiers(solver, schemes, [path for scheme in schemes.values() for path in scheme.targets])
    if solver.transforms and solver.overwrites:
        recipe.insert(-1, _keeper(model, kept))
    samples = [
        {"input_ids": row_T[None], "attention_mask": row_T.new_ones(1, len(row_T))} for row_T in ids_NT
    ]
    with TemporaryDirectory(prefix="oneshot.tmp-", dir=folder) as place:
        # It reads the config of whatever the model calls its origin; that must not be looked for on the Hub.
        model.model.config.save_pretrained(place)
        model.model.config._name_or_path = place
        model.model.name_or_path = place
        try:
            run(
                model=model.model,
                processor=source_tokenizer(source, folder),
                recipe=recipe,
                dataset=DataLoader(samples, batch_size=None),  # type: ignore[arg-type]
                num_calibration_samples=len(ids_NT),
                max_seq_length=ids_NT.shape[1],
                shuffle_calibration_samples=False,
            )
        except Exception as error:  # the library raises anything
            raise _failed(error) from error
        finally:
            reset_session()
    if solver.overwrites:
        return kept if solver.transforms else None
    return {path: model.weight(path) for scheme in schemes.values() for path in scheme.targets}


def _failed(error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    fix = "other modifiers, options or one of this tool's solvers may do"
    if "resolving mappings" in reason:
        fix = "give the modifier `mappings` that fit the model's layers, leave it out, or use solver smooth"
    return UserError(f"llm-compressor failed: {type(error).__name__}: {reason}", where=_WHERE, fix=fix)


def _modifiers(
    solver: LlmCompressor, schemes: Mapping[str, QuantizationScheme], targets: Sequence[str]
) -> list[Any]:
    """The library's modifiers, the quantizing one with the claims' schemes.

    Raises:
        UserError: an option is unknown to the modifier, or its value is wrong.
    """
    from llmcompressor.modifiers.factory import ModifierFactory

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    found = []
    for name, options in solver.named:
        config: dict[str, Any] = {}
        if name in QUANTIZERS and schemes:
            config = {"config_groups": dict(schemes)}
            preset = next(iter(schemes)) if len(schemes) == 1 else ""
            if name == "AutoRoundModifier" and preset in _AUTOROUND_PRESETS:
                config = {"scheme": preset, "targets": list(targets)}
        try:
            found.append(ModifierFactory.create(name, False, False, **options, **config))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(_refusal(name, error), where=_WHERE, fix="correct its options") from error
    return found


def _refusal(name: str, error: Exception) -> str:
    """pydantic's findings in one line, or the error's first."""
    details = getattr(error, "errors", None)
    if details is None:
        return f"{name}: {str(error).splitlines()[0]}"
    return "; ".join(
        f"{name}: {'.'.join(map(str, found['loc'])) or 'options'}: {found['msg']}" for found in details()
    )


def _keeper(model: OneshotModel, kept: dict[str, torch.Tensor]) -> Any:
    """A modifier that changes nothing, and copies the weights when its turn comes."""
    from llmcompressor.modifiers import Modifier

    class KeepModifier(Modifier):  # type: ignore[misc]  # untyped
        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            return True

        def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
            kept.update({path: model.weight(path).clone() for path in model.targets()})

    return KeepModifier()


def _store(
    model: OneshotModel,
    claims: Sequence[Claim],
    before: Mapping[str, torch.Tensor] | None,
    tokens: int,
    transformed: bool,
    path: Path,
    progress: Progress,
) -> list[str]:
    """Writes a file of what the claims quantize, and of what transforms changed and stays in 16 bit.

    Returns the names of the latter.
    """
    quantized = [claim for claim in claims if claim.scheme is not None]
    changed: dict[str, torch.Tensor] = {}
    for claim in claims if transformed else ():
        value = None if claim.scheme is not None else model.changed(claim)
        if value is not None:
            changed[claim.tensor.name] = value
    headers = [model.header(claim) for claim in claims if claim.tensor.name in changed]
    headers += [output for claim in quantized for output in model.outputs(claim)]
    if not headers:
        return []
    errors = []
    with ShardWriter(path, headers) as writer:
        for name, tensor in changed.items():
            writer.write(name, tensor)
        for claim in quantized:
            for part, tensors, error in model.packed(claim, before, tokens):
                for local, tensor in tensors.items():
                    writer.write(f"{part.module}.{local}", tensor)
                errors.append(error)
            progress.advance(claim.tensor.nbytes, note=path.name)
    write_receipt(path.parent, path.name, errors)
    return list(changed)


@contextmanager
def _library(progress: Progress | None) -> Iterator[None]:
    """Within it what the library prints and logs goes to ``progress``, and never to stdout.

    It takes over loguru when it is imported, and would log to stdout from then on.
    """
    from loguru import logger

    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    with (
        redirect_stdout(sys.stderr),
        patch.dict(os.environ, _ENVIRONMENT),
        quiet(),
    ):
        import llmcompressor  # noqa: F401  # takes over loguru

        logger.remove()
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        sink = None if progress is None else logger.add(_sink(progress), level="INFO", format="{message}")
        try:
            yield
        finally:
            if sink is not None:
                logger.remove(sink)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _sink(progress: Progress) -> Callable[[Any], None]:
    """Warnings are told once, what else the library logs is the note of the present work."""
    told: set[str] = set()

    def heard(message: Any) -> None:
        record = message.record
        text = record["message"].splitlines()[0] if record["message"] else ""
        if record["level"].name == "INFO":
            progress.advance(0, note=text)
        elif record["level"].name in ("WARNING", "ERROR", "CRITICAL") and text not in told:
            told.add(text)
            if not text.startswith(_KNOWN_WARNINGS):
                progress.warn(f"llm-compressor: {text}")

    return heard
