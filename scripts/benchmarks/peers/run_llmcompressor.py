"""llm-compressor: ``oneshot`` with the options' method and weight observer."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from shared import Job

PRESETS = {"nvfp4a16": "NVFP4A16", "nvfp4": "NVFP4"}


def _format(job: Job) -> dict[str, Any]:
    if job.scheme in PRESETS:
        return {"targets": ["Linear"], "scheme": PRESETS[job.scheme]}
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def _recipe(job: Job) -> list[Any]:
    how = {"ignore": ["lm_head"], **_format(job)}
    if "observer" in job.options:
        how["weight_observer"] = job.options["observer"]
    method = job.options["method"]
    if method == "gptq":
        return [GPTQModifier(**how)]
    quantizer = QuantizationModifier(**how)
    return [AWQModifier(duo_scaling="both"), quantizer] if method == "awq" else [quantizer]


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    model, tokenizer = job.model(), job.tokenizer()
    rows, length = job.ids_NT.shape
    records = [{"input_ids": row, "attention_mask": [1] * length} for row in job.ids_NT.tolist()]
    recipe = _recipe(job)
    with job.timed("quantize"):
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=recipe,
            dataset=Dataset.from_list(records),
            num_calibration_samples=rows,
            max_seq_length=length,
            shuffle_calibration_samples=False,
        )
    with job.timed("save"):
        model.save_pretrained(job.target, save_compressed=True)
        tokenizer.save_pretrained(job.target)
    job.report(["llmcompressor"])


if __name__ == "__main__":
    main()
