"""The device that computes. The only file that names ``torch.cuda``; torch is imported when asked for."""

from __future__ import annotations

import ctypes
import gc
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# glibc's malloc.h; blocks of so many bytes have pages of their own.
_M_MMAP_THRESHOLD, _RETURNED_BYTES = -3, 4 << 20
_M_ARENA_MAX = -8
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_accelerator() -> bool:
    """Whether ``pick_device()`` is an accelerator; imports torch only where the machine has a driver."""
    return Path("/dev/nvidiactl").exists() and pick_device().type == "cuda"


def device_name() -> str:
    """The model of ``pick_device()``, as reports print it: the accelerator's or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())


@dataclass(frozen=True)
class Accelerator:
    """One CUDA device: its name, memory in all and free, and compute capability; (0, 0) where it has none."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]


def accelerators() -> tuple[Accelerator, ...]:
    """Every CUDA device that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        # Of AMD's the numbers mean something else.
        capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)
        found.append(Accelerator(torch.cuda.get_device_name(index), total, free, capability))
    return tuple(found)


def multiplied_natively(capability: tuple[int, int]) -> tuple[str, ...]:
    """Formats that tensor cores of a compute capability multiply (CUDA C++ programming guide, table of
    compute capabilities); none where it is not known.
    """
    since = (("bf16", (8, 0)), ("int8", (7, 5)), ("fp8", (8, 9)), ("fp4", (10, 0)))
    return tuple(name for name, least in since if capability >= least)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read afterwards means something."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak() -> None:
    """Starts a new measurement for ``peak_device_bytes``."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_device_bytes() -> int:
    """Most bytes allocated on the accelerator since ``reset_peak``; 0 without one: see the RSS instead."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def device_bytes() -> int:
    """Bytes that are allocated on the accelerator now; 0 without one."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA, AMX-BF16, AVX512-BF16), else float32."""
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(_cpu_flags() & _BF16_FLAGS)
    return torch.bfloat16 if native else torch.float32


def has_fast_bfloat16() -> bool:
    """Whether ``fast_dtype(pick_device())`` is bfloat16; imports torch only where there is an accelerator."""
    if has_accelerator():
        import torch

        return fast_dtype(pick_device()) == torch.bfloat16
    return bool(_cpu_flags() & _BF16_FLAGS)


def _cpu_flags() -> set[str]:
    """Instruction sets as the kernel names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())


def return_freed_memory() -> None:
    """From now on the C library gives tensors of some MB back to the system as soon as they are freed.

    Left to itself, glibc raises that size up to 32 MB, and each thread keeps what it frees for itself. Other
    C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if platform.libc_ver()[0] == "glibc" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        mallopt(_M_ARENA_MAX, 1)


def collect_memory() -> None:
    """Collects what is no longer used and has glibc return it to the system.

    Of what is freed, it keeps all blocks that are smaller than those that it maps by themselves (32 MB, if
    ``return_freed_memory`` set no other size), and loaders' threads allocate from heaps of their own.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_device_bytes() -> int:
    """Free memory of the accelerator that ``pick_device()`` gives."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def available_memory_bytes() -> int:
    """Host memory that a process may still take: what is free, within the control group's limit."""
    import psutil

    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return min(free, max(0, limit - used))
