"""Several faults of one recipe, reported together, and the nearest known name for a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from compressor.errors import RecipeError

MAX_SHOWN = 50


class RecipeFaults(RecipeError):
    """Every fault found in a recipe, its parents and its overrides.

    Attributes:
        faults: the single faults in the order found; the message shows the first ``MAX_SHOWN``.
    """

    def __init__(self, faults: Sequence[RecipeError]) -> None:
        assert faults, "a RecipeFaults needs at least one fault"
        self.faults = tuple(faults)
        super().__init__(faults[0].what, where=faults[0].where, fix=faults[0].fix)

    def render(self) -> str:
        """The faults one below the other, as a person reads them."""
        lines = [fault.render() for fault in self.faults[:MAX_SHOWN]]
        if len(self.faults) > MAX_SHOWN:
            lines.append(f"... and {len(self.faults) - MAX_SHOWN} more faults")
        return "\n".join(lines)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or else all of them; "" where none is known."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(names)}" if names else ""
