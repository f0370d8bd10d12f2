"""Processes of an engine: in a group of their own, without our Python's settings, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05
_TAIL_BYTES = 16384
_LINE_CHARS = 300

# How a process is asked to end, and how long it is given, before its whole group is killed.
Patience = Sequence[tuple[signal.Signals, float]]
NO_PATIENCE: Patience = ()


def engine_environment(python: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine whose interpreter is ``python``: ours, less what steers our own Python.

    Its programs (``ninja`` compiles kernels) come first in ``PATH``, and neither a script's folder nor the
    current one is searched for modules.
    """
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    env["PATH"] = os.pathsep.join([str(python.parent), env.get("PATH", os.defpath)])
    return env | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | dict(extra)


@contextmanager
def running(
    command: Sequence[str], *, log: Path, env: Mapping[str, str], patience: Patience = NO_PATIENCE
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a new process group and its log's folder; at the end the whole group is gone.

    Standard input is a pipe that stays open: its end tells the command that this process died.

    Args:
        command: program and arguments.
        log: receives standard output and error; overwritten.
        env: the whole environment.
        patience: signals for the command, each with the seconds to wait before the next one.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process, patience)


def ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Waits; whether the process ended in time. It is not reaped, so its group's number stays taken."""
    deadline = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Words for the exit status of a process that has been reaped: ``was killed by SIGSEGV``."""
    status = process.returncode
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"was killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


def last_line(log: Path) -> str:
    """The last line of a log that holds anything, shortened; empty if there is none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(char for char in line if char.isprintable())[:_LINE_CHARS]


def _end(process: subprocess.Popen[bytes], patience: Patience) -> None:
    for number, seconds in patience:
        if not ended(process, 0.0):
            os.kill(process.pid, number)
            ended(process, seconds)
    # The leader is not reaped yet, even if it is dead: the number cannot mean another group.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
