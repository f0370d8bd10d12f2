"""A prediction layer through compression to W4A4 and re-alignment, on a model that has learned something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import compressor
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.drafts.native import NativeHead
from compressor.drafts.native_drafter import NativeDrafter
from compressor.drafts.native_layer import PredictionLayer
from compressor.evals.decode import decode
from compressor.evals.decode_record import Acceptance
from compressor.model.load import load_checkpoint_model, load_source_model
from tests.drafts.native_training import STEPS, learned, rows_of, train, walks

from .cases import write_recipe

# Held-out rows whose acceptance is compared: the spread of a rate over them is about a hundredth.
MEASURED_ROWS = 64


def accepted(head: NativeHead, target: Any) -> torch.Tensor:
    """Rates by position at all places of held-out rows."""
    with torch.no_grad():
        found = head.unroll(rows_of(target, walks(MEASURED_ROWS, 12345)), STEPS)
    return found.accepted_K / found.places


def test_acceptance_before_and_after_w4a4(tmp_path: Path) -> None:
    """The trained layer is carried bit for bit; re-aligned, it is accepted no less than before."""
    model = learned("qwen3_next", tmp_path / "model")
    source = FolderSource(model)
    target = load_source_model(source, torch.float32).requires_grad_(False)
    head = NativeHead(PredictionLayer(source, target))
    random_K = accepted(head, target)
    train(head, target, 14, 1e-2)
    head.write(model, STEPS)
    before_K = accepted(NativeHead(PredictionLayer(FolderSource(model), target)), target)
    # The likeliest letters are told by the last one, so that all can be foretold.
    assert before_K[0] > 0.5 > 0.2 > random_K[0]
    assert before_K[STEPS - 1] > 0.1

    (tmp_path / "shown.txt").write_text("".join(map(chr, walks(64, 7).flatten().tolist())))
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model,
        "{scheme: nvfp4}",
        f"evaluate: null\ncalibration: {{datasets: [{{path: {json.dumps(str(tmp_path / 'shown.txt'))}}}], "
        "num_samples: 8, sequence_length: 64}",
    )
    result = compressor.run(recipe, output=tmp_path / "out").output
    after, stored = load_file(result / "model.safetensors"), load_file(model / "model.safetensors")
    drafts = [name for name in stored if name.startswith("mtp.")]
    assert len(drafts) == len(head.tensors())
    assert all(torch.equal(after[name], stored[name]) for name in drafts)

    quantized = load_checkpoint_model(result, torch.float32).model.requires_grad_(False)
    packed = DequantizedSource(FolderSource(result, quantized=True))
    aligned = NativeHead(PredictionLayer(packed, quantized))
    carried_K = accepted(aligned, quantized)
    train(aligned, quantized, 20, 5e-3)
    aligned.write(result, STEPS)
    read = PredictionLayer(DequantizedSource(FolderSource(result, quantized=True)), quantized)
    aligned_K = accepted(NativeHead(read), quantized)
    assert aligned_K.sum() >= carried_K.sum() - 0.01
    assert aligned_K.sum() >= before_K.sum()

    # In the loop, too, and no token is another one for it.
    prompts = list(walks(3, 777)[:, :12])
    plain = decode(quantized, None, prompts, 24)
    found = decode(quantized, NativeDrafter(read), prompts, 24, tokens=STEPS)
    assert found.ids == plain.ids
    assert Acceptance.sum(found.acceptance, STEPS).length > 3
