"""Starved experts in a walk, against a whole model with hooks; and walks of a few tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.model.routed import is_expert_owner
from compressor.progress import Silent
from compressor.stages.base import Claim
from compressor.stages.jobs import HeardJob
from compressor.stages.receipts import PartError, all_receipts
from compressor.stages.walk import WalkSpec, walk
from compressor.stages.walk_block import BlockWalk
from compressor.stages.walked import WalkedTensors
from compressor.workspace import file_sha256
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama4

from .walking import SPEC, claims_of, some_tokens

GPTQ = {"kind": "gptq"}
# Families of experts, and what comes before the first of them: so both streams send them the same.
IN_16BIT = {
    "llama4": ["*self_attn*", "*.layers.0.*"],
    "mixtral": ["*self_attn*"],
    "qwen3_next": ["*self_attn*", "*linear_attn*"],
    "qwen3_moe": ["*self_attn*"],
    "phimoe": ["*self_attn*"],
}


class _Told(Silent):
    """Keeps warnings and counts what is solved; interrupts at the ``stop``-th."""

    def __init__(self, stop: int | None = None) -> None:
        self.warnings: list[str] = []
        self.solved = 0
        self._stop = stop

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, amount: int, note: str = "") -> None:
        self.solved += 1
        if self.solved == self._stop:
            raise KeyboardInterrupt


def _walk(
    folder: Path,
    claims: list[Claim],
    target: Path,
    ids: torch.Tensor,
    spec: WalkSpec = SPEC,
    progress: Silent | None = None,
) -> bool:
    target.mkdir(exist_ok=True)
    return walk(FolderSource(folder), claims, ids, spec, target, progress or Silent())


def _hashes(target: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(target.glob("layer-*.safetensors"))}


def _moments_heard(
    folder: Path, claims: list[Claim], target: Path, spec: WalkSpec, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The second moments that each matrix was solved with."""
    found: dict[str, torch.Tensor] = {}
    solve = BlockWalk._solve_jobs

    def keep(self: BlockWalk, batch: Sequence[HeardJob], writer: ShardWriter) -> list[PartError]:
        for job, moments in batch:
            assert moments is not None
            found.update({part.module: moments.second_II.clone() for _, part in job})
        return solve(self, batch, writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "_solve_jobs", keep)
        _walk(folder, claims, target, ids, spec)
    return found


