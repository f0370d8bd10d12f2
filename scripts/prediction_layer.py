"""Gives a Qwen3-Next checkpoint without a prediction layer one, and measures it before and after W4A4.

``prediction_layer.py MODEL WORK [--steps N] [--aligned N]``: trains ``mtp.*`` on the calibration texts, from
the last block of full attention on; writes ``WORK/model`` with the layer in it; compresses that to NVFP4
weights and activations; measures the layer on the model, on its quantized self, and there once more when it
has been trained on for ``--aligned`` steps. Prints a line of JSON for each: what greedy decoding would accept
at held-out places, by position.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.drafts.base import LAST, Rows
from compressor.drafts.native import NativeHead
from compressor.drafts.native_layer import PredictionLayer
from compressor.model.load import load_checkpoint_model, load_source_model, load_tokenizer

TEXTS = Path(__file__).parents[1] / "calibration"
TOKENS, BATCH, STEPS, SEED = 256, 4, 3, 0
HELD_OUT_ROWS, TRAINED_ROWS = 24, 160


def with_layer(model: Path, folder: Path) -> None:
    """Copies the checkpoint with ``mtp.*`` made from its last block of full attention."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    last = max(index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention")
    tensors = load_file(folder / "model.safetensors")
    block, width = f"model.layers.{last}.", config["hidden_size"]
    made = {
        name.replace(block, "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(block)
    }
    made["mtp.norm.weight"] = tensors["model.norm.weight"].clone()
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden"):  # these store their weight less one
        made[f"mtp.{norm}.weight"] = torch.zeros(width, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED)
    embedding = 0.02 * torch.randn(width, width, generator=generator)
    made["mtp.fc.weight"] = torch.cat([embedding, torch.eye(width)], dim=1).bfloat16()
    save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def rows_of(tokenizer: Any, names: list[str], count: int) -> torch.Tensor:
    """int64 [count, TOKENS] of texts put end to end, from all files alike."""
    found = []
    for name in names:
        texts = [json.loads(line) for line in (TEXTS / name).read_text().splitlines()]
        text = "\n".join(text_of(one) for one in texts)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        share = -(-count // len(names))
        found.append(ids[: share * TOKENS][: len(ids) // TOKENS * TOKENS].view(-1, TOKENS))
    return torch.cat(found)[:count]


def text_of(record: dict[str, Any]) -> str:
    """A line's text, or a chat's messages."""
    if "messages" in record:
        return "\n".join(str(message["content"]) for message in record["messages"])
    return str(record["text"])


def states(target: Any, ids_NT: torch.Tensor) -> torch.Tensor:
    """[N, T, D] that the target's head reads."""
    with torch.no_grad():
        read = [target.get_decoder()(input_ids=batch, use_cache=False)[0] for batch in ids_NT.split(8)]
    return torch.cat(read)


def batches(ids_NT: torch.Tensor, states_NTD: torch.Tensor) -> Iterator[Rows]:
    """All rows in order."""
    for ids_BT, states_BTD in zip(ids_NT.split(BATCH), states_NTD.split(BATCH), strict=True):
        yield Rows(ids_BT, {LAST: states_BTD}, torch.ones_like(ids_BT, dtype=torch.bool))


def measured(head: NativeHead, ids_NT: torch.Tensor, states_NTD: torch.Tensor) -> dict[str, Any]:
    """Accepted by position, and tokens a pass."""
    with torch.no_grad():
        found = [head.unroll(rows, STEPS) for rows in batches(ids_NT, states_NTD)]
    places = sum(one.places for one in found)
    accepted = [float(sum(one.accepted_K[step] for one in found)) / places for step in range(STEPS)]
    return {"accepted": [round(rate, 4) for rate in accepted], "length": round(1 + sum(accepted), 4)}


def train(head: NativeHead, ids_NT: torch.Tensor, states_NTD: torch.Tensor, steps: int, rate: float) -> None:
    """AdamW with a warm-up of a twentieth and a linear way down."""
    parameters = list(head.trained.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95))
    all_rows = list(batches(ids_NT, states_NTD))
    order = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / steps)
        found = head.unroll(all_rows[int(torch.randint(len(all_rows), (), generator=order))], STEPS)
        optimizer.zero_grad()
        (found.loss / found.places).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--aligned", type=int, default=60)
    given = parser.parse_args()
    folder, result = given.work / "model", given.work / "result"
    with_layer(given.model, folder)
    source = FolderSource(folder)
    tokenizer = load_tokenizer(source)
    shown_NT = rows_of(tokenizer, ["prose.jsonl", "code.jsonl", "chat.jsonl"], TRAINED_ROWS)
    held_NT = rows_of(tokenizer, ["heldout.jsonl"], HELD_OUT_ROWS)

    target = load_source_model(source, torch.float32).requires_grad_(False)
    head = NativeHead(PredictionLayer(source, target))
    held_NTD = states(target, held_NT)
    print(json.dumps({"what": "untrained, on the model"} | measured(head, held_NT, held_NTD)), flush=True)
    train(head, shown_NT, states(target, shown_NT), given.steps, 1e-3)
    print(json.dumps({"what": "trained, on the model"} | measured(head, held_NT, held_NTD)), flush=True)
    head.write(folder, STEPS)

    recipe = given.work / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(folder))}}}\nweights: {{scheme: nvfp4}}\nevaluate: null\n"
        "calibration: {num_samples: 16, sequence_length: 256}\n"
    )
    compressor.run(recipe, output=result)
    quantized = load_checkpoint_model(result, torch.float32).model.requires_grad_(False)
    head = NativeHead(PredictionLayer(DequantizedSource(FolderSource(result, quantized=True)), quantized))
    held_NTD = states(quantized, held_NT)
    print(json.dumps({"what": "carried, on W4A4"} | measured(head, held_NT, held_NTD)), flush=True)
    train(head, shown_NT, states(quantized, shown_NT), given.aligned, 2e-4)
    print(json.dumps({"what": "re-aligned, on W4A4"} | measured(head, held_NT, held_NTD)), flush=True)
    head.write(result, STEPS)


if __name__ == "__main__":
    main()
