"""llm-compressor: ``oneshot`` with the options' method and weight observer, the model loaded as told.

Guides of 0.14: the model on the CPU, from where the sequential pipeline takes one layer at a time to the
device (guides/big_models_and_distributed/model_loading); mixtures of experts within ``load_quantizable_moe``,
which makes a ``Linear`` of every expert's matrix, and all experts calibrated on all tokens, its default. One
sample a forward pass is its default too; the options may ask for larger batches, read ahead.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from shared import Job
from transformers import AutoConfig

PRESETS = {"nvfp4a16": "NVFP4A16", "nvfp4": "NVFP4"}
# What this package leaves in 16 bit too, so that the stored bytes are equal.
IGNORE = ["lm_head", "re:.*router$", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_ba$"]


def _format(job: Job) -> dict[str, Any]:
    if job.scheme in PRESETS:
        return {"targets": ["Linear"], "scheme": PRESETS[job.scheme]}
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def _recipe(job: Job) -> list[Any]:
    how = {"ignore": IGNORE, **_format(job)}
    if "observer" in job.options:
        how["weight_observer"] = job.options["observer"]
    method = job.options["method"]
    if method == "gptq":
        return [GPTQModifier(**how)]
    quantizer = QuantizationModifier(**how)
    return [AWQModifier(duo_scaling="both"), quantizer] if method == "awq" else [quantizer]


def _model(job: Job) -> Any:
    if find_spec("torchvision") is None:
        # Its table of architectures imports it; without, oneshot splits the experts itself.
        return job.model("cpu")
    with load_quantizable_moe():
        return job.model("cpu")


def _help(job: Job) -> str | None:
    """Mends what would stop it on this model or machine; what that was, for the report."""
    told = []
    if AutoConfig.from_pretrained(job.source).model_type == "llama4_text":
        told.append(_help_llama4())
    if job.options["method"] == "awq" and not torch.cuda.is_available():
        told.append(_help_awq())
    return "; ".join(told) or None


def _help_awq() -> str:
    """0.14 pins the inputs of AWQ's search for fast copies to a device, which torch refuses without one."""
    IntermediatesCache._pin_intermediate = classmethod(lambda _cls, _value: None)
    return "its AWQ pins memory, which fails on a machine without a GPU: was let off"


def _help_llama4() -> str:
    """0.14 looks for the text part within a Llama 4 config, and fails on a model that has no other part.

    With "'Llama4TextConfig' object has no attribute 'text_config'".
    """
    from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts

    made = Llama4LinearExperts.from_experts_module

    def from_text_only(experts: Any, config: Any) -> Any:
        return made(experts, SimpleNamespace(text_config=config))

    Llama4LinearExperts.from_experts_module = from_text_only
    return "it fails on a text-only Llama 4 (Llama4TextConfig has no text_config): was given one"


def _mark_layers(job: Job) -> None:
    """Tells the job when a layer's matrices are solved: an event of the sequential pipeline."""
    ended = LifecycleCallbacks.sequential_epoch_end

    def marked(*words: Any, **named: Any) -> Any:
        state = ended(*words, **named)
        job.mark()
        return state

    LifecycleCallbacks.sequential_epoch_end = marked


def _quantized_weights(model: Any) -> int:
    found = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    return sum(module.weight.numel() for module in found if hasattr(module, "weight"))


def main() -> None:
    """Runs one job."""
    job = Job.from_command_line()
    helped = _help(job)
    model, tokenizer = _model(job), job.tokenizer()
    rows, length = job.ids_NT.shape
    records = [{"input_ids": row, "attention_mask": [1] * length} for row in job.ids_NT.tolist()]
    recipe = _recipe(job)
    _mark_layers(job)
    batch = job.options.get("batch", 1)
    with job.beating(), job.timed("quantize"):
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=recipe,
            dataset=Dataset.from_list(records),
            num_calibration_samples=rows,
            max_seq_length=length,
            shuffle_calibration_samples=False,
            batch_size=batch,
            sequential_prefetch=batch > 1,
        )
    quantized = _quantized_weights(model)
    if job.saving:
        with job.timed("save"):
            model.save_pretrained(job.target, save_compressed=True)
            tokenizer.save_pretrained(job.target)
    job.report(["llmcompressor"], quantized_weights=quantized, helped=helped)


if __name__ == "__main__":
    main()
