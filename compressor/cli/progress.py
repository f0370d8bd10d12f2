"""Progress on stderr: bars on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from compressor.progress import Progress as Reporter
from compressor.progress import Silent, Unit

_PLAIN_EVERY_S = 15.0
# In a narrow terminal what is being worked on matters more than the bar.
_NARROW = 80
_BAR_WIDTH, _SHORT_BAR_WIDTH = 20, 6


class _Rate(ProgressColumn):
    """Units a second, as a person says them."""

    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed or 0.0, task.fields["unit"]))


class _Memory(ProgressColumn):
    """This process's resident memory now."""

    def render(self, task: Task) -> Text:
        return Text(f"{psutil.Process().memory_info().rss / 1e9:.1f} GB")


def rate_text(per_second: float, unit: Unit) -> str:
    """``0.53 GB/s``, ``812 tokens/s``; nothing of shares of work."""
    if unit == "work":
        return ""
    if unit == "bytes":
        return f"{per_second / 1e9:.2f} GB/s" if per_second >= 1e9 else f"{per_second / 1e6:.0f} MB/s"
    return f"{per_second:,.0f} {unit}/s"


def left_text(seconds: float) -> str:
    """``1:05 left``; with hours ``2:03:00 left``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{clock} left"


class Bars:
    """rich bars: stage, shard, share done, rate, time left, memory."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=_BAR_WIDTH if console.width >= _NARROW else _SHORT_BAR_WIDTH),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeRemainingColumn(compact=True),
            _Memory(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._started = 0.0

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int, unit: Unit, done: int = 0) -> None:
        """Adds the stage's bar."""
        self._name, self._started = stage, time.monotonic()
        self._task = self._bars.add_task(stage, total=max(total, 1), completed=done, unit=unit, note="")

    def advance(self, amount: int, note: str = "") -> None:
        """Moves the bar."""
        if self._task is not None:
            self._bars.update(self._task, advance=amount, note=note)

    def finish(self, resumed: bool = False) -> None:
        """Replaces the bar by a line."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        took = "already done" if resumed else f"{time.monotonic() - self._started:.1f} s"
        self._console.print(f"{self._name}: {took}", highlight=False)

    def log(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A line above the bars that stands out."""
        self._console.print(Text(f"warning: {text}", style="yellow"))


class Lines:
    """Plain lines, or JSON lines: a start, at most one line every 15 seconds, an end."""

    def __init__(self, stream: IO[str], *, as_json: bool) -> None:
        self._stream = stream
        self._json = as_json
        self._name, self._total, self._found, self._done = "", 0, 0, 0
        self._unit: Unit = "items"
        self._started = self._said = 0.0

    def start(self, stage: str, total: int, unit: Unit, done: int = 0) -> None:
        """Says that the stage begins."""
        self._name, self._total, self._found, self._unit = stage, total, done, unit
        self._done = done
        self._started = self._said = time.monotonic()
        self._put("start", f"{stage}: started", total=total, done=done, unit=unit)

    def advance(self, amount: int, note: str = "") -> None:
        """Says how far the stage is, now and then."""
        self._done += amount
        now = time.monotonic()
        if now - self._said < _PLAIN_EVERY_S:
            return
        self._said = now
        # What was found finished took no time now.
        per_second = (self._done - self._found) / (now - self._started)
        left = left_text((self._total - self._done) / per_second) if per_second > 0 else ""
        share = f"{100 * self._done / max(1, self._total):.0f}%"
        said = [share, rate_text(per_second, self._unit), left, note]
        text = f"{self._name}: {' '.join(filter(None, said))}"
        self._put("progress", text, done=self._done, total=self._total)

    def finish(self, resumed: bool = False) -> None:
        """Says that the stage is done."""
        wall_s = time.monotonic() - self._started
        took = "already done" if resumed else f"{wall_s:.1f} s"
        self._put("finish", f"{self._name}: {took}", wall_s=round(wall_s, 3), resumed=resumed)

    def log(self, text: str) -> None:
        """One line."""
        self._put("log", text)

    def warn(self, text: str) -> None:
        """One line, marked."""
        self._put("warning", text if self._json else f"warning: {text}")

    def _put(self, event: str, text: str, **facts: object) -> None:
        if self._json:
            line = json.dumps({"event": event, "stage": self._name, "text": text, **facts})
        else:
            line = text
        print(line, file=self._stream, flush=True)


@contextmanager
def reporter(*, quiet: bool, log_json: bool) -> Iterator[Reporter]:
    """The reporter that fits: JSON lines, warnings only, bars on a terminal, or plain lines."""
    if log_json:
        yield Lines(sys.stderr, as_json=True)
    elif quiet:
        yield _WarningsOnly()
    else:
        console = Console(stderr=True)
        if not console.is_terminal:
            yield Lines(sys.stderr, as_json=False)
            return
        with Bars(console) as bars:
            yield bars


class _WarningsOnly(Silent):
    """``--quiet``: nothing but what the user must know."""

    def warn(self, text: str) -> None:
        """Still said."""
        print(f"warning: {text}", file=sys.stderr, flush=True)
