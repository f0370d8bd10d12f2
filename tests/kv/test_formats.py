"""Formats by name: sizes against the table of what vLLM 0.32 and the paper store, and plug-ins."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from compressor.errors import UserError
from compressor.kv import formats
from compressor.kv.base import KvFormat
from compressor.kv.formats import FORMATS, KvFormats

# Bytes of one token in one KV head, keys and values, for head_dim 64, 128 and 256.
SLOT_BYTES = {
    "bf16": (256, 512, 1024),
    "fp8": (128, 256, 512),
    "fp8_per_token_head": (136, 264, 520),
    "int8_per_token_head": (136, 264, 520),
    "int4_per_token_head": (72, 136, 264),
    "nvfp4": (72, 144, 288),
    "nvfp4_4over6": (72, 144, 288),
    "turboquant_k8v4": (100, 196, 388),
    "turboquant_4bit_nc": (70, 134, 262),
    "turboquant_k3v4_nc": (62, 118, 230),
    "turboquant_3bit_nc": (54, 102, 198),
    "turboquant_mse_1bit": (20, 36, 68),
    "turboquant_mse_2bit": (36, 68, 132),
    "turboquant_mse_3bit": (52, 100, 196),
    "turboquant_mse_4bit": (68, 132, 260),
    "turboquant_prod_2bit": (38, 70, 134),
    "turboquant_prod_3bit": (54, 102, 198),
    "turboquant_prod_4bit": (70, 134, 262),
    "turboquant_2.5bit": (40, 80, 152),
    "turboquant_3.5bit": (56, 112, 216),
    "fitted_2.5bit": (40, 80, 160),
    "fitted_3.5bit": (56, 112, 224),
}


def test_every_format_has_a_row() -> None:
    """The table above is complete."""
    assert set(SLOT_BYTES) == set(FORMATS)


@pytest.mark.parametrize("name", SLOT_BYTES)
def test_slot_bytes(name: str) -> None:
    """Norms, scales and zero points are counted."""
    found = FORMATS[name]
    assert tuple(found.slot_bytes(head_dim) for head_dim in (64, 128, 256)) == SLOT_BYTES[name]


def test_half_bits_count_the_norms() -> None:
    """2.5 and 3.5 bits are what a slot takes, not what its codes take."""
    for head_dim in (64, 128):
        assert FORMATS["turboquant_2.5bit"].bits(head_dim) == 2.5
        assert FORMATS["turboquant_3.5bit"].bits(head_dim) == 3.5


def test_only_vllm_presets_of_turboquant_skip_ends() -> None:
    """vLLM keeps two layers at either end for its TurboQuant presets alone."""
    skipping = {name for name, found in FORMATS.items() if found.skips_ends}
    assert skipping == {
        "turboquant_k8v4",
        "turboquant_4bit_nc",
        "turboquant_k3v4_nc",
        "turboquant_3bit_nc",
    }
    assert all(FORMATS[name].skips_ends == 2 for name in skipping)


@pytest.mark.parametrize("name", ["turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"])
def test_rotated_presets_refuse_head_dim_96(name: str) -> None:
    """vLLM's rotation is a plain Hadamard matrix."""
    assert "power of two" in str(FORMATS[name].problem(96))
    assert FORMATS[name].problem(128) is None


def test_blocks_must_fit() -> None:
    """Codes fill whole bytes and blocks; e4m3 keys are not rotated."""
    assert "multiple of 16" in str(FORMATS["nvfp4"].problem(72))
    assert "multiple of 32" in str(FORMATS["turboquant_2.5bit"].problem(80))
    assert FORMATS["turboquant_k8v4"].problem(96) is None


def test_importing_needs_no_torch() -> None:
    """Plans read sizes only."""
    code = "import sys; import compressor.kv.formats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_find_suggests() -> None:
    """A misspelt name gets the nearest one."""
    assert FORMATS.find("fp8").name == "fp8"
    with pytest.raises(ValueError, match=r"did you mean 'turboquant_4bit_nc'"):
        FORMATS.find("turboquant_4bit")


EXTRA = KvFormat("extra_2bit", "own", key_bytes=lambda d: d, value_bytes=lambda d: d, make=None)
MISNAMED = KvFormat("other", "own", key_bytes=lambda d: d, value_bytes=lambda d: d, make=None)


def _with_plugins(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> KvFormats:
    found = [EntryPoint(name, f"{__name__}:{value}", formats.ENTRY_POINT_GROUP) for name, value in points]
    monkeypatch.setattr(formats, "entry_points", lambda group: found)
    return KvFormats(tuple(FORMATS[name] for name in ("bf16", "fp8")))


def test_plugins_add_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's format stands after the built-in ones."""
    table = _with_plugins(monkeypatch, ("extra_2bit", "EXTRA"))
    assert list(table) == ["bf16", "fp8", "extra_2bit"]
    assert len(table) == 3
    assert table["extra_2bit"].slot_bytes(64) == 128


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("extra_2bit", "MISSING", "cannot be loaded"),
        ("extra_2bit", "SLOT_BYTES", "is no KvFormat"),
        ("extra_2bit", "MISNAMED", "calls itself 'other'"),
    ],
)
def test_broken_plugins_name_their_package(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """The user learns whom to ask."""
    table = _with_plugins(monkeypatch, (name, value))
    with pytest.raises(UserError, match=message):
        table[name]


def test_plugins_may_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in name cannot be taken."""
    table = _with_plugins(monkeypatch, ("fp8", "EXTRA"))
    with pytest.raises(UserError, match="clashes"):
        list(table)
