"""What is heard of keys, values and queries in one pass of the calibration tokens, layer by layer.

A finished layer has a file; a killed pass goes on at the first block without one. All sums are of fp32
products, added up in fp64 in the order of the batches.

Legend: B sequences, T tokens, N rows, Q query heads, H KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.errors import CheckpointError
from compressor.progress import Progress

if TYPE_CHECKING:
    import torch

    from compressor.model.attention_heard import HeardAttention
    from compressor.model.tape import Tape
    from compressor.stages.streams import Streams
    from compressor.stages.walk import WalkSpec


@dataclass
class LayerHeard:
    """What one layer's attention was given.

    Attributes:
        key_HDD: fp64, sums of products of keys, after rotary positions.
        query_HDD: the same of the queries that read each KV head.
        key_HD: fp64, the largest magnitude of each coordinate.
        value_HD: the same of the values.
        rotated_HD: the same of the values once a Hadamard matrix over its root has rotated them; where D is
            no power of two, of the values.
    """

    key_HDD: torch.Tensor
    query_HDD: torch.Tensor
    key_HD: torch.Tensor
    value_HD: torch.Tensor
    rotated_HD: torch.Tensor

    @classmethod
    def nothing(cls, kv_heads: int, head_dim: int) -> LayerHeard:
        """Before anything was heard."""
        import torch

        square = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64)
        row = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        return cls(square, square.clone(), row, row.clone(), row.clone())

    def add(self, heard: HeardAttention) -> None:
        """Adds one call."""
        import torch

        from compressor.numerics.hadamard import fast_hadamard, is_power_of_two

        key, value = heard.key_BHTD.float(), heard.value_BHTD.float()
        kv_heads, head_dim = key.shape[1], key.shape[-1]
        self.key_HDD += _moments(key.transpose(0, 1).reshape(kv_heads, -1, head_dim))
        # Runs of query heads read the same KV head.
        query = heard.query_BQTD.float().transpose(0, 1)
        self.query_HDD += _moments(query.reshape(kv_heads, -1, head_dim))
        rotated = fast_hadamard(value) * head_dim**-0.5 if is_power_of_two(head_dim) else value
        for peak, x in ((self.key_HD, key), (self.value_HD, value), (self.rotated_HD, rotated)):
            torch.maximum(peak, x.abs().amax(dim=(0, 2)).double().cpu(), out=peak)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def hear_layers(
    source: Source,
    ids_NT: torch.Tensor,
    layers: Collection[int],
    spec: WalkSpec,
    folder: Path,
    progress: Progress,
) -> dict[int, LayerHeard]:
    """Layer -> what its attention was given, for some layers.

    Args:
        source: the checkpoint.
        ids_NT: int64, one full calibration sequence a row.
        layers: their indices; blocks behind the last of them are not computed.
        spec: how to compute.
        folder: of the stage.
        progress: told of every block.

    Raises:
        CheckpointError: the model cannot be walked, or the attention of a layer cannot be heard.
        UserError: the disk is full.
    """
    import torch

    from compressor.device import pick_device
    from compressor.model.tape import Tape
    from compressor.stages.streams import Streams

    blocks = max(layers) + 1
    finished = {index for index in range(blocks) if _path(folder, index).is_file() or index not in layers}
    first = next((index for index in range(blocks) if index in layers and index not in finished), blocks)
    progress.start("keys and values", blocks, "items", done=first)
    if first < blocks:
        with torch.no_grad():
            streams = Streams(folder, spec.states, pick_device(), feeding=False)
            batches = torch.split(ids_NT, max(1, spec.batch_tokens // ids_NT.shape[1]))
            dtype = getattr(torch, spec.dtype)
            tape = Tape.record(source, batches, dtype=dtype, device=streams.device, states=streams.exact)
            for index in range(streams.begin(len(batches), first), blocks):
                _hear_block(tape, index, streams, folder, needed=index in layers)
                streams.keep(index + 1)
                progress.advance(1, f"block {index}")
            streams.discard()
    progress.finish(resumed=first == blocks)
    return {index: _read(_path(folder, index)) for index in sorted(layers)}


def _hear_block(tape: Tape, index: int, streams: Streams, folder: Path, *, needed: bool) -> None:
    """Passes every batch through a block, and leaves a file of what was heard."""
    from compressor.model.attention_heard import heard_attention

    found: list[LayerHeard] = []

    def hear(heard: HeardAttention) -> None:
        if not found:
            found.append(LayerHeard.nothing(heard.key_BHTD.shape[1], heard.key_BHTD.shape[-1]))
        found[0].add(heard)

    block = tape.place(tape.load(index))
    with heard_attention(block.module, hear):
        for batch in range(len(streams)):
            passed = tape.run(block, streams.exact, batch)
            assert passed is not None, "nothing stops the pass"
            streams.exact.put(batch, passed)
    if needed:
        if not found:
            raise CheckpointError(f"no attention was heard in block {index}", where=tape.blocks[index])
        write_tensors(_path(folder, index), found[0].tensors())


def _path(folder: Path, index: int) -> Path:
    return folder / f"heard-{index:05d}.safetensors"


def _read(path: Path) -> LayerHeard:
    file = read_header(path)
    return LayerHeard(
        **{name: read_tensor(path, header, file.offsets[name]) for name, header in file.headers.items()}
    )


def _moments(x_HND: torch.Tensor) -> torch.Tensor:
    """fp64 [H, D, D] on the CPU."""
    moments: torch.Tensor = (x_HND.transpose(1, 2) @ x_HND).double().cpu()
    return moments
