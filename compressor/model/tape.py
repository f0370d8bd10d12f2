"""The decoder replayed block by block: recorded calls, real weights of one block at a time.

The model runs once with stubs in the place of its blocks (``stubs.py``); a block is then loaded, called with
the recorded arguments and the hidden states of the block before it, and let go. In float32 the result is
bit-equal to the ordinary forward pass of transformers on the same device.

Legend: B sequences, T tokens, N = B * T at most, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.model.blocks import Block, Site, site_name, sites_of
from compressor.model.decoder import Decoder
from compressor.model.hidden import HiddenStates
from compressor.model.listen import Ear, listen
from compressor.model.outside import Outside, as_parameter
from compressor.model.stubs import Call

# Site, the rows [N, I] that reach it, and for an expert their positions in the flattened batch [B * T], else
# None. The rows lie in the block's own memory: clone what is kept.
Hear = Callable[[Site, torch.Tensor, torch.Tensor | None], None]


def check_walkable(source: Source) -> dict[str, str]:
    """Refuses, from the headers alone, a source that cannot be walked block by block.

    Returns:
        source tensor -> reason, for matrices in blocks that can be replayed but whose input cannot be heard.

    Raises:
        CheckpointError: transformers does not know the model, a parameter has no tensor or another shape, no
            repeated blocks are found, or they pass more than hidden states to one another.
    """
    return dict(Decoder.of(source).unheard)


class Tape:
    """A recorded model.

    Attributes:
        blocks: module paths of the blocks, in order.
        unheard: source tensor -> why the input of its matrices cannot be heard (see ``check_walkable``).
    """

    def __init__(
        self, decoder: Decoder, calls: list[list[Call]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blocks = decoder.blocks
        self.unheard = dict(decoder.unheard)
        self._decoder = decoder
        self._calls = calls
        self._dtype = dtype
        self._device = device
        self._outside = Outside(decoder.tensors.model, device)
        self._head_open = False

    @classmethod
    def record(
        cls,
        source: Source,
        batches: Sequence[torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        states: HiddenStates,
    ) -> Tape:
        """Runs what lies before the blocks; ``states`` then holds each batch's input of the first block.

        Args:
            source: the checkpoint; only the embedding and what else comes before the blocks is read.
            batches: token ids, int64 [B, T] each, without padding.
            dtype: of the parameters, as ``load.set_dtype`` casts them; buffers keep theirs.
            device: that computes.
            states: filled by this.

        Raises:
            CheckpointError: as ``check_walkable``, or a tensor cannot be read.
        """
        decoder = Decoder.of(source)
        decoder.tensors.model.config.dtype = dtype
        tape = cls(decoder, [], dtype, device)
        tape._outside.open(tape._make, head=False)
        try:
            for batch, ids_BT in enumerate(batches):
                calls, hidden = decoder.recorder.record(ids_BT.to(device))
                tape._calls.append(calls)
                states.put(batch, hidden)
        finally:
            tape._outside.close()
        return tape

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded arguments (masks, rotary tables) on the device, shared ones counted once."""
        return self._decoder.recorder.kept_bytes

    def tensors(self, index: int) -> tuple[str, ...]:
        """The names of the source tensors of a block, sorted."""
        module, path = self._decoder.modules[index], self.blocks[index]
        return self._decoder.tensors.sources(f"{path}.{name}" for name in module.state_dict())

    def steps(self, index: int) -> tuple[tuple[Site, ...], ...]:
        """The steps of a block that is not loaded; see ``Block.steps``."""
        return sites_of(self.blocks[index], self._decoder.layouts[index], self._decoder.places[index])

    def load(self, index: int) -> Block:
        """A block with its real weights on the device; may run in another thread than ``run``.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        path = self.blocks[index]
        module = self._decoder.copy_of(index)
        targets: dict[str, torch.Tensor] = {}
        for name, inner in module.named_modules():
            for leaf, tensor in [*inner._parameters.items(), *inner._buffers.items()]:
                if tensor is None:
                    continue
                made = self._empty(tensor) if tensor.is_meta else tensor.to(self._device)
                if leaf in inner._buffers:
                    inner._buffers[leaf] = made
                else:
                    inner._parameters[leaf] = as_parameter(made)
                if tensor.is_meta:
                    targets[".".join(part for part in (path, name, leaf) if part)] = made
        self._decoder.tensors.fill(self._decoder.source, targets)
        places = {place.part.module: place for place in self._decoder.places[index]}
        return Block(path, index, module, self._decoder.layouts[index], self.steps(index), places)

    def run(
        self,
        block: Block,
        states: HiddenStates,
        batch: int,
        *,
        hear: Hear | None = None,
        until: int | None = None,
    ) -> torch.Tensor | None:
        """The block's output [B, T, H] for one batch of ``states``, which it leaves as they are.

        Args:
            block: from ``load``.
            states: holds the block's input.
            batch: which of the recorded ones.
            hear: told the input of every site, before it is multiplied; experts without tokens are left out.
            until: stop as soon as this step was heard, with None for the output.

        Raises:
            CheckpointError: a site is passed by.
        """
        call = self._calls[batch][block.index]
        with torch.no_grad():
            hidden = states.get(batch)
            assert until is None or hear is not None, "nothing is heard"
            if hear is None and not block.rounding:
                return call.replay(block.module, hidden)
            sites = {site.name: site for step in block.steps for site in step}

            def heard(
                ear: Ear, expert: int | None, x_NI: torch.Tensor, tokens_N: torch.Tensor | None
            ) -> None:
                if hear is None:
                    return
                name = (
                    f"{block.path}.{ear.owners[0]}" if expert is None else site_name(block.path, ear, expert)
                )
                hear(sites[name], x_NI, tokens_N)

            return listen(block.module, call, hidden, block.layout, heard, until, block.rounding)

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, vocabulary] of the last block's output; the head stays loaded until ``close``.

        Raises:
            CheckpointError: the model does not let its head run alone.
        """
        if not self._head_open:
            self._outside.open(self._make, head=True)
            self._head_open = True
        return self._decoder.recorder.finish(hidden.to(self._device))

    def close(self) -> None:
        """Frees the head that ``finish`` loaded."""
        self._outside.close()
        self._head_open = False

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a parameter in the tape's dtype, or for a stored buffer in its own."""
        cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=self._dtype if cast else tensor.dtype, device=self._device)

    def _make(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = self._empty(tensor)
        self._decoder.tensors.fill(self._decoder.source, {name: made})
        return made
