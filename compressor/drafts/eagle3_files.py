"""An EAGLE-3 head as a folder in the speculators format, which vLLM 0.32 loads as a draft.

``config.json`` and ``model.safetensors``: vllm-project/speculators (models/eagle3/config.py, core.py) and
vLLM 0.32 (transformers_utils/configs/speculators, models/llama_eagle3.py). The target's embedding, and its
output head where the head knows all tokens, are left out: vLLM shares them. Nothing that is read is trusted.

Legend: V vocabulary of the target, R of the head.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.layout import load_config
from compressor.checkpoint.safetensors_file import FileHeader, read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.drafts.eagle3_shape import HeadShape, shape_for
from compressor.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import torch

    from compressor.drafts.eagle3 import Eagle3Head, SharedEnds
    from compressor.drafts.vocabulary import DraftVocabulary

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
# Those of the speculators library that describe this layout.
_ARCHITECTURE = "Eagle3Speculator"
_OFFSETS, _KNOWN = "d2t", "t2d"
_FLOATS = ("F32", "BF16", "F16")
_MOST_CONFIG_BYTES = 2**20
_MOST_TOKENS = 64


@dataclass(frozen=True)
class StoredHead:
    """What a folder says of its head.

    Attributes:
        shape: its sizes.
        tokens: how many it proposes at a time.
        verifier: path or name of the target.
    """

    shape: HeadShape
    tokens: int
    verifier: str


def write_head(folder: Path, head: Eagle3Head, *, verifier: str, tokens: int, dtype: torch.dtype) -> None:
    """Writes a head into an existing folder; the config comes last, so that half a head is none.

    Args:
        folder: where to.
        head: its parameters are rounded once.
        verifier: path or name of the target, as ``vllm serve FOLDER`` is to find it.
        tokens: to propose at a time.
        dtype: of the stored parameters.

    Raises:
        UserError: a value is not finite, or too large for ``dtype``; the disk is full.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in head.shape.tensors():
        tensors[name] = head.get_parameter(name).detach().cpu().to(dtype)
        if not bool(tensors[name].isfinite().all()):
            raise UserError(
                f"{name}: trained values are not finite, or too large for {dtype}",
                where="drafts.train",
                fix="lower the learning rate",
            )
    if head.vocabulary is not None:
        tensors |= {_OFFSETS: head.vocabulary.d2t_R.cpu(), _KNOWN: head.vocabulary.t2d_V.cpu()}
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS_NAME, tensors)
    config = head_config(head.shape, verifier=verifier, tokens=tokens, dtype=str(dtype).rpartition(".")[2])
    half = folder / f"{CONFIG_NAME}.tmp-{os.getpid()}"
    half.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / CONFIG_NAME)


def head_config(shape: HeadShape, *, verifier: str, tokens: int, dtype: str) -> dict[str, Any]:
    """The contents of a head's config.json."""
    return {
        "architectures": [_ARCHITECTURE],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": shape.draft_vocabulary,
        "norm_before_residual": shape.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": list(shape.layers),
        "dtype": dtype,
        "transformer_layer_config": shape.layer_config(),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }


def read_stored(folder: Path, target: Mapping[str, Any]) -> StoredHead:
    """A head's config and the header of its weights, checked against the target's config. Without torch.

    Raises:
        CheckpointError: unreadable, of another kind, for another target, or tensors are missing, unknown or
            of a wrong shape.
    """
    stored = _stored(_read_config(folder / CONFIG_NAME), target, str(folder / CONFIG_NAME))
    _check_tensors(read_header(folder / WEIGHTS_NAME), stored.shape, str(folder / WEIGHTS_NAME))
    return stored


def read_head(folder: Path, target: Mapping[str, Any], ends: SharedEnds) -> Eagle3Head:
    """The head of a folder, parameters in fp32 on the CPU.

    Args:
        folder: in the speculators format.
        target: contents of the target's config.json.
        ends: what the head shares with the target.

    Raises:
        CheckpointError: see ``read_stored``; or values are not finite, or its vocabulary is none.
    """
    import torch

    from compressor.drafts.eagle3 import Eagle3Head

    stored = read_stored(folder, target)
    path, shape = folder / WEIGHTS_NAME, stored.shape
    header = read_header(path)

    def read(name: str) -> torch.Tensor:
        return read_tensor(path, header.headers[name], header.offsets[name])

    vocabulary = None
    if shape.reduced:
        vocabulary = _vocabulary(read(_OFFSETS), read(_KNOWN), shape, str(path))
    head = Eagle3Head(shape, ends, vocabulary)
    with torch.no_grad():
        for name in shape.tensors():
            values = read(name)
            if not bool(values.isfinite().all()):
                raise CheckpointError(f"tensor {name} has values that are not finite", where=str(path))
            head.get_parameter(name).copy_(values)
    return head


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(raw) > _MOST_CONFIG_BYTES:
        raise CheckpointError("is larger than any head's config", where=str(path))
    return load_config(raw, str(path))


