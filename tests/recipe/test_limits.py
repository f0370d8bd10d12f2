"""Hostile YAML ends early, in one message."""

from __future__ import annotations

import time

import pytest

from compressor.recipe.load import load_recipe
from compressor.recipe.tree import MAX_DEPTH, MAX_NODES
from tests.recipe.conftest import SMALL, Faults, Write


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors and aliases are not allowed"),
        ("a: &a {b: *a}\n", "anchors and aliases are not allowed"),
        ("<<: *a\n", "anchors and aliases are not allowed"),
        ("[" * 400_000, f"nested deeper than {MAX_DEPTH}"),
        ("{a: " * 100_000, f"nested deeper than {MAX_DEPTH}"),
        ("- " * 100_000, f"nested deeper than {MAX_DEPTH}"),
        ("a: [" + "0," * 400_000 + "]", f"more than {MAX_NODES} values"),
        ("".join(f"k{n}: 0\n" for n in range(20_000)), f"more than {MAX_NODES} values"),
        ("a" * 1_000_001, "at most 1000000 bytes"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1\n", "not valid YAML"),
        ("%YAML 2.0\n---\na: 1\n", "not valid YAML"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        ("seed: " + "9" * 5000 + "\n", "seed: must be a whole number"),
        ("seed: 1e999\n", "seed: must be a finite number"),
        ("seed: 99999999999999999999999\n", "seed: must be less than 4294967296"),
    ],
)
def test_bombs(faults: Faults, text: str, message: str) -> None:
    """Aliases, depth, width, size and giant numbers are refused, quickly and with a place."""
    start = time.perf_counter()
    found = faults(text)
    assert time.perf_counter() - start < 20.0
    assert any(message in fault for _, fault in found)
    assert all(where.startswith("r.yaml") for where, _ in found)
    assert sum(len(where) + len(fault) for where, fault in found) < 5000


def test_the_deepest_allowed_nesting_is_no_recursion_error(faults: Faults) -> None:
    """Depth up to the limit is read; it is only an unknown key."""
    ((where, message),) = faults(SMALL + "zz: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "\n")
    assert where == "r.yaml:4:1"
    assert "unknown key" in message


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write: Write) -> None:
    """Editors on other systems may save recipes."""
    path = write("")
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)).recipe.model.source == "some/model"
