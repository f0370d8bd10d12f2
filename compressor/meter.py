"""Wall time and peak memory of a stage, sampled while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_SAMPLE_S = 0.05


@dataclass
class Meter:
    """What one stage cost; complete once its ``with`` block has ended.

    ``peak_rss_bytes`` is the process's resident memory, sampled 20 times a second; ``peak_device_bytes`` is 0
    without an accelerator.
    """

    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0


@contextmanager
def metered() -> Iterator[Meter]:
    """Measures the block."""
    from compressor import device

    meter = Meter()
    process = psutil.Process()
    stop = threading.Event()

    def sample() -> None:
        while True:
            meter.peak_rss_bytes = max(meter.peak_rss_bytes, process.memory_info().rss)
            if stop.wait(_SAMPLE_S):
                return

    sampler = threading.Thread(target=sample, name="meter", daemon=True)
    device.reset_peak()
    started = time.monotonic()
    sampler.start()
    try:
        yield meter
    finally:
        stop.set()
        sampler.join()
        meter.wall_s = time.monotonic() - started
        meter.peak_device_bytes = device.peak_device_bytes()
