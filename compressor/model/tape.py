"""The decoder replayed block by block: recorded calls, real weights of one block at a time.

The model runs once with stubs in the place of its blocks (``stubs.py``); a block is then loaded, called with
the recorded arguments and the hidden states of the block before it, and let go. In float32 the result is
bit-equal to the ordinary forward pass of transformers on the same device.

Legend: B sequences, T tokens, N = B * T at most, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.model.blocks import Block, Place, Site, site_name, sites_of
from compressor.model.decoder import Decoder
from compressor.model.hidden import HiddenStates
from compressor.model.listen import Ear, Ears, Heard, listen
from compressor.model.names import extract
from compressor.model.outside import Outside, as_parameter
from compressor.model.paused import PausedPasses
from compressor.model.routed import Share, is_expert_owner, phase_of
from compressor.model.stored_experts import ReadExpert, StoredExperts
from compressor.model.stubs import Call

# Site, the rows [N, I] that reach it, and for an expert what else is known of its share, else None. The rows
# lie in the block's own memory: clone what is kept.
Hear = Callable[[Site, torch.Tensor, Share | None], None]


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

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device, *, images: bool) -> None:
        self.blocks = decoder.blocks
        self.unheard = dict(decoder.unheard)
        self._decoder = decoder
        self._calls: list[list[Call]] = []
        self._dtype = dtype
        self._device = device
        self._outside = Outside(decoder.tensors.model, device, towers=images)
        self._head_open = False
        self._small: tuple[list[Call], torch.Tensor] | None = None

    @classmethod
    def record(
        cls,
        source: Source,
        batches: Sequence[torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        states: HiddenStates,
        small: torch.Tensor | None = None,
        prompts: Sequence[Mapping[str, torch.Tensor]] = (),
    ) -> Tape:
        """Runs what lies before the blocks; ``states`` then holds each batch's input of the first block.

        Args:
            source: the checkpoint; only the embedding and what else comes before the blocks is read.
            batches: token ids, int64 [B, T] each, without padding.
            dtype: of the parameters, as ``load.set_dtype`` casts them; buffers keep theirs.
            device: that computes.
            states: filled by this.
            small: ids of a few tokens, for ``rehearse``; they pass no block otherwise.
            prompts: batches of one row each with images, behind the others: what the source's processor
                makes of them, ``input_ids`` [1, T] and the rest as the model takes it.

        Raises:
            CheckpointError: as ``check_walkable``, or a tensor cannot be read.
        """
        decoder = Decoder.of(source, images=bool(prompts))
        decoder.tensors.model.config.dtype = dtype
        tape = cls(decoder, dtype, device, images=bool(prompts))
        tape._outside.open(tape._make, head=False)
        try:
            for batch, ids_BT in enumerate(batches):
                calls, hidden = decoder.recorder.record(ids_BT.to(device))
                tape._calls.append(calls)
                states.put(batch, hidden)
            for batch, prompt in enumerate(prompts, len(batches)):
                given = {name: _cast(tensor, dtype).to(device) for name, tensor in prompt.items()}
                calls, hidden = decoder.recorder.record(given.pop("input_ids"), given)
                tape._calls.append(calls)
                states.put(batch, hidden)
            if small is not None:
                tape._small = decoder.recorder.record(small.to(device))
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

    def load(self, index: int, *, stored_experts: bool = False) -> Block:
        """A block with its real weights, in host memory until ``place``; may run in a thread beside ``run``.

        ``stored_experts``: but for those of experts, which are read whenever they are computed with. Such a
        block has no twin, and none of its matrices can be replaced.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        path = self.blocks[index]
        module = self._decoder.copy_of(index)
        readers = self._expert_readers(module, path) if stored_experts else {}
        targets: dict[str, torch.Tensor] = {}
        for name, inner in module.named_modules():
            for leaf, tensor in [*inner._parameters.items(), *inner._buffers.items()]:
                if tensor is None:
                    continue
                made = self._empty(tensor, waiting=True) if tensor.is_meta else tensor
                if leaf in inner._buffers:
                    inner._buffers[leaf] = made
                else:
                    inner._parameters[leaf] = as_parameter(made)
                if tensor.is_meta:
                    targets[".".join(part for part in (path, name, leaf) if part)] = made
        self._decoder.tensors.fill(self._decoder.source, targets)
        for owner, read in readers.items():
            parent, _, name = owner.rpartition(".")
            stored = StoredExperts(module.get_submodule(owner), read)
            module.get_submodule(parent).register_module(name, stored)
        places = {place.part.module: place for place in self._decoder.places[index]}
        layout, steps = self._decoder.layouts[index], self.steps(index)
        return Block(path, index, module, layout, steps, places, dict.fromkeys(readers, self._read_matrix))

    def _expert_readers(self, module: nn.Module, path: str) -> dict[str, ReadExpert]:
        """Module of experts -> what reads entries of its parameters, which are taken from it."""
        tensors, readers = self._decoder.tensors, {}
        for owner, experts in module.named_modules():
            if is_expert_owner(experts):
                leaves = [leaf for leaf in experts._parameters if phase_of(experts, leaf) is not None]
                if all(tensors.has_entries(f"{path}.{owner}.{leaf}") for leaf in leaves):
                    readers[owner] = self._expert_reader(experts, f"{path}.{owner}", leaves)
        return readers

    def _expert_reader(self, experts: nn.Module, path: str, leaves: Sequence[str]) -> ReadExpert:
        """What reads the entries of some parameters of a module, which gives these up."""
        shapes = {leaf: experts.get_parameter(leaf).shape[1:] for leaf in leaves}
        for leaf in leaves:
            experts._parameters[leaf] = None

        def read(leaf: str, expert: int) -> torch.Tensor:
            made = torch.empty(shapes[leaf], dtype=self._dtype, device=self._device)
            self._decoder.tensors.fill_entry(self._decoder.source, f"{path}.{leaf}", expert, made)
            return made

        return read

    def _read_matrix(self, place: Place) -> torch.Tensor:
        """A matrix of an expert that is stored."""
        tensor = self._decoder.source.read(place.piece.tensor, place.part.expert)
        return extract(tensor, place.part).to(self._device, self._dtype)

    def place(self, block: Block) -> Block:
        """The same block, brought to the device that computes."""
        for inner in block.module.modules():
            for name, parameter in inner._parameters.items():
                if parameter is not None and parameter.device != self._device:
                    moved = parameter.detach().to(self._device, non_blocking=True)
                    inner._parameters[name] = as_parameter(moved)
            for name, buffer in inner._buffers.items():
                if buffer is not None:
                    inner._buffers[name] = buffer.to(self._device, non_blocking=True)
        return block

    def run(
        self,
        block: Block,
        states: HiddenStates,
        batch: int,
        *,
        hear: Hear | None = None,
        until: int | None = None,
        gradients: bool = False,
    ) -> torch.Tensor | None:
        """The block's output [B, T, H] for one batch of ``states``, which it leaves as they are.

        Args:
            block: from ``load``.
            states: holds the block's input.
            batch: which of the recorded ones.
            hear: told the input of every site, before it is multiplied; of experts without tokens no rows.
            until: stop as soon as this step was heard, with None for the output.
            gradients: whether the output leads back to the block's parameters.

        Raises:
            CheckpointError: a site is passed by.
        """
        call = self._calls[batch][block.index]
        with torch.set_grad_enabled(gradients):
            hidden = states.get(batch)
            assert until is None or hear is not None, "nothing is heard"
            if hear is None and not block.rounding:
                return call.replay(block.module, hidden)
            heard = _by_site(block, hear)
            return listen(block.module, call, hidden, block.layout, heard, until, block.rounding)

    def back(self, block: Block, states: HiddenStates, batch: int, gradient: torch.Tensor) -> torch.Tensor:
        """What a gradient [B, T, H] at the block's output becomes at its input, for a batch of ``states``."""
        hidden = states.get(batch).detach().requires_grad_()
        with torch.enable_grad():
            output = self._calls[batch][block.index].replay(block.module, hidden)
            (found,) = torch.autograd.grad(output, hidden, gradient)
        return found

    @property
    def small_hidden(self) -> torch.Tensor:
        """[B, T, H]: the hidden states of the few tokens that were recorded for ``rehearse``."""
        assert self._small is not None, "the tape was recorded without them"
        return self._small[1]

    def rehearse(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states of the shape of ``small_hidden``."""
        assert self._small is not None, "the tape was recorded without them"
        with torch.no_grad():
            return self._small[0][block.index].replay(block.module, hidden)

    def tensor_of(self, parameter: str) -> str | None:
        """The source tensor that a parameter, by its full name, is; None where it is made of several."""
        pieces = self._decoder.tensors.pieces.get(parameter, ())
        whole = len(pieces) == 1 and pieces[0].expert is None and not pieces[0].start
        return pieces[0].tensor if whole else None

    def paused(self, block: Block, states: HiddenStates) -> PausedPasses[Hear]:
        """Passes of the batches of ``states``, which stay as they are, that wait at each step."""
        return PausedPasses(
            Ears(block.module, block.layout, block.rounding),
            block.layout,
            lambda batch: self._calls[batch][block.index].replay(block.module, states.get(batch)),
            lambda hear: _by_site(block, hear),
        )

    def finish(self, hidden: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """The logits [B, T, vocabulary] of the last block's output; the head stays loaded until ``close``.

        ``gradients``: whether they lead back to ``hidden``.

        Raises:
            CheckpointError: the model does not let its head run alone.
        """
        if not self._head_open:
            self._outside.open(self._make, head=True)
            self._head_open = True
        return self._decoder.recorder.finish(hidden.to(self._device), gradients=gradients)

    def close(self) -> None:
        """Frees the head that ``finish`` loaded."""
        self._outside.close()
        self._head_open = False

    def _empty(self, tensor: torch.Tensor, *, waiting: bool = False) -> torch.Tensor:
        """Memory for a parameter in the tape's dtype, or for a stored buffer in its own.

        ``waiting``: of the host, from where the device takes it fast.
        """
        cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        dtype = self._dtype if cast else tensor.dtype
        if waiting and self._device.type != "cpu":
            return torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
        return torch.empty(tensor.shape, dtype=dtype, device=self._device)

    def _make(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = self._empty(tensor)
        self._decoder.tensors.fill(self._decoder.source, {name: made})
        return made


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pixels in the model's dtype; ids and sizes as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _by_site(block: Block, hear: Hear | None) -> Heard:
    """What is told of ears told of sites."""
    sites = {site.name: site for step in block.steps for site in step}

    def heard(ear: Ear, expert: int | None, x_NI: torch.Tensor, share: Share | None) -> None:
        if hear is None:
            return
        name = f"{block.path}.{ear.owners[0]}" if expert is None else site_name(block.path, ear, expert)
        hear(sites[name], x_NI, share)

    return heard
