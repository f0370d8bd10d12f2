"""Offline compression of language models: one recipe in, one measured checkpoint out."""

from compressor.api import evaluate, plan, run

__all__ = ["evaluate", "plan", "run"]
