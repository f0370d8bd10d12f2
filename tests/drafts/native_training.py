"""Models with prediction layers that have learned something, in seconds.

The texts are walks over the letters: the next one is told by the last but for one time in eight. Of these a
model and its prediction layer learn in seconds what can be known, and guess the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.folder import FolderSource
from compressor.drafts.base import LAST, Rows
from compressor.drafts.native import NativeHead
from compressor.drafts.native_table import prediction_names
from compressor.model.load import load_source_model, set_dtype
from tests.model.published import NARROW, PUBLISHED, Widths

STEPS, ROWS, TOKENS, LETTERS = 3, 8, 32, 26


def walks(rows: int, seed: int) -> torch.Tensor:
    """int64 [rows, TOKENS]: ids of letters."""
    generator = torch.Generator().manual_seed(seed)
    following = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(99))
    ids = torch.randint(LETTERS, (rows, TOKENS), generator=generator)
    known = torch.rand(rows, TOKENS, generator=generator) < 0.875
    for place in range(1, TOKENS):
        ids[:, place] = torch.where(known[:, place], following[ids[:, place - 1]], ids[:, place])
    return ids + ord("a")


def rows_of(target: Any, ids_BT: torch.Tensor) -> Rows:
    """What the target makes of them."""
    with torch.no_grad():
        hidden_BTD = target.get_decoder()(input_ids=ids_BT, use_cache=False)[0]
    return Rows(ids_BT, {LAST: hidden_BTD}, torch.ones_like(ids_BT, dtype=torch.bool))


def descend(
    parameters: list[torch.nn.Parameter], steps: int, rate: float, loss: Callable[[int], Any]
) -> None:
    """AdamW, its rate falling to nothing."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def train(head: NativeHead, target: Any, steps: int, rate: float) -> None:
    """By the head's own loss on what the target makes of new rows."""

    def loss(step: int) -> torch.Tensor:
        found = head.unroll(rows_of(target, walks(ROWS, step)), STEPS)
        return found.loss / found.places

    descend(list(head.trained.values()), steps, rate, loss)


def learned(name: str, folder: Path, widths: Widths = NARROW) -> Path:
    """A published family's tiny model that knows the walks, its prediction layer still random."""
    PUBLISHED[name](folder, widths)
    source = FolderSource(folder)
    carried = {one: source.read(one) for one in prediction_names(source.headers, source.config)}
    target: Any = load_source_model(source, torch.float32)

    def loss(step: int) -> torch.Tensor:
        ids_BT = walks(ROWS, 1000 + step)
        found: torch.Tensor = target(ids_BT, labels=ids_BT, use_cache=False).loss
        return found

    descend(list(target.parameters()), 100, 6e-3 * NARROW.hidden / widths.hidden, loss)
    config = (folder / "config.json").read_text()
    set_dtype(target, torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors") | carried
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads(config)))
    return folder
