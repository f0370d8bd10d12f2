"""What to measure at long context. Importing this does not import torch: for plans."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Tasks of lm-eval's `ruler` that make their own data -> packages beside lm-eval that they need.
RULER_TASKS: dict[str, tuple[str, ...]] = {
    "niah_single_1": ("wonderwords",),
    "niah_multikey_2": ("wonderwords",),
    "niah_multikey_3": ("wonderwords",),
    "ruler_vt": (),
    "ruler_cwe": ("wonderwords",),
    "ruler_fwe": ("scipy",),
}
_ESSAYS = "its haystack, essays, is downloaded from the Hub"
_QUESTIONS = "its questions are downloaded"
NETWORKED_RULER_TASKS = {
    "niah_single_2": _ESSAYS,
    "niah_single_3": _ESSAYS,
    "niah_multikey_1": _ESSAYS,
    "niah_multiquery": _ESSAYS,
    "niah_multivalue": _ESSAYS,
    "ruler_qa_squad": _QUESTIONS,
    "ruler_qa_hotpot": _QUESTIONS,
}


@dataclass(frozen=True)
class LongNeedles:
    """Numbers to hide.

    Attributes:
        kinds: of ``long_needle.KINDS``.
        lengths: tokens of the texts.
        depths: 0 for the beginning to 1 for the end.
        trials: texts of each kind, length and depth.
    """

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int


@dataclass(frozen=True)
class LongRuler:
    """RULER tasks.

    Attributes:
        tasks: of ``RULER_TASKS``.
        lengths: tokens of a prompt and its answer.
        limit: samples of each task and length.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class LongSpec:
    """What to measure at long context, of source and result.

    Attributes:
        documents: a text file of long documents.
        documents_label: how reports name it.
        documents_are_shipped: whether it is one of the package's own.
        count: how many documents.
        tokens: of each.
        trained: tokens that the source was trained at: the sliding window's, and the middle of the buckets.
        stride: how far the window slides.
        needles: to hide, or None.
        ruler: tasks to run, or None.
        seed: of numbers, tasks and intervals.
    """

    documents: Path
    documents_label: str
    count: int
    tokens: int
    trained: int
    stride: int
    needles: LongNeedles | None = None
    ruler: LongRuler | None = None
    seed: int = 0
    documents_are_shipped: bool = False


def check_ruler(name: str) -> str | None:
    """Why lm-eval's task cannot be run here, offline; None where it can."""
    if name in NETWORKED_RULER_TASKS:
        return (
            f"{name} needs the network: {NETWORKED_RULER_TASKS[name]}; offline are {', '.join(RULER_TASKS)}"
        )
    if name not in RULER_TASKS:
        return f"unknown RULER task {name!r}; offline are {', '.join(RULER_TASKS)}"
    return None


def missing_packages(name: str) -> list[str]:
    """What one of ``RULER_TASKS`` needs beside lm-eval and is not installed."""
    return [package for package in RULER_TASKS[name] if find_spec(package) is None]
