"""A model that reads tokens through its cache and can unread the last of them, row by row.

Legend: B rows, T tokens read at once, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache

from compressor.errors import CheckpointError
from compressor.model.rolled import can_forget, drop_left, holds_tokens, move_right, put_back, set_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS, _PROBE_TAIL = 12, 4
# Relative: of sums in another order, and of 16-bit numbers. A lost state moves logits by their own size.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_PROBE_TOLERANCE_16BIT = 0.1
# Times the distance that plain decoding has; and what is no rounding any more.
_PROBE_NOISES, _PROBE_MOST = 4, 0.6


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model makes of the tokens that it has just read.

    Attributes:
        logits_BTV: in float32; [B, 1, V] of the last token where no more was asked for.
        hidden: [B, T, D] by the numbers asked for, see ``Reader``.
    """

    logits_BTV: torch.Tensor
    hidden: Mapping[int, torch.Tensor]


def _growing_attention(device: torch.device) -> AbstractContextManager[None]:
    """No kernels of cuDNN: it plans for tens of milliseconds for each new length, and each pass has one."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return cast("AbstractContextManager[None]", sdpa_kernel(kinds))


class Reader:
    """B sequences of equal length at first, which may then keep different numbers of tokens.

    What is unread is cropped from layers that hold a slot for each token. Recurrent states are copied at
    ``mark`` and the tokens that stay are read again: for one row only, since no mask takes a token out of a
    state.

    Args:
        model: in evaluation mode, on its device.
        layers: hidden states that ``read`` returns: n for transformers' ``hidden_states[n]``, -1 for the
            last, which enters the head.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        self._model = model
        self._layers = tuple(layers)
        self._cache: Any = DynamicCache(config=model.config)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._slots = 0
        self._lengths_B = torch.zeros(0, dtype=torch.long)
        # Since ``mark``: the ids that were read, layers as they were then and what left windows, by number.
        self._marked = False
        self._since: list[torch.Tensor] = []
        self._before: dict[int, Any] = {}
        self._aside: dict[int, list[Any]] = {}

    @property
    def lengths_B(self) -> torch.Tensor:
        """How many tokens each row has read, on the CPU."""
        return self._lengths_B

    @property
    def cache_bytes(self) -> int:
        """What the cache's tensors hold: keys and values, or states."""
        return sum(
            value.nbytes
            for layer in self._cache.layers
            for value in vars(layer).values()
            if isinstance(value, torch.Tensor)
        )

    def read(self, ids_BT: torch.Tensor, *, last_only: bool = False) -> Reading:
        """Reads T more tokens of each row."""
        rows, tokens = ids_BT.shape
        if self._slots == 0:
            self._lengths_B = torch.zeros(rows, dtype=torch.long)
        if self._marked:
            if self._since:
                set_aside(self._cache, self._aside)
            self._since.append(ids_BT)
        with _growing_attention(ids_BT.device):
            found = self._model(
                ids_BT,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=int(last_only),
                output_hidden_states=bool(self._layers),
                **self._padding(tokens),
            )
        self._lengths_B = self._lengths_B + tokens
        self._slots += tokens
        return Reading(found.logits.float(), {n: found.hidden_states[n] for n in self._layers})

    def mark(self) -> None:
        """Remembers this moment: what is read from now on can be unread once.

        Raises:
            CheckpointError: several rows, and the model's cache holds more than a slot for each token.
        """
        others = [layer for layer in self._cache.layers if not holds_tokens(layer)]
        if others and len(self._lengths_B) > 1:
            raise CheckpointError(
                f"the model keeps a state ({type(others[0]).__name__}) from which no token can be taken, so "
                "sequences of one batch cannot keep different numbers of tokens",
                fix="measure at batch 1",
            )
        self._marked = True
        for number, layer in enumerate(self._cache.layers):
            if not can_forget(layer):
                self._before[number] = copy.deepcopy(layer)
            elif hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def unread(self, count_B: torch.Tensor) -> None:
        """Forgets the last tokens of each row, 0 to as many as were read since ``mark``; on the CPU."""
        fewest = int(count_B.min())
        put_back(self._cache, self._aside)
        since, before = self._since, self._before
        self._marked, self._since, self._before = False, [], {}
        if before and fewest:
            self._reread(fewest, torch.cat(since, dim=1), before)
            return
        more_B = count_B - fewest
        if bool(more_B.any()):
            move_right(self._cache, more_B)
        self._crop(fewest, before)
        self._lengths_B = self._lengths_B - count_B
        self._slots -= fewest
        self._slots -= (
            drop_left(self._cache, self._slots - int(self._lengths_B.max())) if len(count_B) > 1 else 0
        )

    def select(self, rows_R: torch.Tensor) -> None:
        """Goes on with these rows only, in this order."""
        rows_R = rows_R.cpu()
        self._cache.reorder_cache(rows_R)
        self._lengths_B = self._lengths_B[rows_R]

    def _padding(self, tokens: int) -> dict[str, torch.Tensor]:
        """Mask [B, slots] and positions [B, T]; none where every slot holds a token."""
        empty_B = self._slots - self._lengths_B
        if not bool(empty_B.any()):
            return {}
        mask_BS = torch.arange(self._slots + tokens)[None] >= empty_B[:, None]
        found = {"attention_mask": mask_BS.long().to(self._model.device)}
        if self._takes_positions:
            positions_BT = self._lengths_B[:, None] + torch.arange(tokens)[None]
            found["position_ids"] = positions_BT.to(self._model.device)
        return found

    def _crop(self, count: int, before: Mapping[int, Any]) -> None:
        # Of none, too: a layer with a window then lets go of what it kept to be able to forget.
        for number, layer in enumerate(self._cache.layers):
            if number not in before:
                layer.crop(-count)

    def _reread(self, count: int, ids_1T: torch.Tensor, before: Mapping[int, Any]) -> None:
        """Back to the mark, and forward again by all that was read since but the last ``count`` tokens."""
        tokens = ids_1T.shape[1]
        self._crop(tokens, before)
        for number, layer in before.items():
            self._cache.layers[number] = layer
        self._lengths_B = self._lengths_B - tokens
        self._slots -= tokens
        if tokens > count:
            self.read(ids_1T[:, : tokens - count], last_only=True)
            # As after a mark: windows hold what was read until they are told that nothing is to be forgotten.
            self._crop(0, before)


