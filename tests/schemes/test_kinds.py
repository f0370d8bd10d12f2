"""Spellings of schemes and solvers, and those that other packages add."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

import compressor.schemes.kinds as kinds
from compressor.errors import UserError
from compressor.schemes import BUILTIN_SCHEMES, SchemeField, known_schemes, parse_scheme
from compressor.schemes.base import Kinds, Scheme
from compressor.schemes.int4 import Int4
from compressor.solvers import BUILTIN_SOLVERS, SolverField, known_solvers, parse_solver
from compressor.solvers.rtn import Rtn


class Holder(BaseModel):
    """A recipe section with both fields."""

    scheme: SchemeField
    solver: SolverField


class Foreign(Scheme):
    """A scheme of another package."""

    kind: Literal["foreign"] = "foreign"


class Misnamed(Scheme):
    """A scheme whose kind is not its entry point's name."""

    kind: Literal["other"] = "other"


NOT_A_SCHEME = object()


def _table(monkeypatch: pytest.MonkeyPatch, **points: str) -> Kinds[Scheme]:
    """A table of the built-in schemes and of entry points NAME=MODULE:ATTRIBUTE of package ``extra``."""
    found = []
    for name, value in points.items():
        point = EntryPoint(name.rstrip("_"), value, "compressor.schemes")
        vars(point).update(dist=SimpleNamespace(name="extra"))
        found.append(point)
    monkeypatch.setattr(kinds, "entry_points", lambda group: found)
    return Kinds("scheme", group="compressor.schemes", base=Scheme, builtins=BUILTIN_SCHEMES, refused={})


@pytest.mark.parametrize("cls", BUILTIN_SCHEMES)
def test_names_and_mappings(cls: type[Scheme]) -> None:
    """A name, its mapping and the model itself mean the same; a dump reads back."""
    name = cls.model_fields["kind"].default
    scheme = parse_scheme(name)
    assert type(scheme) is cls
    assert parse_scheme({"kind": name}) == scheme
    assert parse_scheme(scheme) is scheme
    assert parse_scheme(json.loads(scheme.model_dump_json())) == scheme


def test_options() -> None:
    """Options are the class's fields."""
    assert parse_scheme({"kind": "int4", "group_size": 64, "symmetric": False}) == Int4(
        group_size=64, symmetric=False
    )
    assert parse_solver({"kind": "rtn", "search": "minmax"}) == Rtn(search="minmax")
    assert parse_scheme({"kind": "int4", "group_size": 64}).options() == {"group_size": 64}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nvfp4a61", "did you mean 'nvfp4a16'? (known: nvfp4a16, nvfp4, mxfp4, fp8_dynamic, fp8_block, fp8_"),
        ("zzz", r"unknown scheme 'zzz' (known: nvfp4a16,"),
        ("NVFP4", "unknown scheme 'NVFP4'; did you mean 'nvfp4'?"),
        ("W4A4", "is spelt nvfp4"),
        ("FP8", "is spelt fp8_dynamic, or fp8_static"),
        ("int8_static", "use {kind: int8, activations: dynamic}"),
        ("W4A16", "is spelt int4"),
        ({"group_size": 64}, "needs the key 'kind'"),
        ({"kind": 4}, "needs the key 'kind'"),
        (4, "is a name or a mapping"),
        ({"kind": "int4", "group_size": 100}, "Input should be 128, 64 or 32"),
        ({"kind": "int4", "grop_size": 64}, "Extra inputs are not permitted"),
        ({"kind": "int8", "activations": "dynamic", "group_size": 64}, "leave group_size out"),
    ],
)
def test_faults(value: Any, message: str) -> None:
    """Each says what is wrong and what there is."""
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_scheme(value)


def test_solver_faults() -> None:
    """Methods that go by another name here are told it."""
    with pytest.raises(ValueError, match=r"solver 'awq' goes by another name here: smooth\+gptq"):
        parse_solver("awq")
    with pytest.raises(ValueError, match=r"unknown solver 'rnt'; did you mean 'rtn'\?"):
        parse_solver("rnt")


