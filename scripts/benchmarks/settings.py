"""What is run for each scheme: ours, and each peer's documented settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

SCHEMES = ("nvfp4a16", "int4g64", "nvfp4")
PEERS = ("llmcompressor", "autoround", "gptqmodel", "modelopt")

# Peer -> the distribution that its environment must hold.
PACKAGES = {
    "llmcompressor": "llmcompressor",
    "autoround": "auto_round",
    "gptqmodel": "gptqmodel",
    "modelopt": "modelopt",
}

# The recipe's `weights.scheme` for each name on the command line.
RECIPE_SCHEMES: dict[str, Any] = {
    "nvfp4a16": "nvfp4a16",
    "nvfp4": "nvfp4",
    "int4g64": {"kind": "int4", "group_size": 64},
}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        peer: who runs it; ``compressor`` is this package.
        label: what is special about it.
        options: given to the peer's worker, or the recipe's ``solver`` for ours.
        impossible: why it cannot be run, where that is known beforehand.
    """

    peer: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    impossible: str | None = None

    @property
    def name(self) -> str:
        """As the table and the result file call it."""
        return f"{self.peer}, {self.label}" if self.label else self.peer

    @property
    def slug(self) -> str:
        """The same as a folder's name."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name).strip("-")


def _lc(label: str, method: str, observer: str | None = None, **more: Any) -> Setting:
    options = {"method": method} | ({"observer": observer} if observer else {}) | more
    return Setting("llmcompressor", label, options)


def _modelopt(label: str, preset: str, **options: Any) -> Setting:
    return Setting("modelopt", label, {"preset": preset, **options})


# modelopt_recipes/general/ptq/nvfp4_default-kv_none-gptq.yaml (modelopt 0.47): layerwise, static scales.
_MODELOPT_GPTQ = {"algorithm": {"method": "gptq", "layerwise": {"enable": True}}, "static_weights": True}
# configs/ptq/presets/model/nvfp4_w4a4_weight_mse_fp8_sweep.yaml, as a way to choose weight scales.
_MODELOPT_SWEEP = {"algorithm": {"method": "mse", "fp8_scale_sweep": True}, "static_weights": True}
# README and step_by_step.md of auto-round 0.16: 200 iterations are its default recipe, 1,000 its best.
_AUTOROUND = [
    Setting("autoround", "200 iterations", {"iters": 200}),
    Setting("autoround", "1000 iterations", {"iters": 1000}),
]

THEIRS: dict[str, list[Setting]] = {
    "nvfp4a16": [
        _lc("GPTQ", "gptq"),
        _lc("GPTQ, batches of 8", "gptq", batch=8),
        _lc("GPTQ, memoryless_mse", "gptq", "memoryless_mse"),
        _lc("GPTQ, nvfp4_expanded_mse", "gptq", "nvfp4_expanded_mse"),
        _lc("AWQ", "awq"),
        *_AUTOROUND,
        Setting("gptqmodel", "", impossible="none of its formats is NVFP4 (7.5: gptq, awq, fp8, gguf, exl3)"),
        _modelopt("max", "W4A16_NVFP4_CFG"),
        _modelopt("scale sweep", "W4A16_NVFP4_CFG", **_MODELOPT_SWEEP),
        _modelopt("GPTQ", "W4A16_NVFP4_CFG", **_MODELOPT_GPTQ),
    ],
    "int4g64": [
        _lc("GPTQ", "gptq"),
        _lc("GPTQ, batches of 8", "gptq", batch=8),
        _lc("GPTQ, mse", "gptq", "mse"),
        _lc("AWQ", "awq"),
        *_AUTOROUND,
        Setting("gptqmodel", "default"),
        Setting("gptqmodel", "mse 2.4", {"mse": 2.4}),
        _modelopt("AWQ", "INT4_AWQ_CFG"),
    ],
    "nvfp4": [
        _lc("RTN", "rtn"),
        _lc("GPTQ", "gptq"),
        _lc("GPTQ, nvfp4_expanded_mse", "gptq", "nvfp4_expanded_mse"),
        _lc("AWQ", "awq"),
        *_AUTOROUND,
        Setting("gptqmodel", "", impossible="none of its formats is NVFP4 (7.5: gptq, awq, fp8, gguf, exl3)"),
        _modelopt("max", "NVFP4_DEFAULT_CFG"),
        _modelopt("AWQ lite", "NVFP4_AWQ_LITE_CFG"),
        _modelopt("GPTQ", "NVFP4_DEFAULT_CFG", **_MODELOPT_GPTQ),
    ],
}


def our_setting(text: str) -> Setting:
    """Ours from one value of ``--ours``: a solver's name, or its options (and ``polish``) as JSON."""
    solver = json.loads(text) if text.startswith("{") else {"kind": text}
    extra = ", ".join(f"{key} {value}" for key, value in solver.items() if key != "kind")
    return Setting("compressor", " ".join(filter(None, (solver["kind"], extra))), solver)


def _is_meant(name: str, word: str) -> bool:
    return name.endswith(word[:-1]) if word.endswith("$") else word in name


def chosen(scheme: str, ours: list[str], peers: list[str], only: list[str] | None) -> list[Setting]:
    """The rows of a table: ours, then each named peer's.

    ``only`` keeps the peers' rows whose names hold one of its words, or end with it where it ends with ``$``.
    """
    rows = [our_setting(text) for text in ours]
    for peer in peers:
        found = [setting for setting in THEIRS[scheme] if setting.peer == peer]
        rows += [
            setting for setting in found if only is None or any(_is_meant(setting.name, w) for w in only)
        ]
    return rows
