"""A checkpoint's own prediction layer as a head that is measured and trained on its quantized target.

FastMTP (arXiv 2509.18362, section 3): one layer applied recursively, its steps weighted by powers of a decay;
here the loss is the divergence from the target's own distribution.

Legend: B sequences, T tokens, N slots (T - 1), S slots that attention reads, K steps, D hidden size,
V vocabulary, P some places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from compressor.checkpoint.replaced import replace_tensors
from compressor.drafts.base import LAST, Rows, Unrolled
from compressor.drafts.native_layer import PredictionLayer

DECAY = 0.6
# Source tensors -> what the checkpoint stores for them.
Stored = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
# Logits of one piece of the loss: two fp32 tensors of them are held at a time, and the gradient.
CHUNK_LOGITS = 1 << 25


class NativeHead:
    """See ``drafts.base.Head``; what is written lies in the checkpoint (``tensors``).

    Args:
        layer: of the checkpoint.
        stored: gives what the checkpoint stores for ``tensors``: those of the plan's claims
            (``stages.predictions``). By default the tensors themselves, in 16 bit.
        decay: weight of a step over that of the step before.
    """

    layers: tuple[int, ...] = (LAST,)

    def __init__(
        self, layer: PredictionLayer, stored: Stored = lambda tensors: tensors, decay: float = DECAY
    ) -> None:
        self.layer = layer
        self._stored = stored
        self._decay = decay

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """See ``Head.trained``: all of the layer; routers' correction biases are buffers and stay."""
        return dict(self.layer.named_parameters())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors as training left them, by their names, in their dtypes, on the CPU."""
        return self.layer.tensors()

    def write(self, folder: Path, tokens: int) -> None:
        """See ``Head.write``: replaces the layer's tensors in the checkpoint in ``folder``.

        ``tokens``: engines are told when they are started (``--speculative-config``).

        Raises:
            CheckpointError: the folder holds no such tensors, or a trained one is not finite.
            UserError: the disk is full.
        """
        replace_tensors(folder, self._stored(self.tensors()))

    def unroll(self, rows: Rows, steps: int) -> Unrolled:
        """See ``Head.unroll``.

        A place counts where it and the ``steps`` tokens behind it do, which its steps read. Of a text that
        the target wrote greedily, ``accepted_K`` are what the decoding loop would accept from these places.
        """
        from transformers import DynamicCache

        ids_BT, last_BTD = rows.ids_BT, rows.hidden[LAST]
        count = ids_BT.shape[1] - 1
        slots_N = torch.arange(count, device=ids_BT.device)
        counted_BT = rows.counted_BT.to(ids_BT.device)
        places_BN = torch.zeros(len(ids_BT), count, dtype=torch.bool, device=ids_BT.device)
        if count >= steps:
            places_BN[:, : count + 1 - steps] = counted_BT.unfold(1, steps + 1, 1).all(dim=2)
        cache = DynamicCache()
        state_BND = last_BTD[:, :-1]
        loss = torch.zeros((), device=ids_BT.device)
        losses, accepted = [], []
        right_P = torch.ones(int(places_BN.sum()), dtype=torch.bool, device=ids_BT.device)
        for step in range(steps):
            # Tokens behind the end are read by places that are not counted, and seen by no other.
            ids_BN = torch.nn.functional.pad(ids_BT[:, 1 + step :], (0, step))
            positions_BN = (slots_N + step).expand_as(ids_BN)
            seen_1NS = seen_in_step(count, step, ids_BT.device)
            state_BND, normed_BND = self.layer(ids_BN, state_BND, positions_BN, seen_1NS, cache)
            # What the target makes of all tokens up to the one that the step has read.
            ahead_BND = torch.nn.functional.pad(last_BTD[:, 1 + step :], (0, 0, 0, step))
            lost, hit_P = self._divergence(normed_BND[places_BN], ahead_BND[places_BN])
            loss = loss + self._decay**step * lost
            right_P = right_P & hit_P
            losses.append(lost.detach())
            accepted.append(right_P.sum())
        return Unrolled(loss, torch.stack(losses), torch.stack(accepted), len(right_P))

    def _divergence(
        self, normed_PD: torch.Tensor, target_PD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the divergences from the target's distributions, nats; where the likeliest tokens agree."""
        vocabulary = self.layer.vocabulary
        pieces = max(1, CHUNK_LOGITS // vocabulary)
        total = torch.zeros((), device=normed_PD.device)
        hits = []
        for start in range(0, len(normed_PD), pieces):
            here = slice(start, start + pieces)
            lost, hit = checkpoint(self._piece, normed_PD[here], target_PD[here], use_reentrant=False)
            total = total + lost
            hits.append(hit)
        return total, torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool, device=total.device)

    def _piece(self, normed_PD: torch.Tensor, target_PD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            wanted_PV = log_softmax(self.layer.logits(target_PD), dim=-1)
        made_PV = log_softmax(self.layer.logits(normed_PD), dim=-1)
        lost = kl_div(made_PV, wanted_PV, log_target=True, reduction="sum")
        return lost, made_PV.argmax(dim=-1) == wanted_PV.argmax(dim=-1)


def seen_in_step(slots: int, step: int, device: torch.device) -> torch.Tensor:
    """bool [1, N, (step + 1) * N]: which slots of all steps so far each place of a step attends to.

    Of step 0, which read the target's own states, those up to its place; of each later one its own only.
    """
    own_NN = torch.eye(slots, dtype=torch.bool, device=device)
    return torch.cat([torch.ones_like(own_NN).tril(), *[own_NN] * step], dim=1)[None]
