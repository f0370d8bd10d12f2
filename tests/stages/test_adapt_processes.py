"""Adapters trained by several processes that accelerate joins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint.adapted import ADAPTED_NAME
from tests.tiny import tiny_llama

from .adapt_worker import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Each takes half of a step's sequences; one of them writes."""
    model = tiny_llama(tmp_path / "model", tie=True, dtype=torch.float32)
    text = tmp_path / "long.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat. " * 60)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    main(model, text, tmp_path / "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    worker = (Path(__file__).with_name("adapt_worker.py"), model, text, tmp_path / "two")
    ran = subprocess.run(
        [sys.executable, *launch, *map(str, worker)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (load_file(tmp_path / name / ADAPTED_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Gradients are summed in another order; Adam divides small ones by their own size.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
