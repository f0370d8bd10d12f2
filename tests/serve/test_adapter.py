"""An adapter that is not merged, served by vLLM beside a result whose positions are scaled."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import compressor
from compressor.model.load import load_checkpoint_model
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("adapter_worker.py")
RECIPE = """\
model: {{source: {source}}}
weights: {{scheme: nvfp4a16, ignore: ['*']}}
context: {{method: yarn, target_length: 2048}}
adapters: {{documents: long.txt, sequence_length: 128, tokens: 1024, tokens_per_step: 128, warmup_steps: 1,
  rank: 8, learning_rate: 0.03, train: [], merge: false}}
evaluate: null
"""


def test_vllm_applies_the_adapter(tmp_path: Path, engine_python: Path) -> None:
    """vLLM's log-probabilities are those of peft, with the adapter and without."""
    from peft import PeftModel

    from .adapter_worker import PROMPT

    source = tiny_llama(tmp_path / "model", hidden=128, heads=2, kv_heads=2)
    (tmp_path / "long.txt").write_text("the cat sat on the mat and the dog sat on the cat. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=json.dumps(str(source))))
    output = compressor.run(recipe, output=tmp_path / "out" / "result").output
    ran = subprocess.run(
        [engine_python, str(WORKER), str(output), "8"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    served = json.loads(ran.stdout.splitlines()[-1])
    model = load_checkpoint_model(output, torch.float32).model
    ids_1T = torch.tensor([PROMPT])
    for name in ("plain", "adapted"):
        if name == "adapted":
            model = PeftModel.from_pretrained(model, str(output / "adapter"))
        with torch.no_grad():
            logits_TV = model(ids_1T).logits[0].log_softmax(-1)
        expected = logits_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0]
        # Both in fp32, but for cos and sin, which vLLM keeps in a table, and the order of sums.
        torch.testing.assert_close(torch.tensor(served[name]), expected, rtol=0, atol=2e-3)
    changes = torch.tensor(served["adapted"]) - torch.tensor(served["plain"])
    assert float(changes.abs().max()) > 0.05
