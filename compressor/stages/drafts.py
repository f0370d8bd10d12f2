"""After the result is put together: what proposes tokens for it, trained against it as it will be served."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.dialects.base import Dialect
from compressor.errors import CheckpointError, UserError
from compressor.progress import Progress
from compressor.stages.assemble import link_or_copy
from compressor.stages.base import Claim
from compressor.stages.drafts_open import open_target
from compressor.stages.drafts_spec import DRAFT_FOLDER, DraftSpec
from compressor.stages.tokens import source_tokenizer
from compressor.workspace import STAGE_FILE, Workspace, file_sha256, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.drafts.base import Head
    from compressor.stages.drafts_rows import RowSets
    from compressor.stages.drafts_train import HeadTrainer, Measured

_WORK = "work"
_CONFIG = "config.json"
_DIGITS = 5


def drafts_stage(
    source: Source,
    checkpoint: Path,
    claims: Sequence[Claim],
    dialect: Dialect,
    spec: DraftSpec,
    folder: Path,
    progress: Progress,
    model: Path | None = None,
) -> dict[str, Any]:
    """Fills ``folder`` with the checkpoint, and with the draft: in ``draft/``, or in the weights.

    Args:
        source: what the checkpoint was made of.
        checkpoint: folder of the finished stage ``assemble``.
        claims: of the source's tensors.
        dialect: how the checkpoint spells them.
        spec: what is asked for.
        folder: see above; keeps the state while a head is trained.
        progress: told of everything.
        model: the finished folder of a draft model.

    Returns:
        ``resumed``; ``drafts``: ``kind``, ``tokens``, ``bytes`` (of the draft's weights), ``replaced`` (files
        of weights that are others than the checkpoint's: name -> sha256), and of a head that was trained or
        measured ``training`` (see ``_trained``).

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or the head not be made or written.
        UserError: a text cannot be read or is too short; nothing usable is written; the loss is not finite;
            the disk is full.
    """
    from compressor.model.load import load_tokenizer

    facts: dict[str, Any] = {"kind": spec.kind, "tokens": spec.tokens}
    resumed = False
    if model is not None:
        _copied(checkpoint, folder)
        _copied(model, folder / DRAFT_FOLDER)
    else:
        target, _ = open_target(checkpoint, source, spec.train)
        tokenizer = load_tokenizer(checkpoint)
        head, facts["training"], resumed = _trained(
            source, target, tokenizer, claims, dialect, spec, folder / _WORK, progress
        )
        _copied(checkpoint, folder)
        if spec.kind == "eagle3" or facts["training"]["steps"]:
            head.write(folder, spec.tokens)
    facts["replaced"] = _replaced(checkpoint, folder)
    facts["bytes"] = sum(path.stat().st_size for path in (folder / DRAFT_FOLDER).glob("*.safetensors"))
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    return {"resumed": resumed, "drafts": facts}


def check_drafts(source: Source, spec: DraftSpec, model: Source | None, space: Workspace) -> None:
    """Finds before the weights are compressed what would be found after hours.

    Args:
        source: what is compressed.
        spec: what is asked for.
        model: of a draft model.
        space: keeps tokenizers for as long as this takes.

    Raises:
        CheckpointError: a tokenizer is missing, or the draft model's tokens are not the source's.
        UserError: the texts hold fewer prompts than decoding is to be measured on.
    """
    from compressor.drafts.draft_model import check_vocabulary
    from compressor.evals.decode_texts import prompts_of
    from compressor.evals.run import leading_token
    from compressor.model.families import text_config

    if model is None and spec.measure is None:
        return
    tokenizer = source_tokenizer(source, space.partials)
    if model is not None:
        words = [int(text_config(told.config)["vocab_size"]) for told in (source, model)]
        draft = source_tokenizer(model, space.partials)
        try:
            check_vocabulary(tokenizer, draft, words[0], words[1])
        except CheckpointError as error:
            raise CheckpointError(error.what, where="drafts.model", fix=error.fix) from error
    if spec.measure is None:
        return
    asked, first = spec.measure, leading_token(tokenizer)
    for name, path in asked.domains.items():
        try:
            prompts_of(tokenizer, path, asked.prompts, asked.prompt_tokens, first=first)
        except UserError as error:
            raise UserError(f"{name}: {error.what}", where="drafts.measure", fix=error.fix) from error


def name_verifier(folder: Path, verifier: str) -> None:
    """Writes into a speculator's config which model it belongs to; other drafts have no such entry.

    Args:
        folder: a result.
        verifier: path of that folder, as it is typed.
    """
    path = folder / DRAFT_FOLDER / _CONFIG
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if "speculators_config" in config:
        config["speculators_config"]["verifier"]["name_or_path"] = verifier
        write_json(path, config)


def _trained(
    source: Source,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    claims: Sequence[Claim],
    dialect: Dialect,
    spec: DraftSpec,
    work: Path,
    progress: Progress,
) -> tuple[Head, dict[str, Any], bool]:
    """The trained head; how it went; whether an earlier run had begun.

    Facts: ``rows``, ``held_out_rows``, ``looping`` (rows left out), ``written`` (tokens),
    ``sequence_length``, ``parameters`` (trained ones), ``kept_rows`` (whose hidden states were on the
    disk), ``steps``, ``best_step``, ``before``, ``after`` (``Measured``), ``by_dataset`` (name ->
    ``Measured`` of held-out rows), ``curves``, ``seconds``.
    """
    from compressor.stages import drafts_heads
    from compressor.stages.drafts_hidden import TargetStates
    from compressor.stages.drafts_rows import row_sets
    from compressor.stages.drafts_train import HeadTrainer
    from compressor.stages.tokens import calibration_tokens

    assert spec.rows is not None
    assert spec.train is not None
    work.mkdir(exist_ok=True)
    began = any(work.iterdir())
    texts = calibration_tokens(source, spec.rows.calibration, work, progress)
    ends = _ends(target, tokenizer)
    rows = row_sets(texts.ids_NT, spec.rows, target, ends, work, progress)
    head = drafts_heads.make_head(spec, source, target, rows.trained, ends, claims, dialect)
    shown = TargetStates(target, head.layers, rows.trained, work, spec.train.cache_bytes)
    held_out = TargetStates(target, head.layers, rows.held_out, work)
    trainer = HeadTrainer(head, spec.train, shown, held_out, work, progress)
    done = trainer.run()
    facts = {
        "rows": len(rows.trained),
        "held_out_rows": len(rows.held_out),
        "looping": rows.looping,
        "written": rows.written,
        "sequence_length": spec.rows.length,
        "parameters": sum(parameter.numel() for parameter in head.trained.values()),
        "kept_rows": shown.kept,
        "steps": done.steps,
        "best_step": done.best_step,
        "before": _told(done.before),
        "after": _told(done.after),
        "by_dataset": _by_dataset(trainer, rows, spec),
        "curves": {name: [round(value, _DIGITS) for value in curve] for name, curve in done.curves.items()},
        "seconds": round(done.seconds, 1),
    }
    return head, facts, began


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a text, as the model's generation config and its tokenizer have them."""
    told = getattr(model.generation_config, "eos_token_id", None)
    found = {*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return tuple(sorted(end for end in found if type(end) is int and 0 <= end < vocabulary))


def _by_dataset(trainer: HeadTrainer, rows: RowSets, spec: DraftSpec) -> dict[str, Any]:
    """Held-out rows of each dataset apart: texts of one kind are foretold better than those of another."""
    import torch

    assert spec.rows is not None
    found = {}
    for number, dataset in enumerate(spec.rows.calibration.datasets):
        numbers_N = torch.nonzero(rows.held_out.datasets_N == number)[:, 0]
        if len(numbers_N):
            found[dataset.name] = _told(trainer.measure(numbers_N))
    return found


def _told(measured: Measured) -> dict[str, Any]:
    return asdict(measured) | {"length": measured.length}


def _copied(checkpoint: Path, folder: Path) -> None:
    """Links or copies the files of a finished folder into another."""
    folder.mkdir(exist_ok=True)
    for path in sorted(checkpoint.iterdir()):
        if path.is_dir():
            _copied(path, folder / path.name)
        elif path.name != STAGE_FILE:
            link_or_copy(path, folder / path.name)


def _replaced(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Name -> sha256 of weights that are not the very files of the checkpoint."""
    return {
        path.name: file_sha256(path)
        for path in sorted(folder.glob("*.safetensors"))
        if not os.path.samefile(path, checkpoint / path.name)
    }
