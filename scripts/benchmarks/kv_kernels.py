"""One decoding step of attention over a packed KV cache on a GPU, against PyTorch's attention in bf16."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from compressor.kernels.kv_packed import Packed
from compressor.kv.formats import FORMATS
from scripts.benchmarks.process import Failed
from tests.kernels.kv_cases import packed

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3.1-8B
SHAPES = [(1, 8192), (1, 32768), (1, 131072), (32, 8192), (32, 32768), (32, 131072)]
NAMES = [
    "turboquant_4bit_nc",
    "turboquant_k3v4_nc",
    "turboquant_3bit_nc",
    "turboquant_k8v4",
    "int4_per_token_head",
]
SCALE = HEAD_DIM**-0.5
# Inputs are gone through by turns, so that a step finds none of its own in the cache of 50 MB.
BYTES_OF_ALL_SETS = 400e6
REPLAYS, REPLAY_S = 9, 0.01
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Step = Callable[[int], object]


def kv_kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Times, bytes and shares of the memory bandwidth, by batch and tokens."""
    if not torch.cuda.is_available():
        raise Failed("kv-kernels needs an NVIDIA GPU")
    names = [name for name in NAMES if not options.only or name in options.only]
    result: dict[str, Any] = {"bandwidth": _bandwidth(), "rows": [], "store": list(_stores(names))}
    limit = result["bandwidth"]["read_bytes_s"]
    print(f"\nmemory: {limit / 1e12:.2f} TB/s read\n")
    print(
        "| batch | tokens | attention | µs | GB | TB/s | of the limit | × bf16 |\n" + "|---" * 8 + "|",
        flush=True,
    )
    for batch, tokens in SHAPES:
        best = 0.0
        for row in _rows(batch, tokens, names):
            if "us" in row:
                row |= {"bytes_s": row["bytes"] / row["us"] * 1e6}
                row["share"] = row["bytes_s"] / limit
                if row["kind"] == "sdpa":
                    best = min(best or row["us"], row["us"])
                row["speedup"] = best / row["us"]
            result["rows"].append(row)
            print(_line(row), flush=True)
        _free()
    return result


def _line(row: dict[str, Any]) -> str:
    start = f"| {row['batch']} | {row['tokens']} | {row['name']} |"
    if "us" not in row:
        return f"{start} {row['error']} | | | | |"
    return (
        f"{start} {row['us']:.1f} | {row['bytes'] / 1e9:.3f} | {row['bytes_s'] / 1e12:.2f} "
        f"| {row['share']:.0%} | {row['speedup']:.2f} |"
    )


