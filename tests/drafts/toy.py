"""The smallest head that can be trained: one matrix on the hidden state and the next token's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, pad

from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.drafts.base import LAST, Rows, Unrolled


class ToyHead:
    """Reads the last hidden state and one more; the output goes to the target's own head."""

    def __init__(self, model: Any, layer: int = 1, seed: int = 0) -> None:
        self._embedding = model.get_input_embeddings().weight.detach()
        self._output = model.get_output_embeddings().weight.detach()
        width = self._embedding.shape[1]
        generator = torch.Generator().manual_seed(seed)
        mixed = 0.02 * torch.randn(width, 3 * width, generator=generator)
        self._mixed = nn.Parameter(mixed.to(self._output.device), requires_grad=False)
        self.layers: tuple[int, ...] = (layer,)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """Its matrix."""
        return {"mixed": self._mixed}

    def unroll(self, rows: Rows, steps: int) -> Unrolled:
        """KL from the target's distribution, each step on the state that the one before made."""
        ids_BT, last_BTD = rows.ids_BT, rows.hidden[LAST]
        count = ids_BT.shape[1] - 1
        places_BN = rows.counted_BT[:, :-1] & (torch.arange(count) + steps <= count)
        state_BND, below_BND = last_BTD[:, :-1], rows.hidden[self.layers[0]][:, :-1]
        right_P = torch.ones(int(places_BN.sum()), dtype=torch.bool)
        loss, losses, accepted = torch.zeros(()), [], []
        for step in range(steps):
            next_BN = pad(ids_BT[:, 1 + step :], (0, step))
            both = torch.cat([state_BND, below_BND, self._embedding[next_BN]], dim=-1)
            state_BND = state_BND + both @ self._mixed.T
            wanted_PV = log_softmax(
                pad(last_BTD[:, 1 + step :], (0, 0, 0, step))[places_BN] @ self._output.T, -1
            )
            made_PV = log_softmax(state_BND[places_BN] @ self._output.T, -1)
            lost = kl_div(made_PV, wanted_PV, log_target=True, reduction="sum")
            loss = loss + 0.8**step * lost
            right_P = right_P & (made_PV.argmax(-1) == wanted_PV.argmax(-1))
            losses.append(lost.detach())
            accepted.append(right_P.sum())
        return Unrolled(loss, torch.stack(losses), torch.stack(accepted), len(right_P))

    def write(self, folder: Path, tokens: int) -> None:
        """One file that says how many."""
        write_tensors(folder / "model.safetensors", {"mixed": self._mixed.detach()})
        (folder / "config.json").write_text(f'{{"tokens": {tokens}}}')
