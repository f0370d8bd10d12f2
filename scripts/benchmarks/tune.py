"""The training and the measuring of ``off_grid``, in a process of its own: ``tune JOB.json``.

Legend: B blocks, K weights of a block; R rows, T tokens of a row.
"""

from __future__ import annotations

import json
import sys
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BLOCK = 32
LEVELS = 16
ROW_TOKENS = 1024
WARM_STEPS = 10
# Lines of at least so many characters are told apart by themselves.
TELLING = 80


def grid_distance(weight: torch.Tensor, old: torch.Tensor) -> dict[str, float]:
    """Sums over a matrix and the one that it was made of, blocks of 32 along the rows.

    Returns:
        ``count``; ``changed``; squared sums ``norm``, ``moved``; ``steps``, of distances to the old matrix's
        grid in its steps (blocks of one value only left out: ``counted``); ``again``, of the error of storing
        ``weight`` as Q4_1.
    """
    new_BK, old_BK = (x.double().reshape(-1, BLOCK) for x in (weight, old))
    low_B1 = old_BK.amin(1, keepdim=True)
    step_B1 = (old_BK.amax(1, keepdim=True) - low_B1) / (LEVELS - 1)
    spread_B = step_B1[:, 0] > 0
    units_BK = ((new_BK - low_B1) / step_B1)[spread_B]
    off_BK = units_BK - units_BK.round().clamp(0, LEVELS - 1)
    own_low_B1 = new_BK.amin(1, keepdim=True)
    own_step_B1 = ((new_BK.amax(1, keepdim=True) - own_low_B1) / (LEVELS - 1)).clamp_min(1e-30)
    again_BK = ((new_BK - own_low_B1) / own_step_B1).round() * own_step_B1 + own_low_B1
    return {
        "count": new_BK.numel(),
        "changed": int((new_BK != old_BK).sum()),
        "norm": float(new_BK.square().sum()),
        "moved": float((new_BK - old_BK).square().sum()),
        "steps": float(off_BK.square().sum()),
        "counted": off_BK.numel(),
        "again": float((again_BK - new_BK).square().sum()),
    }


def measure(source: Path, tuned: Path) -> dict[str, float]:
    """How far the matrices of the tuned model's layers are from the grid of the source's."""
    old, new = load_file(source / "model.safetensors"), load_file(tuned / "model.safetensors")
    names = [
        name for name, x in old.items() if ".layers." in name and x.dim() == 2 and x.shape[1] % BLOCK == 0
    ]
    sums, before = ([grid_distance(weights[name], old[name]) for name in names] for weights in (new, old))

    def total(found: list[dict[str, float]], key: str) -> float:
        return sum(one[key] for one in found)

    return {
        "changed": total(sums, "changed") / total(sums, "count"),
        "moved": (total(sums, "moved") / total(sums, "norm")) ** 0.5,
        "steps_source": (total(before, "steps") / total(before, "counted")) ** 0.5,
        "steps_tuned": (total(sums, "steps") / total(sums, "counted")) ** 0.5,
        "again_source": (total(before, "again") / total(before, "norm")) ** 0.5,
        "again_tuned": (total(sums, "again") / total(sums, "norm")) ** 0.5,
    }


def training_rows(job: dict[str, Any], tokenizer: Any) -> tuple[torch.Tensor, int]:
    """Rows of tokens in a seeded order, and how many documents were left out.

    Left out are those that share a long line with a text that may not be trained on.
    """
    forbidden = {line for path in job["forbidden"] for text in _documents(path) for line in _lines(text)}
    ids: list[int] = []
    left_out = 0
    for path in job["train"]:
        for text in _documents(path):
            if forbidden.isdisjoint(_lines(text)):
                ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            else:
                left_out += 1
    rows_RT = torch.tensor(ids[: len(ids) // ROW_TOKENS * ROW_TOKENS]).reshape(-1, ROW_TOKENS)
    order_R = torch.randperm(len(rows_RT), generator=torch.Generator().manual_seed(0))
    return rows_RT[order_R], left_out


def _documents(path: str) -> list[str]:
    """Texts of a JSON lines file (``text``, or the contents of ``messages``), or the whole of a plain one."""
    from compressor.data import find

    content = find(path).read_text(encoding="utf-8")
    if not path.endswith(".jsonl"):
        return [content]
    found = [json.loads(line) for line in content.splitlines() if line.strip()]
    return [
        one["text"] if "text" in one else "\n".join(message["content"] for message in one["messages"])
        for one in found
    ]


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= TELLING}


def train(model: Any, rows_RT: torch.Tensor, job: dict[str, Any]) -> list[float]:
    """AdamW on 32-bit masters, forward in bfloat16, warm-up and cosine to a tenth; the loss of every step."""
    batch = max(1, job["step_tokens"] // rows_RT.shape[1])
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["rate"], betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(job["steps"]):
        share = step / job["steps"]
        rate = job["rate"] * min(1.0, (step + 1) / WARM_STEPS) * (0.55 + 0.45 * cos(pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked_R = torch.arange(step * batch, (step + 1) * batch) % len(rows_RT)
        ids_RT = rows_RT[picked_R].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(ids_RT, labels=ids_RT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    return losses


def main() -> None:
    """Runs one job."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    source, folder = Path(job["source"]), Path(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows_RT, left_out = training_rows(job, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    losses = train(model, rows_RT, job)
    model.to(torch.bfloat16).cpu().eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tenth = max(1, len(losses) // 10)
    facts = {
        "train": job["train"],
        "rows": len(rows_RT),
        "documents_left_out": left_out,
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "grid": measure(source, folder),
    }
    Path(job["report"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
