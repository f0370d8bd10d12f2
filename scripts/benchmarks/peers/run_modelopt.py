"""NVIDIA ModelOpt: its presets for each scheme, exported as a unified Hugging Face checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from shared import Job


def _config(job: Job) -> dict[str, Any]:
    """A preset of mtq; the options may replace its algorithm, or make the weights' scales static."""
    config = copy.deepcopy(getattr(mtq, job.options["preset"]))
    if "algorithm" in job.options:
        config["algorithm"] = job.options["algorithm"]
    for rule in config["quant_cfg"]:
        cfg = rule.get("cfg")
        if rule.get("quantizer_name") != "*weight_quantizer" or not cfg:
            continue
        if job.scheme == "int4g64":
            cfg["block_sizes"] = {-1: 64, "type": "static"}
        elif job.options.get("static_weights"):
            cfg["block_sizes"] = {**cfg["block_sizes"], "type": "static"}
    return config


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    model = job.model()

    def forward(quantized: Any) -> None:
        for row_T in job.ids_NT:
            quantized(row_T[None].to(job.device), use_cache=False)

    config = _config(job)
    with job.timed("quantize"), torch.no_grad():
        mtq.quantize(model, config, forward)
    with job.timed("save"):
        export_hf_checkpoint(model, export_dir=job.target)
        job.tokenizer().save_pretrained(job.target)
    job.report(["nvidia-modelopt"])


if __name__ == "__main__":
    main()
