"""AutoRound: signed-gradient rounding, exported in compressed-tensors' format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from shared import Job


def _scheme(name: str) -> Any:
    if name == "int4g64":
        return "W4A16G64"
    if name == "nvfp4":
        return "NVFP4"
    return QuantizationScheme(bits=4, group_size=16, sym=True, data_type="nv_fp", act_bits=16)


def _move_up(target: Path) -> None:
    """Out of the folder within ``target`` that AutoRound names after the model and the format."""
    if not (target / "config.json").exists():
        inner = next(target.glob("*/config.json")).parent
        for file in inner.iterdir():
            file.rename(target / file.name)
        inner.rmdir()


def _describe_weight_only(file: Path) -> None:
    """AutoRound 0.16 describes all its NVFP4 as W4A4: loaders would want scales that it did not store."""
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    file.write_text(json.dumps(config, indent=2))


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    rows, length = job.ids_NT.shape
    batch = min(8, rows)
    rounder = AutoRound(
        job.model(),
        tokenizer=job.tokenizer(),
        scheme=_scheme(job.scheme),
        dataset=list(job.ids_NT.split(batch)),
        seqlen=length,
        nsamples=rows,
        batch_size=batch,
        device_map=job.device,
        **job.options,
    )
    # Quantizing and saving are one call: a block is packed as soon as it is solved.
    with job.timed("quantize"):
        rounder.quantize_and_save(output_dir=str(job.target), format="llm_compressor")
    _move_up(job.target)
    if job.scheme == "nvfp4a16":
        _describe_weight_only(job.target / "config.json")
    job.report(["auto-round"])


if __name__ == "__main__":
    main()
