"""What a process holds while it runs, sampled from outside: anonymous memory, and bytes on the disk."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_SAMPLE_S = 0.1


class Watch:
    """Samples a process ten times a second for as long as the context lasts.

    Attributes:
        peak_anonymous_bytes: most memory that is the process's own; pages of files are not counted, which the
            system drops as it likes. Linux only (``RssAnon`` of /proc/PID/status), elsewhere 0.
        peak_disk_bytes: most bytes on the disk below ``folders``; a file with several names counts once.

    Args:
        pid: of the process.
        folders: they need not exist yet.
    """

    def __init__(self, pid: int, folders: Sequence[Path]) -> None:
        self.peak_anonymous_bytes = self.peak_disk_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._folders = folders
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes(self._status))
            self.peak_disk_bytes = max(self.peak_disk_bytes, disk_bytes(self._folders))
            if self._stop.wait(_SAMPLE_S):
                return


def anonymous_bytes(status: Path) -> int:
    """``RssAnon`` of a /proc/PID/status; 0 where there is none, as of a process that has ended."""
    try:
        found = re.search(r"^RssAnon:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def disk_bytes(folders: Sequence[Path]) -> int:
    """Bytes that the files below ``folders`` take, each once; what vanishes meanwhile is left out."""
    sizes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    stat = os.lstat(os.path.join(parent, name))
                except OSError:
                    continue
                sizes[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(sizes.values())
