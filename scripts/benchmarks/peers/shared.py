"""What every worker of a peer shares: its job, its clock and its report.

A worker is a script that one environment's Python runs. It imports only torch, transformers and the peer; it
loads the bf16 source folder, quantizes it on the given token ids, saves a checkpoint and says what it took.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
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
# How often a run that may be stopped for its time says what it took so far.
_BEAT_S = 1.0


class Job:
    """One run, as the parent wrote it down.

    Attributes:
        source: folder of the bf16 model.
        target: folder for the checkpoint.
        scheme: ``nvfp4a16``, ``int4g64`` or ``nvfp4``.
        options: of the setting, see ``benchmarks/settings.py``.
        ids_NT: int64 calibration tokens [rows, tokens of a row].
        saving: whether the checkpoint is wanted.
        device: ``cuda`` where there is one.
    """

    def __init__(self, path: str) -> None:
        facts = json.loads(Path(path).read_text())
        self.source = Path(facts["source"])
        self.target = Path(facts["target"])
        self.scheme: str = facts["scheme"]
        self.options: dict[str, Any] = facts["options"]
        self.ids_NT: torch.Tensor = load_file(facts["ids"])["ids"]
        self.saving: bool = facts.get("saving", True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._report = Path(facts["report"])
        self._seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self._marks: list[float] = []

    @classmethod
    def from_command_line(cls) -> Job:
        """The job whose file is the first argument."""
        return cls(sys.argv[1])

    def model(self, device: str | None = None) -> Any:
        """The source in bfloat16, on ``device`` or the job's own."""
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.bfloat16)
        return model.to(device or self.device)

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

    def mark(self) -> None:
        """Notes that one more layer is finished; counted from the start of ``beating``."""
        self._wait()
        self._marks.append(time.monotonic() - self._began)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keeps the file ``REPORT.beat`` up to date, for a run that its parent may have to stop."""
        self._began = time.monotonic()
        stop = threading.Event()

        def beat() -> None:
            building = self._report.with_suffix(".building")
            while not stop.wait(_BEAT_S):
                building.write_text(
                    json.dumps({"elapsed_s": time.monotonic() - self._began, **self._state()})
                )
                building.replace(self._report.with_suffix(".beat"))

        beater = threading.Thread(target=beat, daemon=True)
        beater.start()
        try:
            yield
        finally:
            stop.set()
            beater.join()

    def _state(self) -> dict[str, Any]:
        return {
            "marks_s": list(self._marks),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            # Linux counts ru_maxrss in KiB.
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def report(self, packages: Sequence[str] = (), **facts: Any) -> None:
        """Writes what was measured; ``packages`` are the peer's distributions, for their versions."""
        versions = {}
        for package in (*packages, *LIBRARIES):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        cost = {**self._seconds, **self._state()}
        self._report.write_text(json.dumps({**cost, "versions": versions, "device": self.device, **facts}))

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
