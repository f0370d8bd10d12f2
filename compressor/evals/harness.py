"""lm-eval, as far as it is used here. The only file that names ``lm_eval``, slow to import."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from compressor.model.quiet import quiet

# Importing it warns and logs.
with quiet():
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

__all__ = ["HFLM", "VERSION", "TaskManager", "evaluate", "ruler_module"]

VERSION = version("lm_eval")


def ruler_module(name: str) -> Any:
    """A module of RULER's functions, such as ``niah_utils``."""
    return import_module(f"lm_eval.tasks.ruler.{name}")
