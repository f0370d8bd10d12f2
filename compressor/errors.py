"""Errors that a user can mend, and the exit codes of the command line.

A ``UserError`` says what is wrong, where (file:line or tensor) and what to do. The command line prints it
without a traceback and exits with 2; programmers' faults are assertions and exit with 3.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_GATE = 1
EXIT_USER = 2
EXIT_INTERNAL = 3
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """One fault of the user's input.

    Args:
        what: one sentence, what is wrong.
        where: ``file:line:column``, a tensor name or a path; empty if there is no better place.
        fix: one sentence, what to do about it; empty if ``what`` says it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as a person reads it: ``where: what`` and, on a second line, the mend."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.fix}" if self.fix else head


class RecipeError(UserError):
    """A fault in a recipe file or in a ``--set`` override."""


class CheckpointError(UserError):
    """A source or result checkpoint that cannot be read or must not be trusted."""


class PlanError(UserError):
    """Every fault that the plan found, reported together."""

    def __init__(self, faults: Sequence[UserError]) -> None:
        assert faults, "a PlanError needs at least one fault"
        self.faults = tuple(faults)
        super().__init__("\n".join(fault.render() for fault in faults))


class GateError(Exception):
    """A quality gate of the recipe failed; the result is kept aside."""
