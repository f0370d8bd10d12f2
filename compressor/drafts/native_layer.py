"""A checkpoint's own prediction layer as a module: transformers' decoder block of the family, and its norms.

The block is the one of a model of a single block, so that names, fused experts and shapes are mapped as
transformers' own loader maps them (``model/tensor_map.py``). Conventions: vLLM 0.32
``model_executor/models/{qwen3_next,deepseek,glm4_moe}_mtp.py``.

Legend: B sequences, T tokens, S slots that attention reads, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.drafts.native_table import NativeFamily, prediction_names, runnable_family
from compressor.errors import CheckpointError
from compressor.model.skeleton import library_faults
from compressor.model.tensor_map import Piece, TensorMap
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

_BLOCK = "layers.0."


class PredictionLayer(nn.Module):
    """One prediction layer on its target, on the target's device, in evaluation mode.

    Attributes:
        family: how it computes.
        headers: the source's tensors that it was read from, and that ``tensors`` gives.
    """

    def __init__(self, source: Source, target: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        """Reads the layer from ``source``; embedding, output head and rotary tables are the target's.

        Args:
            source: the checkpoint, in 16 bit or read as such; transformers drops these tensors.
            target: whom it predicts for, loaded from wherever, with the same names of blocks.
            dtype: of its parameters, in which it computes: fp32 to be trained, the target's to be measured.

        Raises:
            CheckpointError: no layer that is run, a tensor is missing, too many, of another shape, or
                not finite.
        """
        super().__init__()
        self.family: NativeFamily = runnable_family(source.headers, source.config)
        # In a tuple, for a module's attribute would make them this module's parameters.
        self._shared = (target,)
        device = next(target.parameters()).device
        decoder = _one_block(target.get_decoder(), source.label)
        self.block: Any = decoder.layers[0]
        self.embedding_norm: nn.Module = copy.deepcopy(self.block.input_layernorm)
        self.hidden_norm: nn.Module = copy.deepcopy(self.block.input_layernorm)
        self.last_norm: nn.Module = copy.deepcopy(self.block.input_layernorm)
        width = int(decoder.config.hidden_size)
        self.projection = nn.Linear(2 * width, width, bias=False, device="meta")
        self._where = self._places(source, decoder)
        self.headers: Mapping[str, TensorHeader] = {
            piece.tensor: source.headers[piece.tensor] for pieces in self._where.values() for piece in pieces
        }
        self._fill(source, device, dtype)
        self.eval()

    def forward(
        self,
        ids_BT: torch.Tensor,
        hidden_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        seen_BTS: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next step reads, and what the output head reads: [B, T, D] each.

        Args:
            ids_BT: the token behind the one whose hidden state it is.
            hidden_BTD: the target's behind its last norm or, in later steps, what this returned first.
            positions_BT: of the hidden states.
            seen_BTS: bool; which slots of ``cache``, these T among them and last, each token attends to; one
                row where that is the same for all sequences.
            cache: keys and values so far, in layer 0; gets these T slots.
        """
        target = self._shared[0]
        embedded_BTD = target.get_input_embeddings()(ids_BT).to(self.projection.weight.dtype)
        if self.family.zeroed:
            embedded_BTD = embedded_BTD.masked_fill((positions_BT == 0)[..., None], 0)
        both = [self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD.to(embedded_BTD.dtype))]
        states_BTD = self.projection(torch.cat(both[::-1] if self.family.hidden_first else both, dim=-1))
        # Added to the scores, as every attention implementation reads it.
        floor = torch.finfo(states_BTD.dtype).min
        mask_B1TS = torch.where(seen_BTS, 0.0, floor).to(states_BTD.dtype)[:, None]
        axes = self.family.axes
        rotated = positions_BT if axes == 1 else positions_BT.expand(axes, *positions_BT.shape)
        states_BTD = self.block(
            states_BTD,
            position_embeddings=target.get_decoder().rotary_emb(states_BTD, rotated),
            attention_mask=mask_B1TS,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        )
        normed_BTD = self.last_norm(states_BTD)
        return (normed_BTD if self.family.recycled == "behind_norm" else states_BTD), normed_BTD

    @property
    def vocabulary(self) -> int:
        """Rows of the target's output head."""
        return len(self._shared[0].get_output_embeddings().weight)

    def logits(self, normed_BTD: torch.Tensor) -> torch.Tensor:
        """The target's head on what ``forward`` returned second: fp32 [B, T, V]."""
        head = self._shared[0].get_output_embeddings()
        logits_BTV: torch.Tensor = head(normed_BTD.to(head.weight.dtype)).float()
        return logits_BTV

    def tensors(self) -> dict[str, torch.Tensor]:
        """The source's tensors with the layer's present values, on the CPU, in the source's dtypes."""
        parameters = self._parameters_by_name()
        with torch.no_grad():
            return {
                piece.tensor: piece.of(parameters[name])
                .to("cpu", torch_dtype(self.headers[piece.tensor].dtype), copy=True)
                .contiguous()
                for name, pieces in self._where.items()
                for piece in pieces
            }

    def _places(self, source: Source, decoder: PreTrainedModel) -> dict[str, tuple[Piece, ...]]:
        """Parameter or buffer -> the source tensors that it consists of."""
        named = {
            own: self.family.named(pattern, source.config)
            for own, pattern in (
                ("embedding_norm", self.family.embedding_norm),
                ("hidden_norm", self.family.hidden_norm),
                ("projection", self.family.projection),
                ("last_norm", self.family.last_norm),
            )
        }
        found: dict[str, tuple[Piece, ...]] = {
            f"{own}.weight": (Piece(f"{module}.weight"),) for own, module in named.items()
        }
        own_names = {piece.tensor for pieces in found.values() for piece in pieces}
        copies = {self.family.named(copied, source.config) for copied in self.family.copies}
        prefix = self.family.named(self.family.block, source.config)
        renamed = {
            _BLOCK + name.removeprefix(prefix): TensorHeader(
                _BLOCK + name.removeprefix(prefix), header.dtype, header.shape
            )
            for name, header in source.headers.items()
            if name.startswith(prefix) and name not in own_names | copies
        }
        mapped = TensorMap.of(decoder, renamed, source.label)
        for name, pieces in mapped.pieces.items():
            found["block." + name.removeprefix(_BLOCK)] = tuple(
                Piece(
                    prefix + piece.tensor.removeprefix(_BLOCK),
                    piece.expert,
                    piece.dim,
                    piece.start,
                    piece.size,
                )
                for piece in pieces
            )
        self._check(source, found, prefix, copies)
        return found

    def _check(
        self, source: Source, found: Mapping[str, tuple[Piece, ...]], prefix: str, copies: set[str]
    ) -> None:
        """Raises CheckpointError unless tensors and parameters fit one another, all of both."""
        parameters = self._parameters_by_name()
        lacking = sorted(
            name
            for name in parameters
            if any(piece.tensor not in source.headers for piece in found.get(name, ())) or name not in found
        )
        if lacking:
            raise CheckpointError(f"the prediction layer has no tensor for {lacking[0]}", where=source.label)
        for name, pieces in found.items():
            for piece in pieces:
                shape, stated = tuple(piece.of(parameters[name]).shape), source.headers[piece.tensor].shape
                if shape != stated:
                    raise CheckpointError(
                        f"{piece.tensor} has the shape {list(stated)}, its config asks for {list(shape)}",
                        where=source.label,
                    )
        read = {piece.tensor for pieces in found.values() for piece in pieces} | copies
        # Of further layers, which no engine runs, nothing is read.
        first = {
            name
            for name in prediction_names(source.headers, source.config)
            if name.startswith(prefix) or not any(part.isdecimal() for part in name.split("."))
        }
        if first - read:
            raise CheckpointError(
                f"the prediction layer has no place for {min(first - read)}", where=source.label
            )

    def _fill(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        for name, empty in self._parameters_by_name().items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            kept = leaf in module._buffers  # routers' corrections: fp32 whatever the layer computes in
            values = torch.empty(empty.shape, dtype=torch.float32 if kept else dtype, device=device)
            for piece in self._where[name]:
                read = source.read(piece.tensor)
                if not bool(read.isfinite().all()):
                    raise CheckpointError(
                        f"tensor {piece.tensor} has values that are not finite", where=source.label
                    )
                piece.of(values).copy_(read)
            if kept:
                module._buffers[leaf] = values
            else:
                module._parameters[leaf] = nn.Parameter(values, requires_grad=False)

    def _parameters_by_name(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def _one_block(decoder: Any, where: str) -> PreTrainedModel:
    """A model of the target's decoder class with one block of full attention (and experts), on meta."""
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"]
    # transformers 5.17 configuration_utils.py get_mtp_config: prediction layers have experts.
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    with library_faults(where, "its prediction layer cannot be built"), torch.device("meta"):
        made: PreTrainedModel = type(decoder)(config)
    return made
