"""Collects what is wrong and tells it briefly: a sentence a kind of fault, three names at most in each."""

from __future__ import annotations

from compressor.report.words import short_name
from compressor.verify.base import Check

SHOWN = 3
_SENTENCES = 3


class Findings:
    """Faults of one check; equal sentences are told once, with the names that they are about.

    Args:
        check: the check's name.
    """

    def __init__(self, check: str) -> None:
        self._check = check
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, sentence: str, *names: str) -> None:
        """One fault: what is wrong and what to do, and the tensors, modules or files that it is about."""
        shown = self._names.setdefault(sentence, [])
        self._counts[sentence] = self._counts.get(sentence, 0) + len(names)
        shown += names[: SHOWN - len(shown)]

    def __bool__(self) -> bool:
        return bool(self._names)

    def result(self, passed: str) -> Check:
        """``failed`` with the faults, or ``passed`` with the sentence given."""
        if not self._names:
            return Check(self._check, "passed", passed)
        told = [self._told(sentence) for sentence in list(self._names)[:_SENTENCES]]
        if len(self._names) > _SENTENCES:
            told.append(f"{len(self._names) - _SENTENCES} further kinds of fault")
        return Check(self._check, "failed", ". ".join(told))

    def _told(self, sentence: str) -> str:
        names, count = self._names[sentence], self._counts[sentence]
        if not names:
            return sentence
        more = f" and {count - len(names)} more" if count > len(names) else ""
        return f"{', '.join(map(short_name, names))}{more}: {sentence}"


def skipped(check: str, reason: str) -> Check:
    """A check that could not be made, and why."""
    return Check(check, "skipped", reason)