def _rows(batch: int, tokens: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """bf16 first, by every way that PyTorch has; then the formats, fused and decoded before attention."""
    size = batch * KV_HEADS * tokens
    common = {"batch": batch, "tokens": tokens}
    whole = 2 * 2 * size * HEAD_DIM
    keys, values, queries = _made(batch, tokens, _sets(whole))
    for name, step in _sdpa(queries, keys, values):
        yield {**common, "kind": "sdpa", "name": f"bf16, {name}", "bytes": whole, **_timed(step, len(keys))}
    for name in names:
        sides = packed(name, HEAD_DIM)
        bytes_ = size * sum(side.slot_bytes(HEAD_DIM) for side in sides)
        slots = [_slots(name, sides, key, value) for key, value in zip(keys, values, strict=True)]
        # more sets of slots than of bf16: the same bytes again, at other addresses
        slots += [(k.clone(), v.clone()) for k, v in slots for _ in range(_sets(bytes_) // len(slots) - 1)]
        fused = _timed(_fused(queries[0], slots, sides), len(slots))
        yield {**common, "kind": "fused", "name": name, "bytes": bytes_, **fused}
        if name == names[0]:
            made = FORMATS[name].make
            assert made is not None
            step = _decoded_first(queries[0], slots, made())
            yield {
                **common,
                "kind": "decoded",
                "name": f"{name}, decoded, then bf16",
                "bytes": bytes_,
                **_timed(step, 1, graph=False),
            }
        del slots
        _free()


def _sets(bytes_of_one: int) -> int:
    return max(1, min(48, round(BYTES_OF_ALL_SETS / bytes_of_one)))


def _made(
    batch: int, tokens: int, sets: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator(device="cuda").manual_seed(tokens + batch)

    def drawn(heads: int, length: int) -> list[torch.Tensor]:
        shape = (batch, heads, length, HEAD_DIM)
        return [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(sets)
        ]

    return drawn(KV_HEADS, tokens), drawn(KV_HEADS, tokens), drawn(HEADS, 1)


def _slots(
    name: str, sides: tuple[Packed, Packed], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from compressor.kernels.kv_store_cuda import encode

    def one(x: torch.Tensor, side: Packed) -> torch.Tensor:
        return x.to(torch.float8_e4m3fn).view(torch.uint8) if side.kind == "e4m3" else encode(x, side)

    return one(key, sides[0]), one(value, sides[1])


def _sdpa(
    queries: list[torch.Tensor], keys: list[torch.Tensor], values: list[torch.Tensor]
) -> Iterator[tuple[str, Step]]:
    """Query heads as such, or those of a KV head as its queries: without a mask that is the same."""
    group = HEADS // KV_HEADS
    folded = [q.view(len(q), KV_HEADS, group, HEAD_DIM) for q in queries]
    for name, backend in BACKENDS.items():
        for way, inputs, gqa in (("GQA", queries, True), ("folded", folded, False)):

            def step(i: int, inputs: Any = inputs, gqa: bool = gqa, backend: SDPBackend = backend) -> object:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(inputs[i], keys[i], values[i], enable_gqa=gqa)

            yield f"{name}, {way}", step


def _fused(
    query: torch.Tensor, slots: list[tuple[torch.Tensor, torch.Tensor]], sides: tuple[Packed, Packed]
) -> Step:
    from compressor.kernels.kv_decode_cuda import decode_attention

    return lambda i: decode_attention(query[:, :, 0], *slots[i], *sides, SCALE)


def _decoded_first(query: torch.Tensor, slots: list[tuple[torch.Tensor, torch.Tensor]], codecs: Any) -> Step:
    def step(i: int) -> object:
        keys, values = (
            codec.decode(part, HEAD_DIM, torch.bfloat16) for codec, part in zip(codecs, slots[i], strict=True)
        )
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


def _timed(step: Step, sets: int, *, graph: bool = True) -> dict[str, Any]:
    """Microseconds of a step over all inputs by turns, from a CUDA graph: without the host's launches."""

    def turn() -> None:
        for i in range(sets):
            step(i)

    replay = turn
    try:
        turn()
        torch.cuda.synchronize()
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                turn()
            replay = captured.replay
        often = max(1, min(50, int(REPLAY_S / max(_elapsed(replay, 1) for _ in range(2)))))
        times = [_elapsed(replay, often) / sets for _ in range(REPLAYS)]
    except RuntimeError as error:  # out of memory, or a backend that does not take these inputs
        return {"error": str(error).strip().splitlines()[0][:60]}
    micro = [1e6 * one for one in times]
    return {"us": statistics.median(micro), "us_min": min(micro), "us_max": max(micro), "sets": sets}


def _elapsed(work: Callable[[], object], often: int) -> float:
    """Seconds of one of so many."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(often):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / often


def _bandwidth() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and of a sum over 4 GB."""
    x = torch.randint(0, 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda").view(torch.float32)
    y = torch.empty_like(x)
    copy, read = _timed(lambda _: y.copy_(x), 1), _timed(lambda _: x.sum(), 1)
    _free()
    return {
        "copy_bytes_s": 2e6 * x.nbytes / copy["us"],
        "read_bytes_s": 1e6 * max(x.nbytes / read["us"], 2 * x.nbytes / copy["us"]),
    }


def _stores(names: list[str]) -> Iterator[dict[str, Any]]:
    """32,768 tokens quantized."""
    keys, values, _ = _made(1, 32768, 4)
    print("| store | side | µs | TB/s |\n|---|---|---|---|", flush=True)
    for name in names:
        for side, what, inputs in zip(
            packed(name, HEAD_DIM), ("keys", "values"), (keys, values), strict=True
        ):
            if side.kind == "e4m3":
                continue
            from compressor.kernels.kv_store_cuda import encode

            row = _timed(lambda i, side=side, inputs=inputs: encode(inputs[i], side), len(inputs))
            moved = inputs[0].nbytes + inputs[0].numel() // HEAD_DIM * side.slot_bytes(HEAD_DIM)
            row |= {"name": name, "side": what, "bytes": moved, "bytes_s": 1e6 * moved / row["us"]}
            print(f"| {name} | {what} | {row['us']:.1f} | {row['bytes_s'] / 1e12:.2f} |", flush=True)
            yield row


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
