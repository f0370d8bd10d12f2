"""vLLM decodes with a draft model as this package does: the same tokens, and as many of each proposal's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.drafts.draft_model import DraftModel
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from compressor.verify.process import engine_environment
from tests.evals.decode_models import prompts
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("eagle_worker.py")
TOKENS, NEW, PROMPTS = 3, 48, 12
# Blocks that outweigh the embedding, so that texts do not repeat; a draft off by a part of that.
BLOCKS, NOISE = 4.0, 0.03
# Of all proposals: both compute in fp32 what the same models say to the same texts.
POINTS = 0.03


def test_served_as_measured(tmp_path: Path, engine_python: Path) -> None:
    """Tokens, drafts and acceptance by position."""
    target, draft = _model(tmp_path / "target", 0.0), _model(tmp_path / "draft", NOISE)
    texts = prompts(PROMPTS, 24, 250)
    mine = decode(target, DraftModel(draft), texts, NEW, tokens=TOKENS, batch=4)
    asked = {
        "model": str(tmp_path / "target"),
        "prompts": [ids_T.tolist() for ids_T in texts],
        "new": NEW,
        "longest": 256,
        "speculative": {
            "method": "draft_model",
            "model": str(tmp_path / "draft"),
            "num_speculative_tokens": TOKENS,
        },
    }
    served = _served(asked, engine_python, tmp_path)
    assert served["tokens"] == [list(ids) for ids in mine.ids]
    ours = Acceptance.sum(mine.acceptance, TOKENS)
    theirs = [count / served["drafts"] for count in served["accepted"]]
    for place, rate in enumerate(ours.rates):
        assert abs(rate - theirs[place]) < POINTS, f"position {place}: {rate:.3f} here, {theirs[place]:.3f}"
    # Drafts that are never or always right would agree, too.
    assert 1.5 < ours.length < 3.5
    print(ours.rates, theirs, ours.drafts, served["drafts"])


@torch.no_grad()
def _model(folder: Path, noise: float) -> PreTrainedModel:
    """Written, and loaded: the same random model, with so much noise on its matrices."""
    tiny_llama(folder, layers=3, hidden=64, heads=2, kv_heads=1, dtype=torch.float32, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 and "layers" in path:
            spread = torch.randn(parameter.shape, generator=generator) * parameter.std()
            parameter += noise * spread
            parameter *= BLOCKS
    model.save_pretrained(folder)
    return model


def _served(asked: dict[str, Any], python: Path, folder: Path) -> Any:
    told, out = folder / "asked.json", folder / "out.json"
    told.write_text(json.dumps(asked))
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(
        [python, WORKER, told, out],
        env=engine_environment(python, variables) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(out.read_text())