def _stored(config: Mapping[str, Any], target: Mapping[str, Any], where: str) -> StoredHead:
    if config.get("speculators_model_type") != "eagle3":
        raise CheckpointError("speculators_model_type is not 'eagle3'", where=where)
    layers, known = config.get("eagle_aux_hidden_state_layer_ids"), config.get("draft_vocab_size")
    before = config.get("norm_before_residual")
    if not isinstance(layers, list) or not layers or not all(type(n) is int for n in layers):
        raise CheckpointError("eagle_aux_hidden_state_layer_ids is no list of layers", where=where)
    if type(known) is not int or not isinstance(before, bool):
        raise CheckpointError(
            "draft_vocab_size is no size, or norm_before_residual no truth value", where=where
        )
    told = config.get("transformer_layer_config")
    if not isinstance(told, dict):
        raise CheckpointError("transformer_layer_config is no JSON object", where=where)
    try:
        shape = shape_for(target, layers=layers, draft_vocabulary=known, norm_before_residual=before)
    except UserError as error:
        raise CheckpointError(f"is no head for this target: {error.what}", where=where) from error
    # Only the MLP may be as wide as it likes.
    width = told.get("intermediate_size")
    if type(width) is int and 0 < width < 2**24:
        shape = replace(shape, intermediate_size=width)
    wrong = [key for key, value in shape.layer_config().items() if told.get(key) != value]
    if wrong:
        raise CheckpointError(
            f"transformer_layer_config: {wrong[0]} is {str(told.get(wrong[0]))[:60]!r}, for this target "
            f"it is {str(shape.layer_config()[wrong[0]])[:60]!r}",
            where=where,
        )
    for extra in ("fc_norm", "norm_before_fc", "norm_output"):
        if config.get(extra):
            raise CheckpointError(f"{extra} is set: such heads are not read", where=where)
    return StoredHead(shape, *_proposal(config.get("speculators_config"), where))


def _proposal(told: object, where: str) -> tuple[int, str]:
    """Tokens and verifier."""
    fault = CheckpointError("speculators_config names no number of tokens, or no verifier", where=where)
    if not isinstance(told, dict):
        raise fault
    methods, verifier = told.get("proposal_methods"), told.get("verifier")
    if not isinstance(methods, list) or len(methods) != 1 or not isinstance(methods[0], dict):
        raise fault
    tokens = methods[0].get("speculative_tokens")
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    if type(tokens) is not int or not 0 < tokens <= _MOST_TOKENS or not isinstance(name, str):
        raise fault
    return tokens, name


def _check_tensors(file: FileHeader, shape: HeadShape, where: str) -> None:
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        name: (_FLOATS, sizes) for name, sizes in shape.tensors().items()
    }
    if shape.reduced:
        wanted[_OFFSETS] = (("I64",), (shape.draft_vocabulary,))
        wanted[_KNOWN] = (("BOOL",), (shape.vocabulary,))
    if file.headers.keys() != wanted.keys():
        odd = min(file.headers.keys() ^ wanted.keys())
        raise CheckpointError(
            f"tensor {odd} is {'unknown' if odd in file.headers else 'missing'}", where=where
        )
    for name, (dtypes, sizes) in wanted.items():
        header = file.headers[name]
        if header.dtype not in dtypes or header.shape != sizes:
            raise CheckpointError(
                f"tensor {name} is {header.dtype} {list(header.shape)}, not {dtypes[0]} {list(sizes)}",
                where=where,
            )


def _vocabulary(d2t_R: torch.Tensor, t2d_V: torch.Tensor, shape: HeadShape, where: str) -> DraftVocabulary:
    import torch

    from compressor.drafts.vocabulary import DraftVocabulary

    bounded = bool(((d2t_R >= 0) & (d2t_R < shape.vocabulary)).all())
    ids_R = d2t_R + torch.arange(len(d2t_R)) if bounded else d2t_R
    if not bounded or not bool((ids_R.diff() > 0).all()) or int(ids_R[-1]) >= shape.vocabulary:
        raise CheckpointError("d2t does not lead to increasing ids of the target", where=where)
    found = DraftVocabulary(ids_R, shape.vocabulary)
    # Stored truth values may be any byte.
    if not torch.equal(found.t2d_V.to(torch.uint8), t2d_V.view(torch.uint8)):
        raise CheckpointError("t2d and d2t disagree", where=where)
    return found
