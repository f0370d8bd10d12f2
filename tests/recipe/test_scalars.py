"""YAML 1.2 scalars, environment variables, secrets."""

from __future__ import annotations

from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.recipe.scalars import escape, looks_secret, resolve_plain, substitute


@pytest.mark.parametrize(
    "text, value",
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        (".inf", inf),
        ("-.Inf", -inf),
    ],
)
def test_core_schema_values(text: str, value: object) -> None:
    """Each form of the YAML 1.2 core schema has its value and type."""
    found = resolve_plain(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number() -> None:
    """.nan is a float that equals nothing."""
    found = resolve_plain(".nan")
    assert isinstance(found, float)
    assert isnan(found)


@pytest.mark.parametrize(
    "text",
    [
        "on",
        "off",
        "yes",
        "no",
        "Y",
        "12:30",
        "1_000",
        "0b1",
        "+0xff",
        "tRue",
        "1.2.3",
        "2024-01-01",
        "9" * 31,
        "٣",
    ],
)
def test_text_that_yaml_1_1_reads_otherwise(text: str) -> None:
    """Words, times, dates and long digit strings stay text."""
    assert resolve_plain(text) == text


def test_substitution() -> None:
    """Variables, defaults for unset and empty ones, and escaped dollars."""
    environment = {"A": "x", "EMPTY": ""}
    assert substitute("${A}-${A:-y}", environment) == "x-x"
    assert substitute("${B:-y z}${EMPTY:-e}[${EMPTY}]${B:-}", environment) == "y ze[]"
    assert substitute("$${A} $$ $A re:.*_proj$", environment) == "${A} $ $A re:.*_proj$"


@pytest.mark.parametrize(
    "text, message",
    [
        ("${B}", "B is not set"),
        ("${A", "malformed variable"),
        ("${}", "malformed variable"),
        ("${1A}", "malformed variable"),
        ("${A:=x}", "malformed variable"),
        ("${HF_TOKEN}", "looks like a secret"),
        ("${HF_TOKEN:-}", "looks like a secret"),
    ],
)
def test_refused_substitution(text: str, message: str) -> None:
    """What cannot be replaced says why."""
    with pytest.raises(ValueError, match=message):
        substitute(text, {"A": "x", "HF_TOKEN": "hf_x"})


@given(st.text(alphabet="${}A:-x"))
def test_escape_is_undone_by_substitution(text: str) -> None:
    """Whatever the text, escaping protects it from substitution."""
    assert substitute(escape(text), {"A": "wrong"}) == text


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "HF_TOKEN",
        "hfToken",
        "api_key",
        "apikey",
        "API-KEY",
        "apiKey",
        "password",
        "secret",
        "AWS_SECRET",
    ],
)
def test_secret_names(name: str) -> None:
    """Names of credentials are recognised in the usual spellings."""
    assert looks_secret(name)


@pytest.mark.parametrize("name", ["tokens", "max_tokens", "tokenizer", "key", "keyword", "TOKENS", "monkey"])
def test_names_that_only_resemble_secrets(name: str) -> None:
    """Counts of tokens and the like are no secrets."""
    assert not looks_secret(name)
