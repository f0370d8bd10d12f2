"""What every worker of a peer shares: its job, its clock and its report.

A worker is a script that one environment's Python runs. It imports only torch, transformers and the peer; it
loads the bf16 source folder, quantizes it on the given token ids, saves a checkpoint and says what it took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LIBRARIES = ("torch", "transformers", "compressed-tensors", "numpy")


class Job:
    """One run, as the parent wrote it down.

    Attributes:
        source: folder of the bf16 model.
        target: folder for the checkpoint.
        scheme: ``nvfp4a16``, ``int4g64`` or ``nvfp4``.
        options: of the setting, see ``benchmarks/settings.py``.
        ids_NT: int64 calibration tokens [rows, tokens of a row].
        device: ``cuda`` where there is one.
    """

    def __init__(self, path: str) -> None:
        facts = json.loads(Path(path).read_text())
        self.source = Path(facts["source"])
        self.target = Path(facts["target"])
        self.scheme: str = facts["scheme"]
        self.options: dict[str, Any] = facts["options"]
        self.ids_NT: torch.Tensor = load_file(facts["ids"])["ids"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._report = Path(facts["report"])
        self._seconds: dict[str, float] = {}

    @classmethod
    def from_command_line(cls) -> Job:
        """The job whose file is the first argument."""
        return cls(sys.argv[1])

    def model(self) -> Any:
        """The source in bfloat16, on the device."""
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.bfloat16)
        return model.to(self.device)

    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return AutoTokenizer.from_pretrained(self.source)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the block's wall seconds as ``PART_s`` of the report."""
        self._wait()
        started = time.monotonic()
        yield
        self._wait()
        self._seconds[f"{part}_s"] = time.monotonic() - started

    def report(self, packages: Sequence[str] = (), **facts: Any) -> None:
        """Writes what was measured; ``packages`` are the peer's distributions, for their versions."""
        versions = {}
        for package in (*packages, *LIBRARIES):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        cost = {**self._seconds, "peak_device_bytes": peak}
        self._report.write_text(json.dumps({**cost, "versions": versions, "device": self.device, **facts}))

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
