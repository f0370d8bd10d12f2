"""What to verify, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compressor.checkpoint.sources import From

Engine = Literal["auto", "vllm", "none"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class VerifySpec:
    """One verification.

    Attributes:
        checkpoint: the folder.
        source: what it was made from, as in a recipe's ``model.source``, or None: as its recipe says.
        revision: of a Hub source.
        from_: as in a recipe's ``model.from``, where the source itself is quantized.
        engine: ``vllm`` insists on it; ``auto`` asks it where an environment is found.
        engine_python: the interpreter of the engine's environment, or None: looked for.
        dtype: what the engine computes in; ``auto``: bfloat16, or float32 for an unquantized model on a CPU.
        text: whose tokens are scored; a path or a shipped text.
        tokens: how many.
        server: whether the OpenAI-compatible server is started and asked too.
        timeout_s: for each process of the engine, seconds.
        cache: folder for downloads; working files go beside it.
        engine_env: further environment variables of the engine's processes.
    """

    checkpoint: Path
    cache: Path
    source: str | None = None
    revision: str | None = None
    from_: From | None = None
    engine: Engine = "auto"
    engine_python: Path | None = None
    dtype: Dtype = "auto"
    text: str = "calibration/heldout.jsonl"
    tokens: int = 512
    server: bool = True
    timeout_s: float = 1800.0
    engine_env: Mapping[str, str] = field(default_factory=dict)
