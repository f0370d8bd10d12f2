"""How work reports on itself. Rooms that work call this; the command line decides what a person sees."""

from __future__ import annotations

from typing import Literal, Protocol

# ``work``: shares of a whole whose rate says nothing to a person; the time left does.
Unit = Literal["bytes", "tokens", "items", "work"]


class Progress(Protocol):
    """Receives what happens: goes to bars, plain lines or JSON lines on stderr, never to stdout."""

    def start(self, stage: str, total: int, unit: Unit, done: int = 0) -> None:
        """A stage begins; ``done`` of ``total`` units were found finished in the workspace."""
        ...

    def advance(self, amount: int, note: str = "") -> None:
        """``amount`` more units of the current stage are done; ``note`` names the shard or layer."""
        ...

    def finish(self, resumed: bool = False) -> None:
        """The current stage is done; ``resumed`` if the workspace already held all of it."""
        ...

    def log(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def warn(self, text: str) -> None:
        """Something that the user asked for is skipped, or deserves a look."""
        ...


class Silent:
    """Reports nothing: for library use and tests."""

    def start(self, stage: str, total: int, unit: Unit, done: int = 0) -> None:
        """Nothing."""

    def advance(self, amount: int, note: str = "") -> None:
        """Nothing."""

    def finish(self, resumed: bool = False) -> None:
        """Nothing."""

    def log(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""
