"""Writes ``recipes/configs/NAME/{config.json,tensors.json}``: the headers of published models, no weights.

    python scripts/make_headers.py [OUTPUT_FOLDER]

Each model is built on the meta device from the dimensions that its publisher states, by transformers' own
modeling code; names are mapped back to those of a saved checkpoint. What transformers does not build
(multi-token prediction, stored FP8 and MXFP4) is added as the publisher's checkpoint has it. The parameter
counts are checked.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.published_configs import (
    DEEPSEEK_V3,
    GPT_OSS_120B,
    JAMBA_1_5_MINI,
    LLAMA_3_3_70B,
    LLAMA_3_70B,
    LLAMA_4_MAVERICK,
    LLAMA_4_SCOUT,
    QWEN3_30B_A3B,
    QWEN3_32B,
    QWEN3_NEXT_80B_A3B,
)

Row = tuple[str, str, list[int]]
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def qwen3_next_checkpoint(rows: list[Row]) -> list[Row]:
    """With the multi-token prediction layer: an attention layer like layer 3, and what feeds it."""
    layer = [
        (name.replace("model.layers.3.", "mtp.layers.0."), *rest)
        for name, *rest in rows
        if "layers.3." in name
    ]
    hidden = 2048
    norms = ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
    extra: list[Row] = [("mtp.fc.weight", "BF16", [hidden, 2 * hidden])]
    return [*rows, *extra, *layer, *((f"{name}.weight", "BF16", [hidden]) for name in norms)]


def deepseek_v3_checkpoint(rows: list[Row]) -> list[Row]:
    """With layer 61 for multi-token prediction; projections in FP8, a scale for each block of 128 x 128."""
    hidden, vocabulary = 7168, 129280
    last, behind = "model.layers.60.", "model.layers.61."
    rows = [*rows, *((name.replace(last, behind), *rest) for name, *rest in rows if name.startswith(last))]
    rows += [(f"{behind}{name}.weight", "BF16", [hidden]) for name in ("enorm", "hnorm", "shared_head.norm")]
    rows += [
        (f"{behind}{name}.weight", "BF16", [vocabulary, hidden])
        for name in ("embed_tokens", "shared_head.head")
    ]
    rows.append((f"{behind}eh_proj.weight", "BF16", [hidden, 2 * hidden]))
    stored: list[Row] = []
    for name, dtype, shape in rows:
        if name.endswith("e_score_correction_bias"):
            stored.append((name, "F32", shape))
        elif (not name.endswith("_proj.weight") and "kv_a_proj_with_mqa" not in name) or "eh_proj" in name:
            stored.append((name, dtype, shape))
        else:
            stored.append((name, "F8_E4M3", shape))
            stored.append((f"{name}_scale_inv", "F32", [math.ceil(size / 128) for size in shape]))
    return stored


def gpt_oss_checkpoint(rows: list[Row]) -> list[Row]:
    """With experts in MXFP4, transposed: 16 bytes of codes and one scale for each 32 inputs."""
    stored: list[Row] = []
    for name, dtype, shape in rows:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored.append((name, dtype, shape))
            continue
        count, inputs, outputs = shape
        stored.append((f"{name}_blocks", "U8", [count, outputs, inputs // 32, 16]))
        stored.append((f"{name}_scales", "U8", [count, outputs, inputs // 32]))
    return stored


def _as_saved(rows: list[Row]) -> list[Row]:
    return rows


# folder -> (name for people, config.json, values stored by the published checkpoint, what is stored otherwise
# than transformers saves it)
MODELS: dict[str, tuple[str, dict[str, Any], int, Callable[[list[Row]], list[Row]]]] = {
    "llama-4-scout": (
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", LLAMA_4_SCOUT, 108_641_793_536, _as_saved,
    ),
    "llama-4-maverick": (
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct", LLAMA_4_MAVERICK, 401_583_781_376, _as_saved,
    ),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B-Instruct", LLAMA_3_70B, 70_553_706_496, _as_saved),
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", LLAMA_3_3_70B, 70_553_706_496, _as_saved),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", QWEN3_30B_A3B, 30_532_122_624, _as_saved),
    "qwen3-32b": ("Qwen/Qwen3-32B", QWEN3_32B, 32_762_123_264, _as_saved),
    "qwen3-next-80b-a3b": (
        "Qwen/Qwen3-Next-80B-A3B-Instruct", QWEN3_NEXT_80B_A3B, 81_324_862_720, qwen3_next_checkpoint,
    ),
    "jamba-1.5-mini": ("ai21labs/AI21-Jamba-1.5-Mini", JAMBA_1_5_MINI, 51_570_323_328, _as_saved),
    "deepseek-v3": ("deepseek-ai/DeepSeek-V3", DEEPSEEK_V3, 684_531_386_000, deepseek_v3_checkpoint),
    "gpt-oss-120b": ("openai/gpt-oss-120b", GPT_OSS_120B, 116_829_156_672, gpt_oss_checkpoint),
}  # fmt: skip


def saved_tensors(config: dict[str, Any]) -> list[Row]:
    """(name, dtype, shape) of every tensor as transformers saves it, in the order of the modules."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    loaded = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(loaded)
    names = revert_weight_conversion(model, model.state_dict())
    return [(name, "BF16", list(tensor.shape)) for name, tensor in names.items()]


def values(rows: list[Row]) -> int:
    """How many values the tensors store; a byte of MXFP4 codes stores two, its scales are none."""
    total = 0
    for name, _, shape in rows:
        if not name.endswith("_scales"):
            total += torch.Size(shape).numel() * (2 if name.endswith("_blocks") else 1)
    return total


def folded(rows: list[Row]) -> list[Row]:
    """Rows of one layer's experts as one row with ``{first-last}`` in the place of their numbers."""
    found: list[Row] = []
    for _, layer in groupby(
        rows, key=lambda row: row[0].partition(".experts.")[0] if ".experts." in row[0] else row[0]
    ):
        experts: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        for name, dtype, shape in layer:
            number = _EXPERT.search(name)
            if number is None:
                found.append((name, dtype, shape))
            else:
                experts.setdefault((_EXPERT.sub("{}", name), dtype, tuple(shape)), []).append(int(number[0]))
        for (name, dtype, sizes), numbers in experts.items():
            assert sorted(numbers) == list(range(len(numbers))), name
            found.append((name.format(f"{{0-{len(numbers) - 1}}}"), dtype, list(sizes)))
    return found


def write(
    folder: Path,
    model: str,
    config: dict[str, Any],
    published: int,
    stored: Callable[[list[Row]], list[Row]],
) -> None:
    """Writes the two files of one of ``MODELS``; one row a line, so that a change shows in a diff."""
    rows = stored(saved_tensors(config))
    counted = values(rows)
    assert counted == published, f"{model}: {counted:,} values, published {published:,}"
    source = (
        f"{model}, written from its public layout by scripts/make_headers.py "
        f"with transformers {transformers.__version__}"
    )
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in folded(rows))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tensors.json").write_text(
        f'{{"source": {json.dumps(source)},\n"tensors": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    print(f"{folder}: {len(rows)} tensors, {counted:,} values")


def main() -> None:
    """Writes every model into the folder given, or into ``recipes/configs`` of this repository."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "recipes" / "configs"
    for name, facts in MODELS.items():
        write(root / name, *facts)


if __name__ == "__main__":
    main()
