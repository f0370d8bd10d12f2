"""Random weights with the tensor names and shapes of Llama-4-Scout: a model larger than memory, soon made.

    python -m scripts.benchmarks.scout FOLDER --layers 2
    python -m scripts.benchmarks.scout FOLDER --gigabytes 40

Names and shapes are those of ``recipes/configs/llama-4-scout``, with fewer decoder layers; embeddings, head
and vision tower are whole. The tokenizer is that of bytes, so that the model can be calibrated. One block of
random numbers is repeated, each time rotated and scaled anew: no two experts are equal.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.safetensors_writer import ShardWriter, shard_names, write_index
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

HEADERS = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "llama-4-scout"
MAX_SHARD_BYTES = 5_000_000_000
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")
# Elements of the block that is repeated; prime, so that rows of no matrix repeat one another.
_BLOCK = 33_554_393
_SPREAD = 0.02


def scout_headers(layers: int) -> list[TensorHeader]:
    """Every tensor of Scout with its first ``layers`` decoder layers only."""
    listing = json.loads((HEADERS / "tensors.json").read_text())["tensors"]
    headers = [TensorHeader(name, dtype, tuple(shape)) for name, dtype, shape in listing]
    return [
        header for header in headers if (found := _LAYER.match(header.name)) is None or int(found[1]) < layers
    ]


def layers_for(gigabytes: float) -> int:
    """The fewest decoder layers that make the checkpoint so large."""
    one, two = (sum(header.nbytes for header in scout_headers(layers)) for layers in (1, 2))
    return 1 + max(0, ceil((gigabytes * 1e9 - one) / (two - one)))


def write_scout(folder: Path, layers: int) -> None:
    """Writes Scout with so many decoder layers; the same bytes for the same ``layers``."""
    config: dict[str, Any] = json.loads((HEADERS / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    write_random(folder, scout_headers(layers), config)


def write_random(folder: Path, headers: Sequence[TensorHeader], config: dict[str, Any]) -> None:
    """Writes a checkpoint of random bf16 weights with a tokenizer of bytes; memory: its largest tensor."""
    import torch

    from tests.tiny import write_byte_tokenizer

    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shards = _packed(headers)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator).mul_(_SPREAD).bfloat16()
    names = shard_names(len(shards))
    for name, held in zip(names, shards, strict=True):
        with ShardWriter(building / name, held) as writer:
            for header in held:
                writer.write(header.name, _tensor(header, block, generator))
    listed = {name: [header.name for header in held] for name, held in zip(names, shards, strict=True)}
    write_index(building, listed, sum(header.nbytes for header in headers))
    (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_byte_tokenizer(building)
    building.rename(folder)


def _packed(headers: Sequence[TensorHeader]) -> list[list[TensorHeader]]:
    """In order, as many in a shard as it may hold."""
    shards: list[list[TensorHeader]] = [[]]
    for header in headers:
        if sum(held.nbytes for held in shards[-1]) + header.nbytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(header)
    return shards


def _tensor(header: TensorHeader, block: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms are ones; others pieces of the block, each from another place and with another spread."""
    import torch

    if len(header.shape) == 1 and "norm" in header.name and header.name.endswith(".weight"):
        return torch.ones(header.shape, dtype=torch.bfloat16)
    flat = torch.empty(prod(header.shape), dtype=torch.bfloat16)
    for start in range(0, len(flat), _BLOCK):
        piece = flat[start : start + _BLOCK]
        shift = int(torch.randint(_BLOCK, (), generator=generator))
        scale = 0.5 + float(torch.rand((), generator=generator))
        first = min(len(piece), _BLOCK - shift)
        torch.mul(block[shift : shift + first], scale, out=piece[:first])
        torch.mul(block[: len(piece) - first], scale, out=piece[first:])
    return flat.view(header.shape)


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--layers", type=int, help="decoder layers, of 4.4 GB each")
    size.add_argument("--gigabytes", type=float, help="at least so many, with whole layers")
    options = parser.parse_args(words)
    layers = options.layers or layers_for(options.gigabytes)
    write_scout(options.folder, layers)
    size_bytes = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {layers} layers, {size_bytes / 1e9:.1f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