def test_fields() -> None:
    """As pydantic fields: dumps keep the options of the subclass, faults carry the path."""
    holder = Holder.model_validate({"scheme": {"kind": "int4", "group_size": 32}, "solver": "rtn"})
    dumped = {"kind": "int4", "group_size": 32, "symmetric": True}
    assert holder.model_dump() == {"scheme": dumped, "solver": Rtn().model_dump()}
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"scheme": {"kind": "int4", "group_size": 5}, "solver": "rtn"})
    assert caught.value.errors()[0]["loc"] == ("scheme", "group_size")


def test_json_schema_lists_all() -> None:
    """The schema takes any known name, or the mapping of any of them; of solvers names joined by "+" too."""
    properties = Holder.model_json_schema()["properties"]
    for field, known in (("scheme", known_schemes()), ("solver", known_solvers())):
        names, *others = properties[field]["anyOf"]
        assert names == {"type": "string", "enum": list(known)}
        mappings = [other for other in others if "properties" in other]
        assert all("kind" in mapping["required"] for mapping in mappings)
        kinds = [mapping["properties"]["kind"] for mapping in mappings]
        assert [kind["const"] for kind in kinds if "const" in kind] == list(known)
        # by themselves, and as the only key of a mapping
        joined = [other for other in (*others, *kinds) if "pattern" in other]
        assert len(joined) == (2 if field == "solver" else 0)
        assert all(re.search(kind["pattern"], "smooth+gptq") for kind in joined)


def test_tables_hold_the_builtins() -> None:
    """Names in the order of the tuples."""
    assert [known_schemes()[name] for name in known_schemes()][: len(BUILTIN_SCHEMES)] == list(
        BUILTIN_SCHEMES
    )
    assert len(known_schemes()) >= len(BUILTIN_SCHEMES)
    assert [known_solvers()[name] for name in known_solvers()][: len(BUILTIN_SOLVERS)] == list(
        BUILTIN_SOLVERS
    )


def test_another_packages_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known beside the built-in ones, by name and mapping."""
    table = _table(monkeypatch, foreign=f"{__name__}:Foreign")
    assert list(table)[-1] == "foreign"
    assert len(table) == len(BUILTIN_SCHEMES) + 1
    assert table.parse("foreign") == Foreign()
    assert table.parse({"kind": "foreign"}) == Foreign()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("foreign", f"{__name__}:Misnamed", "calls itself kind 'other'"),
        ("foreign", f"{__name__}:NOT_A_SCHEME", "is no Scheme class"),
        ("foreign", "no_such_module:Foreign", "cannot be loaded: ModuleNotFoundError"),
        ("int4", f"{__name__}:Foreign", "clashes with a built-in one"),
    ],
)
def test_broken_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """The fault names the package, so that it can be mended or removed."""
    table = _table(monkeypatch, **{name: value})
    with pytest.raises(UserError) as caught:
        table.parse("foreign")
    assert message in str(caught.value)
    assert "package extra" in str(caught.value)


def test_two_packages_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is taken silently."""
    table = _table(monkeypatch, foreign=f"{__name__}:Foreign", foreign_=f"{__name__}:Foreign")
    with pytest.raises(UserError, match="clashes with one of package extra"):
        table.parse("foreign")


def test_spelling_needs_no_torch() -> None:
    """Names, plans' headers and problems come without torch, numba or compressed_tensors."""
    code = (
        "import sys\n"
        "from compressor.schemes import known_schemes\n"
        "from compressor.solvers import parse_solver\n"
        "for name, cls in known_schemes().items():\n"
        "    cls().outputs('m', 128, 128), cls().problem(100, 100, fused=True), cls().label\n"
        "parse_solver('rtn')\n"
        "print(*({'torch', 'numba', 'compressed_tensors', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
