"""``compress completion``: what shells are told, and what a real bash does with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressor.cli.complete import VARIABLE
from compressor.cli.main import COMMANDS, cli
from compressor.kv.formats import FORMATS
from compressor.recipe.keys import settable_keys
from compressor.recipe.load import load_recipe
from compressor.schemes import known_schemes
from compressor.solvers import known_solvers
from tests.cli.test_main import HEAVY, compress


def completed(*words: str, shell: str = "zsh", cwd: Path | None = None) -> list[str]:
    """What a shell is offered for the last of the words behind ``compress``."""
    env = {
        VARIABLE: f"{shell}_complete",
        "COMP_WORDS": "\n".join(("compress", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = compress(cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # zsh: type, value and help in turn.
    return lines[1::3] if shell == "zsh" else [line.partition(",")[2] for line in lines]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    """Each names the program and its variable."""
    told = CliRunner().invoke(cli, ["completion", shell])
    assert told.exit_code == 0
    assert "compress" in told.stdout
    assert VARIABLE in told.stdout


def test_commands() -> None:
    """All of them, or those that begin so."""
    assert completed("") == list(COMMANDS)
    assert completed("ins") == ["inspect"]


def test_recipes(tmp_path: Path) -> None:
    """Files and folders here, and the shipped ones from anywhere."""
    (tmp_path / "recipes.yaml").write_text("")
    (tmp_path / "recent").mkdir()
    (tmp_path / "readme.txt").write_text("")
    found = completed("plan", "re", cwd=tmp_path)
    assert found[:2] == ["recipes.yaml", "recent/"]
    assert "recipes/smollm2-nvfp4.yaml" in found
    assert "readme.txt" not in found


def test_keys_and_their_values() -> None:
    """Of a section; of schemes, KV formats and switches."""
    assert "weights.solver=" in completed("run", "x.yaml", "--set", "weights.")
    assert completed("run", "x.yaml", "--set", "weights.scheme=fp8_d") == ["weights.scheme=fp8_dynamic"]
    assert completed("run", "x.yaml", "--set", "kv_cache.calibrate=") == [
        "kv_cache.calibrate=true",
        "kv_cache.calibrate=false",
    ]


def test_every_key_can_be_set() -> None:
    """``--set KEY=...`` knows each of them, and no other; schemes, solvers and formats are all there."""
    keys = settable_keys()
    assert set(known_schemes()) <= set(keys["weights.scheme"])
    assert set(known_solvers()) <= set(keys["weights.solver"])
    assert set(FORMATS) <= set(keys["kv_cache.format"])
    assert "unknown key" in _fault("weights.schme")
    assert [key for key in keys if "unknown key" in _fault(key)] == []


def _fault(key: str) -> str:
    try:
        load_recipe("recipes/smollm2-nvfp4.yaml", (f"{key}=17",))
    except ValueError as error:
        return str(error)
    return ""


def test_of_bash_words() -> None:
    """It takes KEY, = and VALUE for three words: what is offered is what stands behind the last of them."""
    assert completed("plan", "x", "--set", "weights.scheme", "=", "nvfp4a", shell="bash") == ["nvfp4a16"]
    assert "mxfp4" in completed("plan", "x", "--set", "weights.scheme", "=", shell="bash")
    both = completed("plan", "x", "--set", "a", "=", "b", "--set", "weights.sch", shell="bash")
    assert both == ["weights.scheme="]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_bash(tmp_path: Path) -> None:
    """The script as a shell runs it."""
    program = tmp_path / "compress"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compressor "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(compress completion bash)"\n'
        "COMP_WORDS=(compress plan x --set weights.scheme = fp8_b) COMP_CWORD=6\n"
        "compopt() { :; }\n"
        "_compress_completion compress\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "fp8_block\n"


def test_is_light() -> None:
    """A press of a key imports no torch."""
    code = (
        "import os, sys\n"
        f"os.environ['{VARIABLE}'] = 'bash_complete'\n"
        "os.environ |= {'COMP_WORDS': 'compress run x --set w', 'COMP_CWORD': '4'}\n"
        "from compressor.cli.main import _run\n"
        "assert _run([]) == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stderr.split()} & HEAVY
