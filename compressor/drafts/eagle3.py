"""The EAGLE-3 head: one decoder layer that reads hidden states of a target and foretells what it will say.

Arithmetic, names and conventions of vLLM 0.32 (model_executor/models/llama_eagle3.py), which serves it. Slot
i holds token i + 1 and the hidden states of token i, at position i; what it puts out foretells token i + 2.
Further steps take the head's own output (before its last norm) for the hidden state they lack.

Legend: B sequences, T slots, D hidden size, H heads, G heads of keys and values, E dimensions of a head,
V vocabulary of the target, R of the head, N any number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from compressor.drafts.eagle3_shape import HeadShape
from compressor.drafts.vocabulary import DraftVocabulary
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPREAD = 0.02


@dataclass(frozen=True, eq=False)
class SharedEnds:
    """The target's tensors that a head uses and does not own; never trained here.

    Attributes:
        embedding_VD: of its tokens.
        output_VD: of its output head; the same tensor where they are tied.
    """

    embedding_VD: torch.Tensor
    output_VD: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel) -> SharedEnds:
        """Those of a model whose weights are decoded.

        Raises:
            CheckpointError: it has none, or an output head that adds something.
        """
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        if first is None or last is None or getattr(last, "bias", None) is not None:
            raise CheckpointError("no plain embedding and output head to share", where=type(model).__name__)
        return cls(first.weight.detach(), last.weight.detach())


@dataclass(frozen=True, eq=False)
class Projected:
    """One layer before its attention.

    Attributes:
        query_BHTE: queries, positions included.
        key_BGTE: keys, positions included.
        value_BGTE: values.
        residual_BTD: what attention is added to.
    """

    query_BHTE: torch.Tensor
    key_BGTE: torch.Tensor
    value_BGTE: torch.Tensor
    residual_BTD: torch.Tensor


class Eagle3Head(nn.Module):
    """A head; its parameters are those that are stored, under the stored names.

    Args:
        shape: its sizes.
        ends: what it shares with the target.
        vocabulary: the tokens it knows, where these are fewer than the target's.
        seed: of its first values.

    Attributes:
        shape: as given.
        vocabulary: as given.
    """

    def __init__(
        self, shape: HeadShape, ends: SharedEnds, vocabulary: DraftVocabulary | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        known = shape.vocabulary if vocabulary is None else len(vocabulary.ids_R)
        assert known == shape.draft_vocabulary, f"{known} tokens, the shape has {shape.draft_vocabulary}"
        self.shape, self.vocabulary, self._ends = shape, vocabulary, ends
        config = LlamaConfig(**shape.layer_config())
        self.fc = nn.Linear(len(shape.layers) * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([_Layer(shape, config)])
        self.norm = LlamaRMSNorm(shape.hidden_size, eps=shape.eps)
        if vocabulary is not None:
            self.lm_head = nn.Linear(shape.hidden_size, known, bias=False)
        # Not a buffer: computed, and of fp32 whatever the parameters are.
        self._rotary = (LlamaRotaryEmbedding(config),)
        self._fill(seed)

    @property
    def layer(self) -> _Layer:
        """Its only layer."""
        found = self.layers[0]
        assert isinstance(found, _Layer)
        return found

    @property
    def output_RD(self) -> torch.Tensor:
        """The output head: its own, or the target's."""
        return self._ends.output_VD if self.vocabulary is None else self.lm_head.weight

    @property
    def target_output_VD(self) -> torch.Tensor:
        """The target's output head."""
        return self._ends.output_VD

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        found: torch.dtype = self.fc.weight.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        found: torch.device = self.fc.weight.device
        return found

    def combine(self, hidden: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Hidden states [B, T, D] by layer -> what step 0 takes for its hidden state [B, T, D]."""
        joined = torch.cat([hidden[n].to(self.device, self.dtype) for n in self.shape.layers], dim=-1)
        combined: torch.Tensor = self.fc(joined)
        return combined

    def project(
        self, ids_BT: torch.Tensor, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor
    ) -> Projected:
        """Everything before attention, for the target's token ids and the hidden states of their slots."""
        embedded_BTD = embedding(ids_BT, self._ends.embedding_VD).to(self.device, self.dtype)
        rotary = self._rotary[0].to(self.device)
        cos_BTE, sin_BTE = rotary(hidden_BTD, positions_BT)
        return self.layer.project(embedded_BTD, hidden_BTD, cos_BTE, sin_BTE)

    def finish(self, attended_BHTE: torch.Tensor, residual_BTD: torch.Tensor) -> torch.Tensor:
        """Everything behind attention but the last norm: [B, T, D], which the next step takes."""
        return self.layer.finish(attended_BHTE, residual_BTD)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """fp32 [N, R] of what ``finish`` gave."""
        weight_RD = self.output_RD
        return linear(self.norm(hidden_ND).to(weight_RD.dtype), weight_RD).float()

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """The head's token ids as the target's."""
        if self.vocabulary is None:
            return ids
        return self.vocabulary.ids_R.to(ids.device)[ids]

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _SPREAD)
            else:
                assert name.endswith("norm.weight"), name
                parameter.fill_(1)
        if self.vocabulary is not None:
            rows_RD = self._ends.output_VD[self.vocabulary.ids_R.to(self._ends.output_VD.device)]
            self.lm_head.weight.copy_(rows_RD)


class _Attention(nn.Module):
    """The four projections."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        wide, dims = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(2 * wide, shape.heads * dims, bias=False)
        self.k_proj = nn.Linear(2 * wide, shape.kv_heads * dims, bias=False)
        self.v_proj = nn.Linear(2 * wide, shape.kv_heads * dims, bias=False)
        self.o_proj = nn.Linear(shape.heads * dims, wide, bias=False)


class _Layer(nn.Module):
    """A Llama layer whose queries, keys and values are made of an embedding beside a hidden state."""

    def __init__(self, shape: HeadShape, config: LlamaConfig) -> None:
        super().__init__()
        self._before, self._dims = shape.norm_before_residual, shape.head_dim
        self.input_layernorm = LlamaRMSNorm(shape.hidden_size, eps=shape.eps)
        self.hidden_norm = LlamaRMSNorm(shape.hidden_size, eps=shape.eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = LlamaRMSNorm(shape.hidden_size, eps=shape.eps)
        self.mlp = LlamaMLP(config)

    def project(
        self,
        embedded_BTD: torch.Tensor,
        hidden_BTD: torch.Tensor,
        cos_BTE: torch.Tensor,
        sin_BTE: torch.Tensor,
    ) -> Projected:
        normed_BTD = self.hidden_norm(hidden_BTD)
        residual_BTD = normed_BTD if self._before else hidden_BTD
        both = torch.cat([self.input_layernorm(embedded_BTD), normed_BTD], dim=-1)
        heads = [
            projection(both).unflatten(-1, (-1, self._dims)).transpose(1, 2)
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        ]
        query_BHTE, key_BGTE = apply_rotary_pos_emb(heads[0], heads[1], cos_BTE, sin_BTE)
        return Projected(query_BHTE, key_BGTE, heads[2], residual_BTD)

    def finish(self, attended_BHTE: torch.Tensor, residual_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTD = residual_BTD + self.self_attn.o_proj(attended_BHTE.transpose(1, 2).flatten(2))
        passed: torch.Tensor = hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))
        return passed
