"""vLLM drafts with a checkpoint's own prediction layer as this package does: as much of a proposal stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.drafts.native import NativeHead
from compressor.drafts.native_drafter import NativeDrafter
from compressor.drafts.native_layer import PredictionLayer
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from compressor.model.load import load_source_model
from tests.drafts.native_training import STEPS, learned, train, walks
from tests.model.published import WIDE

from .test_draft_model import POINTS, _served

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

NEW, PROMPTS, PROMPT = 48, 12, 6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_served_as_measured(family: str, tmp_path: Path, engine_python: Path) -> None:
    """Tokens, and acceptance by position; GLM recycles the state before the last norm, DeepSeek behind it."""
    folder = learned(family, tmp_path / "model", WIDE)
    source = FolderSource(folder)
    target = load_source_model(source, torch.float32).requires_grad_(False)
    head = NativeHead(PredictionLayer(source, target))
    train(head, target, 4, 1e-3)  # some letters right, some wrong
    head.write(folder, STEPS)
    layer = PredictionLayer(FolderSource(folder), target)
    prompts = list(walks(PROMPTS, 5)[:, :PROMPT])
    mine = decode(target, NativeDrafter(layer), prompts, NEW, tokens=STEPS, batch=4)
    asked = {
        "model": str(folder),
        "prompts": [ids_T.tolist() for ids_T in prompts],
        "new": NEW,
        "longest": 256,
        "speculative": {"method": "mtp", "num_speculative_tokens": STEPS},
    }
    served = _served(asked, engine_python, tmp_path)
    # On the CPU vLLM's latent attention changes tokens as it checks drafts, of the model without any, too.
    if family != "deepseek_v3":
        assert served["tokens"] == [list(ids) for ids in mine.ids]
    ours = Acceptance.sum(mine.acceptance, STEPS)
    theirs = [count / served["drafts"] for count in served["accepted"]]
    for place, rate in enumerate(ours.rates):
        assert abs(rate - theirs[place]) < POINTS, f"position {place}: {rate:.3f} here, {theirs[place]:.3f}"
    # Drafts that are never or always right would agree, too.
    assert 1.5 < ours.length < 3.7
