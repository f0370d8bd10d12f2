"""Perplexity and KL of a checkpoint that only its own tool reads, by the method of ``compress eval``.

    evaluate.py SOURCE CHECKPOINT HELDOUT.safetensors PEER REPORT.json

Run in the peer's environment; imports torch, transformers, and the peer to read its own format. Windows that
do not overlap, every token but a window's first scored, float32 throughout, KL(source || result).

Legend: O, I matrix sides; T tokens of a window; V vocabulary.
"""

from __future__ import annotations

import json
import sys
from math import exp
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 1024
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NVFP4_BLOCK = 16


class Fp4Linear(nn.Module):
    """A decoded weight, its input scaled and rounded as a ModelOpt checkpoint says.

    Args:
        weight_OI: decoded, float32.
        bias: or None.
        smooth_I: ``pre_quant_scale``, multiplied into the input, or None.
        input_scale: the tensor-level scale of NVFP4 activations, or None where they stay as they are.
    """

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias: torch.Tensor | None,
        smooth_I: torch.Tensor | None,
        input_scale: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.weight_OI, self.bias, self.smooth_I, self.input_scale = weight_OI, bias, smooth_I, input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., I] -> [..., O]."""
        if self.smooth_I is not None:
            x = x * self.smooth_I
        if self.input_scale is not None:
            x = round_nvfp4(x, self.input_scale)
        return nn.functional.linear(x, self.weight_OI, self.bias)


def round_nvfp4(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Nearest NVFP4 values, each block's scale from its largest magnitude, rounded to E4M3; ties to even."""
    blocks = x.reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / tensor_scale).clamp(max=448)
    scale = scale.to(torch.float8_e4m3fn).float() * tensor_scale
    units = torch.where(scale > 0, blocks / scale.clamp_min(1e-30), torch.zeros_like(blocks))
    steps = torch.where(units.abs() < 2, 0.5, torch.where(units.abs() < 4, 1.0, 2.0))
    return ((units / steps).round() * steps).clamp(-6, 6).mul(scale).reshape(x.shape)


def load_modelopt(folder: Path) -> Any:
    """A model with the weights that ModelOpt's unified export describes (NVFP4 kinds and INT4 AWQ)."""
    config = AutoConfig.from_pretrained(folder)
    described = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    packed = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    plain = {name: x for name, x in stored.items() if name.rpartition(".")[0] not in packed}
    dense = {f"{module}.weight": _decoded(module, stored) for module in packed}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    biases = {f"{m}.bias": stored[f"{m}.bias"] for m in packed if f"{m}.bias" in stored}
    missing, unexpected = model.load_state_dict({**plain, **dense, **biases}, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected, unexpected
    assert set(missing) <= tied, missing
    model.tie_weights()
    activations = described["quant_algo"] in ("NVFP4", "NVFP4_AWQ")
    for module in packed:
        linear = model.get_submodule(module)
        smooth = stored.get(f"{module}.pre_quant_scale")
        scale = stored.get(f"{module}.input_scale") if activations else None
        if smooth is not None or scale is not None:
            wide = [None if x is None else x.float() for x in (smooth, scale)]
            model.set_submodule(module, Fp4Linear(linear.weight.data, linear.bias, *wide))
    return model


def _decoded(module: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [O, I] in float32: codes times scales."""
    codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"].float()
    low, high = codes & 15, codes >> 4
    if f"{module}.weight_scale_2" in stored:
        nibbles_OI = torch.stack([low, high], -1).flatten(-2).int()
        values_OI = E2M1[nibbles_OI & 7] * (1 - 2 * (nibbles_OI >> 3))
        scale = scale * stored[f"{module}.weight_scale_2"].float()
    else:
        # modelopt 0.47 export/quant_utils.py pack_int4_in_uint8: pairs of rows, two's complement.
        nibbles_OI = torch.stack([low, high], 1).flatten(0, 1).int()
        values_OI = (nibbles_OI - 16 * (nibbles_OI >> 3)).float()
    weight_OI = values_OI * scale.repeat_interleave(values_OI.shape[1] // scale.shape[1], 1)
    # As compressed-tensors decodes NVFP4, and so `compress eval`.
    return weight_OI.bfloat16().float() if f"{module}.weight_scale_2" in stored else weight_OI


def load_gptqmodel(folder: Path) -> Any:
    """GPT-QModel's own loader, its matrices then replaced by what they dequantize to, in float32."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    for name, module in list(model.named_modules()):
        if hasattr(module, "dequantize_weight"):
            weight_OI = module.dequantize_weight().T.contiguous().float()
            bias = getattr(module, "bias", None)
            model.set_submodule(name, Fp4Linear(weight_OI, bias, None, None))
    return model


def load_transformers(folder: Path) -> Any:
    """The ordinary loader; compressed-tensors decodes what it describes."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


LOADERS = {"modelopt": load_modelopt, "gptqmodel": load_gptqmodel}


def compare(source: Any, result: Any, ids_T: torch.Tensor, first: int | None) -> dict[str, Any]:
    """Both models' perplexity and the mean KL, in the shape of ``compress eval --json``."""
    step = CONTEXT - (first is not None)
    nll, kl, scored = [0.0, 0.0], 0.0, 0
    for window_T in torch.split(ids_T, step):
        read_T = window_T if first is None else torch.cat([window_T.new_tensor([first]), window_T])
        if len(read_T) < 2:
            continue
        with torch.inference_mode():
            source_TV, result_TV = (
                model(read_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                for model in (source, result)
            )
        target_T1 = read_T[1:, None]
        nll[0] -= float(source_TV.gather(1, target_T1).double().sum())
        nll[1] -= float(result_TV.gather(1, target_T1).double().sum())
        kl += float((source_TV.exp() * (source_TV - result_TV)).sum(-1).clamp_min(0).double().sum())
        scored += len(target_T1)
    before, after = (exp(total / scored) for total in nll)
    return {
        "perplexity": {"source": before, "result": after, "increase": after / before - 1},
        "kl": {"mean": kl / scored},
        "scored_tokens": scored,
    }


def main() -> None:
    """Evaluates and writes the report."""
    source, checkpoint, heldout, peer, report = sys.argv[1:]
    with safe_open(heldout, "pt") as file:
        ids_T, metadata = file.get_tensor("ids"), file.metadata() or {}
    first = int(metadata["first"]) if "first" in metadata else None
    models = load_transformers(Path(source)), LOADERS.get(peer, load_transformers)(Path(checkpoint))
    for model in models:
        # Buffers keep their dtype: rotary frequencies may not be rounded.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        model.eval()
    Path(report).write_text(json.dumps(compare(*models, ids_T, first)))


if __name__ == "__main__":
    main()
