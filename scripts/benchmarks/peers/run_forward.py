"""One plain forward pass of the same tokens: what a calibrated run's time is divided by.

In whichever of bfloat16 and float32 is faster here, in batches of about 4,096 tokens, without the vocabulary
projection, which no calibrated run needs: the strictest yardstick. How long the weights took to read is told
apart.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from shared import Job

BATCH_TOKENS = 4096


def _forward(model: Any, ids_NT: torch.Tensor) -> None:
    with torch.inference_mode():
        model(ids_NT.to(model.device), use_cache=False, logits_to_keep=1)


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    with job.timed("read"):
        model = job.model().eval()
    batches = job.ids_NT.split(max(1, BATCH_TOKENS // job.ids_NT.shape[1]))
    seconds = {}
    # On a GPU float32 is never faster, and experts may have no kernel for it.
    dtypes = [torch.bfloat16] if job.device == "cuda" else [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        model.to(dtype)
        _forward(model, batches[0][:, :64])
        started = time.monotonic()
        _forward(model, batches[0])
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds[dtype] = time.monotonic() - started
    dtype = min(seconds, key=lambda key: seconds[key])
    model.to(dtype)
    with job.timed("quantize"):
        for batch_NT in batches:
            _forward(model, batch_NT)
    job.report(dtype=str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    main()
