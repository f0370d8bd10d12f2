"""A whole evaluation of a tiny pair, and that it runs from shipped files alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.data import find
from compressor.device import fast_dtype, pick_device
from compressor.evals.base import EvalSpec
from compressor.evals.run import evaluate_pair
from compressor.model.load import load_checkpoint_model, load_source_model, load_tokenizer
from compressor.progress import Silent
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and a result whose weights are far from it."""
    root = tmp_path_factory.mktemp("pair")
    source = tiny_llama(root / "source")
    compress_folder(source, root / "result", "FP8_DYNAMIC")
    return source, root / "result"


def test_a_pair_is_measured(folders: tuple[Path, Path]) -> None:
    """Text in float32, tasks in the fast dtype, and the record says how the result was loaded."""
    source = load_source_model(FolderSource(folders[0]), torch.float32)
    result = load_checkpoint_model(folders[1], torch.float32)
    spec = EvalSpec(find("calibration/heldout.jsonl"), "held out", 300, 100, {"piqa": 10})
    found = evaluate_pair(source, result, load_tokenizer(folders[0]), spec, Silent(), hub=folders[0].parent)
    assert (found.text.tokens, found.text.windows, found.text_label) == (300, 3, "held out")
    assert found.text.kl_mean > 0
    assert [(task.name, task.metrics["acc"].n) for task in found.tasks] == [("piqa", 10)]
    fast = fast_dtype(pick_device())
    assert (found.text_dtype, found.task_dtype) == ("float32", str(fast).removeprefix("torch."))
    assert (found.loaded_via, found.activations_simulated) == ("transformers", True)
    assert next(source.parameters()).dtype is fast


def test_records_import_no_heavy_library() -> None:
    """What plans import of this room brings neither torch nor lm-eval."""
    code = (
        "import sys, compressor.evals.base, compressor.budget.gates, compressor.device, compressor.evals.run;"
        "print([name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
