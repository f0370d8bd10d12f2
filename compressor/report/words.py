"""Numbers as people read them, and strangers' names made safe to show."""

from __future__ import annotations

import math
from collections.abc import Sequence

BYTE_UNITS = "1 MB = 1,000,000 bytes, 1 GB = 1,000 MB"
_NAME_LIMIT = 200
_NAMED = 3


def size(nbytes: int) -> str:
    """``nbytes`` in decimal units: bytes below 1 kB, kB below 0.1 MB, GB from 1,000 MB."""
    if nbytes < 1_000:
        return f"{nbytes} bytes"
    if nbytes < 100_000:
        return f"{nbytes / 1e3:.1f} kB"
    if nbytes < 1_000_000_000:
        return f"{nbytes / 1e6:.1f} MB"
    return f"{nbytes / 1e9:.{2 if nbytes < 10_000_000_000 else 1}f} GB"


def number(value: float, digits: int) -> str:
    """``value`` with ``digits`` after the point; not-a-number and infinities in words."""
    if math.isfinite(value):
        return f"{value:,.{digits}f}"
    return "not a number" if math.isnan(value) else "infinite" if value > 0 else "-infinite"


def percent(fraction: float, *, signed: bool = False) -> str:
    """0.2012 -> ``20.1%``; ``signed`` adds a plus."""
    if not math.isfinite(fraction):
        return number(fraction, 1)
    return f"{100 * fraction:{'+' if signed else ''},.1f}%"


def counted(count: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``; of nouns whose plural has an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def millions(count: int) -> str:
    """``6.5M``; below 100,000 all digits."""
    return f"{count / 1e6:,.1f}M" if count >= 100_000 else f"{count:,}"


def duration(seconds: float) -> str:
    """``12.3 s``, ``5 min 12 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds) or seconds < 120:
        return f"{number(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str) -> str:
    """``text`` with every control, bidirectional, odd-space and surrogate character written as an escape.

    Names come from strangers' files: terminal escapes must not act, and what is read must be what is there.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def short_name(text: str) -> str:
    """``visible(text)``, with the middle left out beyond 200 characters."""
    shown = visible(text)
    if len(shown) <= _NAME_LIMIT:
        return shown
    half = (_NAME_LIMIT - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def some_names(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(map(short_name, names[:_NAMED])) + (f" and {more:,} more" if more > 0 else "")
