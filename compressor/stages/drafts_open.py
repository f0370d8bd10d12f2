"""A compressed model and what proposes tokens for it, opened as they lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.drafts.base import Drafter
from compressor.drafts.spec import Kind
from compressor.errors import CheckpointError
from compressor.stages.drafts_spec import TrainSpec
from compressor.stages.evaluate import reload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NATIVE = "native"
_CONFIG = "config.json"


def open_target(checkpoint: Path, source: Source, train: TrainSpec | None) -> tuple[PreTrainedModel, bool]:
    """The compressed model as it computes, and whether it rounds inputs.

    It is frozen, on its device, in the dtype that heads are trained in.

    Args:
        checkpoint: its folder.
        source: what it was made of.
        train: how a head is trained for it, if one is.
    """
    import torch
    from accelerate import PartialState

    from compressor.device import fast_dtype
    from compressor.model.load import set_dtype

    # Of several processes, each has its own accelerator.
    device = PartialState().device
    usual = fast_dtype(device) if device.type == "cuda" else torch.float32
    loaded = reload(checkpoint, source)
    model = loaded.model
    set_dtype(model, usual if train is None else getattr(torch, train.dtype)).requires_grad_(False)
    placed: PreTrainedModel = model.to(device)
    return placed.eval(), loaded.activations_simulated is True


def kind_of(draft: str) -> Kind:
    """``native``, or what a folder holds: a speculator, or a whole model.

    Raises:
        CheckpointError: there is no config.json, or one of a speculator that is not run here.
    """
    if draft == NATIVE:
        return "native"
    path = Path(draft) / _CONFIG
    if not path.is_file():
        raise CheckpointError(
            "no draft: there is no config.json", where=draft, fix=f"name a folder, or `{NATIVE}`"
        )
    speculator = _config(Path(draft)).get("speculators_model_type")
    if speculator is None:
        return "draft_model"
    if speculator != "eagle3":
        what = f"speculators of type {speculator!r} are not run here"
        raise CheckpointError(what, where=str(path), fix="name an EAGLE-3 head, or a smaller model")
    return "eagle3"


def open_drafter(
    draft: str, checkpoint: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Drafter:
    """Of any kind, on the target's device.

    Args:
        draft: ``native`` for the checkpoint's own prediction layer, else a folder: a speculator (EAGLE-3), or
            a smaller model, which computes in the target's dtype.
        checkpoint: folder of the target.
        target: loaded from it, on its device.
        tokenizer: of the target.

    Raises:
        CheckpointError: it is missing, broken, or does not go with the target.
    """
    kind = kind_of(draft)
    if kind == "native":
        return _native(checkpoint, target)
    if kind == "eagle3":
        from compressor.drafts.eagle3 import SharedEnds
        from compressor.drafts.eagle3_drafter import Eagle3Drafter
        from compressor.drafts.eagle3_files import read_head

        head = read_head(Path(draft), _config(checkpoint), SharedEnds.of(target))
        return Eagle3Drafter(head.to(target.device, target.dtype).requires_grad_(False))
    return _model(Path(draft), target, tokenizer)


def _native(checkpoint: Path, target: PreTrainedModel) -> Drafter:
    from compressor.checkpoint.dequantized import DequantizedSource
    from compressor.checkpoint.folder import FolderSource
    from compressor.drafts.native_drafter import NativeDrafter
    from compressor.drafts.native_layer import PredictionLayer

    quantized = "quantization_config" in _config(checkpoint)
    source: Source = FolderSource(checkpoint, quantized=quantized)
    if quantized:
        source = DequantizedSource(source)
    return NativeDrafter(PredictionLayer(source, target, target.dtype).requires_grad_(False))


def _model(folder: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    from compressor.drafts.draft_model import DraftModel, check_vocabulary
    from compressor.evals.text import vocabulary_size
    from compressor.model.load import load_checkpoint_model, load_tokenizer

    model = load_checkpoint_model(folder, target.dtype).model
    check_vocabulary(
        tokenizer, load_tokenizer(folder), vocabulary_size(target), vocabulary_size(model), str(folder)
    )
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"parameter {name} has values that are not finite", where=str(folder))
    placed: PreTrainedModel = model.to(target.device)
    return DraftModel(placed.eval())


def _config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    return load_config(file.read_bytes(), str(file))
