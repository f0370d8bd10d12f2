"""What config.json says about the quantization of a folder, in whichever dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any, Protocol

from compressor.errors import CheckpointError
from compressor.recipe.patterns import compile_pattern
from compressor.report.words import short_name
from compressor.verify.structure.layouts import Layout

# Plain names are looked up at once; every pattern is tried on every module.
MAX_PATTERNS = 2_000


@dataclass(frozen=True)
class KvCache:
    """How the KV cache is to be stored.

    Attributes:
        label: as messages name it.
        static: whether the checkpoint must hold its scales.
        per_head: whether there is a scale for each KV head.
    """

    label: str
    static: bool
    per_head: bool


class QuantConfig(Protocol):
    """One reading of a quantization config.

    Attributes:
        label: the dialect and the formats that it names.
        kv: how the KV cache is stored, or None for 16 bit.
        extras: whether the model holds tensors that no format accounts for (rotations).
    """

    label: str
    kv: KvCache | None
    extras: bool

    def layout(self, module: str, classes: Set[str]) -> Layout | None:
        """How the module is stored, or None where it is not quantized.

        Args:
            module: its name in the checkpoint.
            classes: names of the module's class and its bases.
        """
        ...

    def ignored(self, module: str, classes: Set[str]) -> str | None:
        """The ignore entry that the module falls under, or None."""
        ...


class Unquantized:
    """A folder that says nothing of quantization."""

    label = "unquantized"
    kv: KvCache | None = None
    extras = False

    def layout(self, module: str, classes: Set[str]) -> Layout | None:
        """None."""
        return None

    def ignored(self, module: str, classes: Set[str]) -> str | None:
        """None."""
        return None


class Names:
    """The entries of a ``targets`` or ``ignore`` list: plain names, and patterns to be tried in turn.

    Raises:
        CheckpointError: an entry is no text, or a pattern that cannot be matched in bounded time.
    """

    def __init__(self, entries: object, where: str, *, is_pattern: Callable[[str], bool]) -> None:
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            raise CheckpointError(f"{where} is not a list of names")
        self.plain = frozenset(entry for entry in entries if not is_pattern(entry))
        patterns = [entry for entry in dict.fromkeys(entries) if is_pattern(entry)]
        if len(patterns) > MAX_PATTERNS:
            raise CheckpointError(f"{where} has {len(patterns):,} patterns, more than {MAX_PATTERNS:,}")
        self._tests = [(entry, self._compiled(entry, where)) for entry in patterns]

    @staticmethod
    def _compiled(entry: str, where: str) -> Callable[[str], bool]:
        try:
            return compile_pattern(entry)
        except ValueError as error:
            raise CheckpointError(f"{where}: {short_name(str(error))}") from None

    def by_name(self, module: str) -> str | None:
        """The entry that is the module's name or whose pattern matches it."""
        if module in self.plain:
            return module
        return next((entry for entry, test in self._tests if test(module)), None)

    def by_class(self, classes: Iterable[str]) -> str | None:
        """The entry that is the name of one of the classes."""
        return next((name for name in classes if name in self.plain), None)


def stated(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization entry of a config.json, where engines look for it, or None.

    Raises:
        CheckpointError: it is not an object.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                if not isinstance(found, dict):
                    raise CheckpointError(f"{key} of config.json is not an object")
                return found
    return None