@torch.no_grad()
def _first_experts(folder: Path, ids: torch.Tensor) -> tuple[str, list[torch.Tensor]]:
    """The first layer with experts, and the inputs [N, H] that each one's gate and up should hear.

    From a whole model with hooks on the module of experts and on the router's own inputs.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    name = next(name for name, module in model.named_modules() if is_expert_owner(module))
    owner = model.get_submodule(name.rpartition(".")[0])
    router = owner.router if hasattr(owner, "router") else owner.gate
    kept: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda _, args: kept.append(args[0].reshape(-1, args[0].shape[-1])))
    for row in ids:
        model(row[None], use_cache=False)
    x_NH = torch.cat(kept[:: len(kept) // len(ids)])
    logit_NE = x_NH @ router.weight.T
    is_llama4 = type(router).__name__ == "Llama4Router"
    score_NE = logit_NE if is_llama4 else logit_NE.softmax(dim=1)
    chosen_NE = torch.zeros_like(score_NE, dtype=torch.bool)
    chosen_NE.scatter_(1, score_NE.topk(router.top_k, dim=1).indices, True)
    if type(router).__name__ == "PhimoeTopKRouter":
        chosen_NE = torch.zeros_like(chosen_NE).scatter_(1, router(x_NH)[2], True)
        place_N = torch.arange(len(x_NH), dtype=torch.float64)
        score_NE = (place_N * (math.sqrt(5) - 1) / 2).frac()[:, None].expand_as(score_NE)
    expected = []
    for expert in range(logit_NE.shape[1]):
        own, others = (mask.nonzero().flatten() for mask in (chosen_NE[:, expert], ~chosen_NE[:, expert]))
        others = others[score_NE[others, expert].argsort(descending=True, stable=True)]
        tokens = torch.cat([own, others[: max(0, 4 - len(own))]])
        factor = logit_NE[tokens, expert, None].sigmoid() if is_llama4 else 1.0
        expected.append(x_NH[tokens] * factor)
    return ".".join(name.split(".")[:3]), expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {}) for name in IN_16BIT),
        ("llama4", {"keep_inputs": False}),
        ("qwen3_moe", {"keep_inputs": False, "moment_bytes": 1}),
    ],
)
def test_starved_experts(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """The inputs that a starved expert is solved on: its own, and those of the tokens scored highest for it.

    Against one pass of the block that computes all of it: what follows of the moments is as good as equal.
    """
    folder = FAMILIES[name](tmp_path / "model")
    ids = some_tokens(2, 9)
    claims = claims_of(FolderSource(folder), {"scheme": "int8", "solver": GPTQ, "ignore": IN_16BIT[name]})
    spec = replace(SPEC, batch_tokens=9, **change)
    heard = _moments_heard(folder, claims, tmp_path / "walk", spec, ids)
    layer, expected = _first_experts(folder, ids)
    for expert, x_NI in enumerate(expected):
        named = re.compile(rf"{layer}\..*\.experts\.{expert}\.(gate_proj|up_proj|w1|w3)")
        found = [moments for module, moments in heard.items() if named.fullmatch(module)]
        assert len(found) == 2
        for second_II in found:
            torch.testing.assert_close(second_II, x_NI.T @ x_NI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_16BIT)
@pytest.mark.parametrize("tokens", [1, 64])
def test_few_tokens_never_fail(tmp_path: Path, name: str, tokens: int) -> None:
    """Whatever reaches an expert, values and scales are finite, and a rerun inside a block has the same."""
    folder, ids = FAMILIES[name](tmp_path / "model"), some_tokens(1, tokens)
    claims = claims_of(FolderSource(folder), {"scheme": "fp8_static", "solver": GPTQ})
    told = _Told()
    _walk(folder, claims, tmp_path / "walk", ids, progress=told)
    for path in (tmp_path / "walk").glob("layer-*.safetensors"):
        assert all(bool(tensor.float().isfinite().all()) for tensor in load_file(path).values())
    found = [facts for receipt in all_receipts(tmp_path / "walk") for facts in receipt.get("experts", ())]
    assert found
    for facts in found:
        assert facts["enough"] == 4
        assert facts["scored"] == (name != "phimoe" or min(facts["tokens"]) >= 4)
        for own, others in zip(facts["tokens"], facts["topped_up"], strict=True):
            assert others == max(0, min(4, tokens) - own)
    starved = sum(own < 4 for facts in found for own in facts["tokens"])
    assert any(f"{starved} of {4 * len(found)} experts" in text for text in told.warnings) == (starved > 0)
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, claims, tmp_path / "part", ids, progress=_Told(told.solved - 1))
    assert _walk(folder, claims, tmp_path / "part", ids)
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "walk")
    assert all_receipts(tmp_path / "part") == all_receipts(tmp_path / "walk")


def test_w4a4_of_64_tokens(tmp_path: Path) -> None:
    """All experts of a layer have one finite scale of inputs, whoever heard something."""
    moe = tiny_llama4(tmp_path / "model", experts=4)
    claims = claims_of(FolderSource(moe), {"scheme": "nvfp4", "solver": GPTQ})
    _walk(moe, claims, tmp_path / "walk", some_tokens(2, 32))
    walked = WalkedTensors(tmp_path / "walk")
    for layer in range(2):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            modules = [f"model.layers.{layer}.feed_forward.experts.{e}.{leaf}" for e in range(4)]
            scales = {float(walked.local(module)["input_global_scale"]) for module in modules}
            assert len(scales) == 1
            assert all(0 < scale < float("inf") for scale in scales)
    assert all(facts["shared_range"] for r in all_receipts(tmp_path / "walk") for facts in r["experts"])
