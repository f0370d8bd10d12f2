"""Faults of a plan are gathered, to be reported together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from compressor.errors import PlanError, UserError

T = TypeVar("T")


def collect(faults: list[UserError], make: Callable[[], T]) -> T | None:
    """What ``make`` makes; None after appending the faults that it raises."""
    try:
        return make()
    except PlanError as error:
        faults.extend(error.faults)
    except UserError as error:
        faults.append(error)
    return None
