"""Decoding of random models of real shapes against what the plan's roofline predicts, on this device.

The model is transformers' own (Llama), with random weights and a cache of so many tokens; a step gives each
sequence one token. On a GPU the step is replayed from a CUDA graph, as engines do, so that the interpreter is
not timed. In 4 bit the matrices of the layers are PyTorch's ``_weight_int4pack_mm``: codes with a bfloat16
scale and zero for each 128 inputs; embeddings and head stay in 16 bit, as the plan has them.

Two predictions are compared with what is measured:

- ``roofline``: bytes that the plan counts (``planner.roofline``) over the memory bandwidth that a sum over
  4 GB reaches here; nothing of the model enters but its shapes.
- ``parts``: the same with what recipes call ``efficiency`` and ``step_overhead_us``: matrices at the rate
  that one large product in their format reaches, what attention takes beyond its bytes, and for each
  other kernel of the step the time of a small one; each is measured apart from the model.

On a GPU norms, rotary positions and the product of gates are compiled (``torch.compile``), so that a layer
has about as few kernels as in engines; ``--eager`` leaves them as they are.

Rows are written as they come. Legend: B sequences, T tokens, Q query heads, H KV heads, D head_dim,
O out_features, I in_features, G groups.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.planner.attention_work import attention_layers, prompt_flops, written_flops
from compressor.planner.claims import claim_tensors
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.roofline import Load, prompt_seconds, step_seconds
from compressor.planner.served import plain_cache
from compressor.planner.weight_load import WeightLoad, result_load, source_load
from compressor.recipe.gpus import Gpu
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from scripts.benchmarks.process import own_command, store

_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_1B = _8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_3B = _1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
_SMALL = _1B | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "vocab_size": 32000,
}
_TINY = _SMALL | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
# By Llama 3.1 8B, 3.2 3B and 3.2 1B; the others are for machines without a GPU and for trials.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _8B,
    "llama-3b": _3B,
    "llama-1b": _1B,
    "small": _SMALL,
    "tiny": _TINY,
}
GROUP = 128
_SCHEMES = {16: {"kind": "int4"}, 4: {"kind": "int4", "group_size": GROUP, "symmetric": False}}
_INNER_TILES = 8  # of ``_convert_weight_to_int4pack``: the most, for the longest reads
_REPLAYS, _REPLAY_S = 9, 0.02
_LAUNCHES = 1000
_ATTENTION = "roofline"
# A matrix of 16 bit is larger than the cache of any GPU; several by turns, so that none is found there.
_RATE_SIDE = {"cuda": 8192, "cpu": 4096}
_RATE_MATRICES = {16: 4, 4: 12}
_READ_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
_PROMPT = {"cuda": 2048, "cpu": 128}
Step = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """What this device does, measured apart from any model.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        read_bytes_s: of memory, by a sum.
        copy_bytes_s: read and written, by a copy.
        kernel_s: of a small kernel in a row of them.
        flops: operations a second of a large bf16 product.
    """

    kind: str
    read_bytes_s: float
    copy_bytes_s: float
    kernel_s: float
    flops: float

    def gpu(self) -> Gpu:
        """As the plan's table has GPUs."""
        return Gpu("this device", 0, self.read_bytes_s, {"bf16": self.flops}, "measured")


