"""What a piece of recipe text means: YAML 1.2 scalars, ``${VAR:-default}``, names that look like secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise

Scalar = str | int | float | bool | None

# YAML 1.2.2, section 10.3.2 (core schema): "on", "off", "yes", "no" and 12:30 are text, 010 is ten.
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# longer runs of digits (commit hashes, sha256) are no numbers that a recipe could mean
_MAX_DIGITS = 30

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<body>[^{}]*)(?P<end>\}?))")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-.*)?", re.DOTALL)

_SECRET_WORDS = frozenset(
    {"token", "secret", "secrets", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
)
_SECRET_KEYS = frozenset({"api", "access", "private", "secret", "auth"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def resolve_plain(text: str) -> Scalar:
    """The value of an unquoted YAML scalar by the YAML 1.2 core schema.

    Numbers of more than 30 characters stay text: they are hashes, not numbers.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def substitute(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """``text`` with ``${VAR}`` and ``${VAR:-default}`` replaced and ``$$`` turned into ``$``.

    As in a shell, ``:-`` also covers a variable that is set but empty. A ``$`` before anything else stays,
    so regular expressions need no escape.

    Raises:
        ValueError: the variable is unset and has no default, is a secret by its name, or the braces are
            malformed.
    """

    def replacement(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        body = _BODY.fullmatch(match["body"])
        if not match["end"] or body is None:
            raise ValueError(f"malformed variable {match[0]!r}: write ${{NAME}} or ${{NAME:-default}}")
        name, default = body["name"], body["default"]
        if looks_secret(name):
            raise ValueError(f"${{{name}}} looks like a secret, and resolved recipes are published")
        value = environment.get(name)
        if default is not None:
            return value or default[2:]
        if value is None:
            raise ValueError(f"environment variable {name} is not set: set it, or write ${{{name}:-default}}")
        return value

    return _VARIABLE.sub(replacement, text)


def escape(text: str) -> str:
    """The inverse of ``substitute``: text that comes back unchanged from it."""
    return re.sub(r"\$(?=[${])", "$$", text)


def looks_secret(name: str) -> bool:
    """Whether a key or variable is named like a credential (``hf_token``, ``apiKey``; not ``tokens``)."""
    words = [word.lower() for word in _WORD.findall(name)]
    if words[-2:] == ["per", "token"]:  # a rate
        return False
    return not _SECRET_WORDS.isdisjoint(words) or any(
        word == "key" and before in _SECRET_KEYS for before, word in pairwise(words)
    )
