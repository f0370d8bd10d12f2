"""A package with a model that transformers does not know, written into a folder, and a checkpoint of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import write_byte_tokenizer

PACKAGE = "memory_models_of_a_test"
FACTORY = f"{PACKAGE}.models:MemoryModel"
ARGUMENTS = {"num_tokens": 256, "dim": 32, "depth": 3}
# Blocks with a learned memory that all tokens read; a decay that is computed, and not stored; tied ends.
_CODE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_keys = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.memories = nn.Parameter(torch.zeros(4, dim))
        self.register_buffer("decay", torch.linspace(0.5, 1.0, dim), persistent=False)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x):
        keys, gates = self.to_keys(self.norm(x)).chunk(2, dim=-1)
        read = torch.softmax(keys @ self.memories.T, dim=-1) @ self.memories
        total = torch.cumsum(read * self.decay, dim=1)
        return x + self.scale * self.to_out(total * torch.sigmoid(gates))


class MemoryModel(nn.Module):
    def __init__(self, num_tokens, dim, depth):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)
        self.to_logits.weight = self.token_emb.weight

    def forward(self, ids):
        x = self.token_emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.norm(x))


def no_module(**given):
    return given
"""


def write_package(folder: Path) -> Path:
    """Writes the package; the folder is to be put on the path."""
    (folder / PACKAGE).mkdir(parents=True)
    (folder / PACKAGE / "__init__.py").write_text("")
    (folder / PACKAGE / "models.py").write_text(_CODE)
    return folder


def make(**arguments: Any) -> Any:
    """The module, made by the package, which must be on the path."""
    return importlib.import_module(f"{PACKAGE}.models").MemoryModel(**(arguments or ARGUMENTS))


def forget_package() -> None:
    """Unloads it, so that the next test imports its own."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def write_checkpoint(folder: Path) -> Path:
    """A random model in bfloat16 as safetensors and config.json, with a byte tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(tensor.shape, generator=generator) * 0.3).bfloat16()
        for name, tensor in make().state_dict().items()
        if name != "to_logits.weight"
    }
    tensors["blocks.1.scale"] = torch.tensor(0.25)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ARGUMENTS))
    write_byte_tokenizer(folder)
    return folder