def roofline(options: argparse.Namespace) -> dict[str, Any]:
    """Rows of measured and predicted milliseconds by shape, bits and batch."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    AttentionInterface.register(_ATTENTION, _attend)
    started = time.monotonic()
    if kind == "cuda" and not options.eager:
        fuse_small_kernels()
    device = measured_device(kind)
    result: dict[str, Any] = {"command": own_command(), "device": vars(device), "rows": [], "left_out": []}
    store(options.result_name, result)
    print(
        f"\nmemory: {device.read_bytes_s / 1e9:,.1f} GB/s read, {device.copy_bytes_s / 1e9:,.1f} GB/s "
        f"copied; bf16: {device.flops / 1e12:,.2f} TFLOP/s; a small kernel: {1e6 * device.kernel_s:.2f} µs\n"
    )
    heads = "model | bits | what | batch | tokens | ms | tokens/s | roofline ms | off | parts ms | off"
    print(f"| {heads} |\n|{' --- |' * 11}", flush=True)
    rates: dict[tuple[int, int], float] = {}
    for shape in options.shapes or (["llama-8b", "llama-1b"] if kind == "cuda" else ["small"]):
        model = _made(shape, kind)
        for bits in options.bits:
            if bits == 4:
                pack_layers(model)
            for batch in options.batches:
                what = f"{shape}, {bits} bit, batch {batch}"
                if time.monotonic() - started > 60 * options.minutes:
                    result["left_out"].append(f"{what}: the time is up")
                    continue
                if (bits, batch) not in rates:
                    rates[bits, batch] = matrix_rate(kind, bits, batch)
                row = _row(result, what, model, device, bits, batch, options.decode_context, rates)
                if row is not None:
                    _told(result, options, {"model": shape, **row})
            if bits == 16 and time.monotonic() - started <= 60 * options.minutes:
                _told(result, options, {"model": shape, **_prefilled(model, device)})
        del model
        _free()
    return result


def _row(result: dict[str, Any], what: str, *how: Any) -> dict[str, Any] | None:
    """A row of ``_decoded``, without compiled parts if it fails with them; None where it fails again."""
    for retried in (False, True):
        try:
            return _decoded(*how)
        except (RuntimeError, NotImplementedError) as error:  # no memory, no such kernel, no graph of it
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            result["left_out"].append(f"{what}{', nothing compiled' if retried else ''}: {said}")
            torch.compiler.set_stance("force_eager")
            _free()
    return None


def _told(result: dict[str, Any], options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Prints and stores a row at once: a run may be stopped."""
    result["rows"].append(row)
    store(options.result_name, result)
    parts = ("-", "-")
    if row["parts_ms"] is not None:
        parts = (f"{row['parts_ms']:.3f}", f"{row['parts_off']:+.1%}")
    print(
        f"| {row['model']} | {row['bits']} | {row['what']} | {row['batch']} | {row['tokens']} "
        f"| {row['ms']:.3f} | {row['tokens_s']:,.1f} | {row['roofline_ms']:.3f} | {row['roofline_off']:+.1%} "
        f"| {parts[0]} | {parts[1]} |",
        flush=True,
    )


# --- the model and its step ---


def _made(shape: str, kind: str) -> nn.Module:
    """A random model in bfloat16."""
    config = AutoConfig.for_model("llama", **SHAPES[shape], max_position_embeddings=131072)
    torch.manual_seed(0)
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=_ATTENTION)
    return model.eval()


