"""The head that a stage trains, made for a target: a new one, or the source's own prediction layer.

Legend: B rows, T tokens of a row, K steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.checkpoint.base import Source
from compressor.dialects.base import Dialect
from compressor.drafts.base import Head, Rows, Unrolled
from compressor.drafts.eagle3 import Eagle3Head, SharedEnds
from compressor.drafts.eagle3_files import write_head
from compressor.drafts.eagle3_shape import shape_for
from compressor.drafts.eagle3_warm import warm_start
from compressor.drafts.native import NativeHead
from compressor.drafts.native_layer import PredictionLayer
from compressor.drafts.unroll import Unroll
from compressor.drafts.vocabulary import count_tokens, frequent_tokens
from compressor.stages.base import Claim
from compressor.stages.drafts_rows import DraftRows
from compressor.stages.drafts_spec import DRAFT_FOLDER, DraftSpec
from compressor.stages.predictions import stored_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EagleHead:
    """An EAGLE-3 head as the trainer asks it; see ``drafts.base.Head``.

    Args:
        head: parameters in fp32 on the target's device.
        dtype: of the stored parameters.
    """

    def __init__(self, head: Eagle3Head, dtype: torch.dtype) -> None:
        self.head, self._dtype = head, dtype

    @property
    def layers(self) -> tuple[int, ...]:
        """See ``Head.layers``."""
        return self.head.shape.layers

    @property
    def trained(self) -> Mapping[str, torch.nn.Parameter]:
        """See ``Head.trained``."""
        return dict(self.head.named_parameters())

    def unroll(self, rows: Rows, steps: int) -> Unrolled:
        """See ``Head.unroll``.

        The unroll's steps foretell a few tokens more the nearer they are: sums are of as many places as step
        0 has, by each step's own mean.
        """
        found = Unroll(self.head, steps)(rows.ids_BT, rows.hidden, rows.counted_BT)
        places = found.tokens_K[0]
        share_K = places / found.tokens_K.clamp(min=1)
        return Unrolled(found.loss * places, found.kl_K * share_K, found.accepted_K * share_K, int(places))

    def write(self, folder: Path, tokens: int) -> None:
        """See ``Head.write``: a folder ``draft`` that names no verifier yet."""
        (folder / DRAFT_FOLDER).mkdir(exist_ok=True)
        write_head(folder / DRAFT_FOLDER, self.head, verifier="", tokens=tokens, dtype=self._dtype)


def make_head(
    spec: DraftSpec,
    source: Source,
    target: PreTrainedModel,
    rows: DraftRows,
    ends: Collection[int],
    claims: Sequence[Claim],
    dialect: Dialect,
) -> Head:
    """The head of a kind that is trained.

    Args:
        spec: which.
        source: what the target was made of, which holds the prediction layer.
        target: the compressed model, on its device.
        rows: to train on; their most frequent tokens are those that a new head knows.
        ends: ids that end a text; a new head always knows them.
        claims: of the source's tensors.
        dialect: how the result spells them.

    Raises:
        CheckpointError: the source holds no layer that is run, or the target cannot share what a head needs.
        UserError: no such head is served for the target.
    """
    assert spec.train is not None
    if spec.kind == "native":
        layer = PredictionLayer(source, target)
        return NativeHead(layer, lambda tensors: stored_predictions(source, tensors, claims, dialect))
    known = spec.train.vocabulary_size
    shape = shape_for(source.config, draft_vocabulary=known)
    vocabulary = None
    if shape.reduced:
        counts_V = count_tokens(rows.ids_NT[rows.counted(torch.arange(len(rows)))], shape.vocabulary)
        vocabulary = frequent_tokens(counts_V, shape.draft_vocabulary, ends)
    head = Eagle3Head(shape, SharedEnds.of(target), vocabulary, seed=spec.train.seed).to(target.device)
    warm_start(head, target)
    head.requires_grad_(False)
    return EagleHead(head, torch.bfloat16)
