"""Lets vLLM's Triton kernels be imported from its sources alone, where vLLM is not installed.

vLLM takes gigabytes and a network to install; its kernels for KV caches take ten files and Triton. Everything
else that these files import is replaced by the few names that they use of it. To copy them:

    python scripts/vllm_kernels_alone.py .venv-serve/lib/python3.11/site-packages/vllm TARGET/vllm
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSION = "_version.py"
KERNELS = (
    "v1/attention/ops/triton_turboquant_store.py",
    "v1/attention/ops/triton_turboquant_decode.py",
    "v1/attention/ops/triton_decode_attention.py",
    "v1/attention/ops/triton_reshape_and_cache_flash.py",
    "v1/attention/ops/int4_per_token_head.py",
    "v1/attention/ops/triton_attention_helpers.py",
    "v1/attention/ops/triton_unified_attention.py",
    "model_executor/layers/quantization/turboquant/config.py",
    "model_executor/layers/quantization/turboquant/centroids.py",
    "utils/math_utils.py",
)


class KVQuantMode(IntEnum):
    """Names of ``vllm/v1/kv_cache_interface.py``."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def install(package: Path) -> None:
    """Makes ``import vllm...`` find the files of ``KERNELS`` below ``package`` (the folder named vllm)."""
    import triton
    import triton.language as tl

    missing = [name for name in KERNELS if not (package / name).is_file()]
    if missing:
        raise SystemExit(f"{package} lacks {', '.join(missing)}")
    for name in KERNELS:
        for folder in [*Path(name).parents][::-1]:
            _add(".".join(("vllm", *folder.parts)), __path__=[str(package / folder)])
    version = re.search(r"version = '([^']+)'", (package / VERSION).read_text())
    sys.modules["vllm"].__dict__["__version__"] = version[1] if version else "unknown"
    on_gpu = torch.cuda.is_available()
    fp8 = torch.float8_e4m3fn
    platform = SimpleNamespace(
        is_cuda=lambda: on_gpu,
        is_cuda_alike=lambda: on_gpu,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        fp8_dtype=lambda: fp8,
        has_device_capability=lambda least: False,  # no hadacore: it is compiled, not Triton
        is_device_capability_family=lambda family: False,
    )
    _add("vllm.platforms", current_platform=platform)
    _add("vllm.triton_utils", triton=triton, tl=tl)
    _add("vllm.logger", init_logger=logging.getLogger)
    _add("vllm.envs", VLLM_BATCH_INVARIANT=False)
    _add("vllm.utils.torch_utils", is_quantized_kv_cache=lambda dtype: dtype.startswith("fp8"))
    _add("vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)
    limits = torch.finfo(fp8)
    _add("vllm.model_executor.layers.quantization.utils")
    _add(
        "vllm.model_executor.layers.quantization.utils.quant_utils",
        FP8_DTYPE=fp8,
        get_fp8_min_max=lambda: (limits.min, limits.max),
    )


def _add(name: str, **attributes: Any) -> None:
    """A module that holds the attributes, known to its parent."""
    if name in sys.modules:
        return
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def copy(package: Path, target: Path) -> None:
    """Copies what ``install`` needs."""
    for name in (*KERNELS, VERSION):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / name, target / name)


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]))