class _Held:
    """A full cache whose last token each step writes anew, so that every step is the same.

    Attributes:
        layers: keys and values of each, [B, H, T, D].
    """

    is_compileable = False

    def __init__(self, model: nn.Module, batch: int, tokens: int) -> None:
        config = model.config
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        weight = model.model.norm.weight
        self._tokens = tokens
        self.layers = [
            tuple(torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the new one."""
        return self._tokens - 1

    def update(
        self, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole sequence."""
        keys_BHTD, values_BHTD = self.layers[layer_idx]
        keys_BHTD[:, :, -1:].copy_(key_BHTD)
        values_BHTD[:, :, -1:].copy_(value_BHTD)
        return keys_BHTD, values_BHTD


def _attend(
    module: nn.Module,
    query_BQTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention over whole KV heads: a step sees the whole cache, a prompt what lies before."""
    causal = query_BQTD.shape[2] > 1
    out_BQTD = scaled_dot_product_attention(
        query_BQTD, key_BHTD, value_BHTD, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out_BQTD.transpose(1, 2).contiguous(), None


def decoding_step(model: nn.Module, batch: int, tokens: int) -> Step:
    """One token for each of ``batch`` sequences of ``tokens`` tokens."""
    place = model.model.norm.weight.device
    held = _Held(model, batch, tokens)
    ids = torch.full((batch, 1), 7, device=place)
    positions = torch.full((batch, 1), tokens - 1, device=place)
    # Four dimensions are taken as they are; what attends does not ask for it.
    mask = torch.zeros(1, 1, 1, tokens, device=place, dtype=torch.bfloat16)

    @torch.no_grad()
    def step() -> object:
        return model(ids, position_ids=positions, attention_mask=mask, past_key_values=held).logits

    return step


class PackedLinear(nn.Module):
    """A product with random 4-bit codes, by PyTorch's own kernel.

    Attributes:
        codes: as the kernel wants them.
        scales_GO2: a scale and a zero for each group.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        self._out = out_features
        scales_GO2 = torch.full((in_features // GROUP, out_features, 2), 1e-3, dtype=torch.bfloat16)
        self.scales_GO2 = scales_GO2.to(device)
        if device.type == "cuda":
            codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
            self.codes = torch.ops.aten._convert_weight_to_int4pack(codes, _INNER_TILES)
            self._product = torch.ops.aten._weight_int4pack_mm
        else:
            values = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
            self._product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        y_NO = self._product(x.reshape(-1, x.shape[-1]), self.codes, GROUP, self.scales_GO2)
        return y_NO.view(*x.shape[:-1], self._out)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return int(self.codes.nbytes + self.scales_GO2.nbytes)


def pack_layers(model: nn.Module) -> None:
    """Puts 4-bit products in the place of the layers' matrices; those in 16 bit are let go."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    packed = PackedLinear(child.out_features, child.in_features, child.weight.device)
                    setattr(part, name, packed)
    _free()


def fuse_small_kernels() -> None:
    """Compiles what lies between the products of a layer; what cannot be compiled stays as it is."""
    torch._dynamo.config.suppress_errors = True
    # Each width and batch has kernels of its own, as an engine's graphs have.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    modeling_llama.LlamaRMSNorm.forward = torch.compile(modeling_llama.LlamaRMSNorm.forward)
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb)
    modeling_llama.LlamaMLP.forward = torch.compile(modeling_llama.LlamaMLP.forward)


# --- what the plan says ---


@cache
def planned_load(shape: str, bits: int, tokens: int) -> Load:
    """What a plan counts for the shape: the same claims, weights and cache as a recipe's."""
    config = AutoConfig.for_model("llama", **SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    headers = {
        name: TensorHeader(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }
    told = config.to_dict()
    section = WeightsSection.model_validate({"scheme": _SCHEMES[bits]})
    claims = claim_tensors(headers, told, family_for(told), section, DIALECTS["compressed-tensors"])
    weights: WeightLoad = source_load(claims, told) if bits == 16 else result_load(claims, told)
    work, _ = attention_layers(told)
    layers, _ = kv_layers(told)
    cached = plain_cache(layers).moved(tokens)
    return Load(weights, cached, written_flops(work, tokens), prompt_flops(work, tokens))


def _decoded(
    model: nn.Module,
    device: Device,
    bits: int,
    batch: int,
    tokens: int,
    rates: dict[tuple[int, int], float],
) -> dict[str, Any]:
    """A row: a step measured, and predicted in both ways."""
    step = decoding_step(model, batch, tokens)
    kernels = kernel_count(step, device.kind)
    seconds = timed(step, device.kind)
    load = planned_load(_shape_of(model), bits, tokens)
    predicted = step_seconds(load, batch, device.gpu(), 1)
    rate = rates[bits, batch]
    if (16, batch) not in rates:
        rates[16, batch] = matrix_rate(device.kind, 16, batch)
    attention = attention_seconds(model, batch, tokens, device.kind)
    layers = model.config.num_hidden_layers
    weights = load.weights
    # The head stays in 16 bit.
    matrices = (weights.read(batch) - weights.head_bytes) / rate + weights.head_bytes / rates[16, batch]
    efficiency = min(1.0, weights.read(batch) / matrices / device.read_bytes_s)
    gpu = replace(device.gpu(), bandwidth=efficiency * device.read_bytes_s)
    beyond = layers * attention - batch * load.cache_bytes / gpu.bandwidth
    overhead_s = max(0.0, beyond) + max(0, kernels - layers) * device.kernel_s
    parts = step_seconds(load, batch, gpu, 1, fixed_s=overhead_s)
    return {
        "bits": bits,
        "what": "decode",
        "batch": batch,
        "tokens": tokens,
        "kernels": kernels,
        "bytes": load.moved(batch),
        "matrix_bytes_s": rate,
        "attention_us": 1e6 * attention,
        "efficiency": efficiency,
        "step_overhead_us": 1e6 * overhead_s,
        "tokens_s": batch / seconds["median"],
        "ms_min": 1e3 * seconds["min"],
        "ms_max": 1e3 * seconds["max"],
        **_compared(seconds["median"], predicted, parts),
    }


def _prefilled(model: nn.Module, device: Device) -> dict[str, Any]:
    """A row: a prompt of one sequence, against its arithmetic."""
    tokens = _PROMPT[device.kind]
    place = model.model.norm.weight.device
    ids = torch.full((1, tokens), 7, device=place)
    mask = torch.zeros(1, 1, 1, 1, device=place, dtype=torch.bfloat16)

    @torch.no_grad()
    def prompt() -> object:
        return model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits

    # The widths of a prompt are not compiled: nothing there waits for small kernels.
    with torch.compiler.set_stance("force_eager"):
        seconds = timed(prompt, device.kind, graph=False)
    predicted = prompt_seconds(planned_load(_shape_of(model), 16, tokens), tokens, device.gpu(), 1)
    return {
        "bits": 16,
        "what": "prompt",
        "batch": 1,
        "tokens": tokens,
        "tokens_s": tokens / seconds["median"],
        "ms_min": 1e3 * seconds["min"],
        "ms_max": 1e3 * seconds["max"],
        **_compared(seconds["median"], predicted, None),
    }


def _compared(measured: float, predicted: float, parts: float | None) -> dict[str, Any]:
    """Milliseconds, and how far predictions are off: 0.1 where a tenth more is predicted than measured."""
    return {
        "ms": 1e3 * measured,
        "roofline_ms": 1e3 * predicted,
        "roofline_off": predicted / measured - 1,
        "parts_ms": None if parts is None else 1e3 * parts,
        "parts_off": None if parts is None else parts / measured - 1,
    }


def _shape_of(model: nn.Module) -> str:
    found = [
        name
        for name, sizes in SHAPES.items()
        if all(getattr(model.config, key) == value for key, value in sizes.items())
    ]
    return found[0]


# --- what the device does ---


def measured_device(kind: str) -> Device:
    """Bandwidth, arithmetic and the time of a small kernel."""
    read, copied = _memory(kind)
    _free()
    side = _RATE_SIDE[kind]
    a, b = (torch.randn(side, side, device=kind, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, kind)["median"]
    return Device(kind, max(read, copied), copied, _small_kernel(kind), 2 * side**3 / product)


def _memory(kind: str) -> tuple[float, float]:
    """Bytes a second of a sum, and of a copy, read and written."""
    x = torch.ones(_READ_BYTES[kind] // 4, device=kind)
    y = torch.empty_like(x)
    copied, read = timed(lambda: y.copy_(x), kind)["median"], timed(lambda: x.sum(), kind)["median"]
    return x.nbytes / read, 2 * x.nbytes / copied


def _small_kernel(kind: str) -> float:
    """Seconds of one kernel in a row of those that norms are made of, on a vector of 4,096."""
    x = torch.randn(1, 4096, device=kind, dtype=torch.bfloat16)
    small = 6

    def norms() -> None:
        y = x
        for _ in range(_LAUNCHES // small):
            z = y.float()
            y = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True))).to(torch.bfloat16)

    return timed(norms, kind)["median"] / (_LAUNCHES // small * small)


def matrix_rate(kind: str, bits: int, batch: int) -> float:
    """Bytes a second that one large product with ``batch`` vectors reads of its matrix in a format."""
    side = _RATE_SIDE[kind]
    place = torch.device(kind)
    count = _RATE_MATRICES[bits]
    x = torch.randn(batch, side, device=place, dtype=torch.bfloat16)
    if bits == 4:
        products: list[Any] = [PackedLinear(side, side, place) for _ in range(count)]
        nbytes = sum(product.nbytes for product in products)
    else:
        with place:
            products = [nn.Linear(side, side, bias=False, dtype=torch.bfloat16) for _ in range(count)]
        nbytes = sum(product.weight.nbytes for product in products)

    with torch.no_grad():
        seconds = timed(lambda: [product(x) for product in products], kind)["median"]
    return nbytes / seconds


def attention_seconds(model: nn.Module, batch: int, tokens: int, kind: str) -> float:
    """Seconds of one layer's attention by itself, over caches by turns."""
    config = model.config
    held = _Held(model, batch, tokens)
    query_BQTD = torch.randn(
        batch, config.num_attention_heads, 1, config.head_dim, device=kind, dtype=torch.bfloat16
    )
    caches = held.layers

    def turn() -> None:
        for keys_BHTD, values_BHTD in caches:
            _attend(model, query_BQTD, keys_BHTD, values_BHTD, None, config.head_dim**-0.5)

    with torch.no_grad():
        return timed(turn, kind)["median"] / len(caches)


def kernel_count(step: Step, kind: str) -> int:
    """Kernels of a step: what a GPU ran; on a CPU operations that are no views."""
    step()
    if kind == "cpu":
        with _Counter() as counter:
            step()
        return counter.count
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    # Regions that only name a stretch of kernels are events of the device, too.
    found = sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation and "Compiled" not in event.name
        for event in seen.events()
    )
    if found:
        return found
    with _Counter() as counter:  # the profiler sees nothing here: operations, as on a CPU
        step()
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def timed(work: Step, kind: str, *, graph: bool = True) -> dict[str, float]:
    """Seconds: smallest, median and largest of some rounds; on a GPU from a graph unless it is not to be."""
    for _ in range(2):
        work()
    run = work
    if kind == "cuda" and graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        run = captured.replay
    once = min(_elapsed(run, 1, kind) for _ in range(2))
    often = max(1, min(200, int(_REPLAY_S / once)))
    found = [_elapsed(run, often, kind) / often for _ in range(_REPLAYS)]
    return {"min": min(found), "median": statistics.median(found), "max": max(found)}


def _elapsed(work: Step, often: int, kind: str) -> float:
    """Seconds of so many."""
    if kind == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(often):
        work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
