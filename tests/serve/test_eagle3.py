"""vLLM serves a head as this package decodes with it: the same tokens, and as many of a draft's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.drafts.eagle3_drafter import Eagle3Drafter
from compressor.drafts.eagle3_files import read_head, write_head
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from compressor.verify.process import engine_environment
from tests.drafts.eagle import make_llama4, make_target, trained_head

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("eagle_worker.py")
TOKENS, NEW = 3, 60
# Of all proposals. Both compute in fp32 what the same head says to the same texts.
POINTS = 0.03
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}


@pytest.mark.parametrize("case", ["shared", "reduced-yarn", "llama4"])
def test_served_as_measured(case: str, tmp_path: Path, engine_python: Path) -> None:
    """With all ends shared; with a vocabulary of its own under scaled positions; after a model with experts.

    Two of the heads are served by the name of their folder alone, which names the target.
    """
    known = 160 if case == "reduced-yarn" else None
    if case == "llama4":
        target = make_llama4(tmp_path / "target", use_qk_norm=True, interleave_moe_layer_step=1)
    else:
        target = make_target(tmp_path / "target", rope=YARN if known else None)
    folder = tmp_path / "draft"
    folder.mkdir()
    head = trained_head(target, known=known, steps=120)
    write_head(folder, head, verifier=str(target.folder), tokens=TOKENS, dtype=torch.float32)
    prompts = target.written(12, 8, 32, seed=7)
    drafter = Eagle3Drafter(read_head(folder, target.config, target.ends))
    mine = decode(target.model, drafter, list(prompts), NEW, tokens=TOKENS, batch=5)
    told = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": TOKENS} if known else None
    served = _served(target.folder if known else folder, prompts, told, engine_python, tmp_path / "served")
    plain = _served(target.folder, prompts, None, engine_python, tmp_path / "plain")
    assert served["tokens"] == plain["tokens"] == [list(ids) for ids in mine.ids]
    ours = Acceptance.sum(mine.acceptance, TOKENS)
    theirs = [count / served["drafts"] for count in served["accepted"]]
    for place, rate in enumerate(ours.rates):
        assert abs(rate - theirs[place]) < POINTS, f"position {place}: {rate:.3f} here, {theirs[place]:.3f}"
    # A draft that is never right would agree, too.
    assert ours.length > 1.2


def _served(
    model: Path, prompts_BT: torch.Tensor, speculative: dict[str, Any] | None, python: Path, at: Path
) -> Any:
    asked, out = at.with_suffix(".asked.json"), at.with_suffix(".json")
    told = {"prompts": prompts_BT.tolist(), "new": NEW, "longest": 256, "speculative": speculative}
    asked.write_text(json.dumps({"model": str(model), **told}))
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(
        [python, WORKER, asked, out],
        env=engine_environment(python, variables) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=at.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(out.read_text())
