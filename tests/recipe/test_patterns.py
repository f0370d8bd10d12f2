"""Globs and regular expressions over checkpoint names."""

from __future__ import annotations

import time

import pytest
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st

from compressor.recipe.patterns import compile_pattern

NAME = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern, matches",
    [
        (NAME, True),
        ("*q_proj", True),
        ("model.layers.1?.*", True),
        ("model.layers.[0-9][0-9].*", True),
        ("*.Q_PROJ", False),
        ("q_proj", False),
        ("model.layers.10", False),
        ("model", False),
        ("re:model", True),
        ("re:q_proj", False),
        (r"re:.*\.layers\.\d+\..*_proj$", True),
        (r"re:.*\.(q|k|v)_proj", True),
        (r"re:.*\.(gate|up)_proj", False),
    ],
)
def test_globs_span_the_name_and_regexes_start_it(pattern: str, matches: bool) -> None:
    """A glob matches the whole name, a regular expression from its start."""
    assert compile_pattern(pattern)(NAME) is matches


@pytest.mark.parametrize(
    "pattern", ["lm_head", "re:lm_head", "re:.*q_proj", "re:model.*proj$", "re:self_attn", NAME]
)
@pytest.mark.parametrize("name", [NAME, "lm_head", "lm_head.extra", "xlm_head"])
def test_agrees_with_compressed_tensors(pattern: str, name: str) -> None:
    """Names without glob characters mean what they mean in compressed-tensors."""
    assert compile_pattern(pattern)(name) is match_name(name, pattern)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", "must not be empty"),
        ("re:", "must not be empty"),
        ("a" * 513, "513 characters; at most 512"),
        ("re:(", "invalid regular expression.*missing \\)"),
        ("re:*a", "nothing to repeat"),
        ("re:[[a]", "nested set"),
        ("re:a{99999999999999999999}", "invalid regular expression"),
    ],
)
def test_refused_patterns(pattern: str, message: str) -> None:
    """A pattern that cannot be compiled says why, as a ValueError."""
    with pytest.raises(ValueError, match=message):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "regex",
    [
        "(a+)+$",
        "(a*)*b",
        "(a|aa)+$",
        "(.*a){10}b",
        "([a-z]+)*1",
        "(?:(?:a?)*)x",
        "(?=(a+)+b)a",
        "(a{1,30}){1,30}b",
        ".*a.*a.*a.*a.*a.*a.*a.*b",
        "a?" * 30 + "a" * 30,
        "(a|aa)" * 30 + "b",
    ],
)
def test_catastrophic_regexes_are_refused(regex: str) -> None:
    """Shapes that make a backtracking matcher explode are refused before they meet a name."""
    with pytest.raises(ValueError, match=r"exponential time|split it into several"):
        compile_pattern(f"re:{regex}")


def test_the_usual_long_regex_is_allowed_and_fast() -> None:
    """A realistic pattern with five repeats is allowed; a long name that misses it takes little time."""
    test = compile_pattern(r"re:.*\.layers\.\d+\..*experts\.\d+\.(gate|up|down)_proj$")
    assert test("model.layers.3.mlp.experts.12.up_proj")
    start = time.perf_counter()
    assert not test("model.layers.3.mlp.experts.12.up_" + ".layers.1" * 30)
    assert time.perf_counter() - start < 1.0


@given(st.text(alphabet="re:*?[]!-a.(){}|+^$\\1,&~", max_size=40))
def test_any_text_is_a_pattern_or_a_value_error(text: str) -> None:
    """No pattern text raises anything but ValueError, nor does matching."""
    try:
        test = compile_pattern(text)
    except ValueError:
        return
    assert test(NAME) in (True, False)


@given(st.text(alphabet="ab.", min_size=1, max_size=8), st.text(alphabet="ab.", max_size=8))
def test_a_glob_without_wildcards_is_equality(pattern: str, name: str) -> None:
    """Plain names match themselves and nothing else."""
    assert compile_pattern(pattern)(name) is (pattern == name)