def check_unreading(model: PreTrainedModel, rows: int) -> None:
    """Refuses a model that does not read on rightly after it has unread tokens.

    Tried on a few tokens against passes without a cache: transformers 5.17's Jamba forgets its state where
    several tokens follow others, some models lack caches altogether, and no attribute says so for all.

    Raises:
        CheckpointError: with what failed.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (rows, _PROBE_TOKENS + _PROBE_TAIL), generator=generator)
    ids_BT = ids_BT.to(model.device)
    count_B = 1 + torch.arange(rows) % (_PROBE_TAIL - 1)
    try:
        with torch.inference_mode():
            reader = Reader(model)
            reader.read(ids_BT[:, :_PROBE_TOKENS], last_only=True)
            reader.mark()
            reader.read(ids_BT[:, _PROBE_TOKENS:])
            reader.unread(count_B)
            found_BTV = reader.read(ids_BT[:, :2]).logits_BTV
            whole = [
                torch.cat([ids_BT[row, : ids_BT.shape[1] - int(count)], ids_BT[row, :2]])
                for row, count in enumerate(count_B)
            ]
            wanted_BTV = torch.stack(
                [model(ids_T[None], use_cache=False).logits[0, -2:].float() for ids_T in whole]
            )
    except CheckpointError:
        raise
    except Exception as error:  # a model's own code raises what it likes
        raise CheckpointError(
            f"the model cannot read on through a cache: {str(error) or type(error).__name__}"
        ) from error
    far, norm = float(torch.dist(found_BTV, wanted_BTV)), float(wanted_BTV.norm())
    tolerance = _PROBE_TOLERANCE.get(model.dtype, _PROBE_TOLERANCE_16BIT)
    if not far <= tolerance * norm and not far <= min(
        # Where inputs have few bits, their rounding moves logits in plain decoding, too.
        _PROBE_NOISES * _noise(model, whole, wanted_BTV),
        _PROBE_MOST * norm,
    ):
        raise CheckpointError(
            "transformers' cache of this model does not give back what it held before tokens were taken from "
            "it, so proposals cannot be verified with it"
        )


@torch.inference_mode()
def _noise(model: PreTrainedModel, texts: Sequence[torch.Tensor], wanted_BTV: torch.Tensor) -> float:
    """How far logits of each text's last two tokens are from passes without a cache: read one by one."""
    made = []
    for ids_T in texts:
        reader = Reader(model)
        reader.read(ids_T[None, :_PROBE_TOKENS], last_only=True)
        last = [reader.read(ids_1[None]).logits_BTV[0, 0] for ids_1 in torch.split(ids_T[_PROBE_TOKENS:], 1)]
        made.append(torch.stack(last[-2:]))
    return float(torch.dist(torch.stack(made), wanted_BTV))
