"""docs/commands.md against the commands themselves: names, options, keys of JSON, widths of help."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from compressor.cli.main import COMMANDS, cli
from tests.cli.test_main import compress
from tests.tiny import tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def _rows(text: str) -> list[str]:
    """First cells of the tables' rows."""
    return re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)


def _code_words(cells: list[str]) -> set[str]:
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def _keys(name: str) -> set[str]:
    """Of the command's JSON, as the page has them."""
    return {word for word in _code_words(_rows(SECTIONS[name])) if not word.startswith("-")}


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def test_every_command_has_its_row_and_section() -> None:
    """In the order of the help, and no other."""
    table = [name.strip("`") for name in _rows(PAGE.partition("## ")[0])]
    assert table == list(COMMANDS)
    assert list(SECTIONS)[1:] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_help(name: str) -> None:
    """All of them, and none that is not there."""
    help_text = CliRunner().invoke(cli, [name, "--help"]).stdout
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", help_text.partition("Options:")[2]))
    known = {
        spelt
        for param in _command(name).params
        if isinstance(param, click.Option)
        for spelt in (*param.opts, *param.secondary_opts)
    }
    assert known <= shown
    told = {word for word in _code_words(_rows(SECTIONS[name])) if word.startswith("-")}
    assert told == known


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits(name: str, columns: int) -> None:
    """Narrow terminals, too; lines that are to be copied stay whole."""
    # click's own runner forces a width.
    told = compress(*([name] if name else []), "--help", env={"COLUMNS": str(columns)})
    assert told.returncode == 0
    long = [line for line in told.stdout.splitlines() if len(line) > columns]
    assert [line for line in long if "compress" not in line] == []


def test_json_of_inspect(tmp_path: Path) -> None:
    """Every key has its row."""
    folder = tiny_llama(tmp_path / "model")
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout)
    assert {
        word for word in _code_words(_rows(SECTIONS["inspect"])) if not word.startswith("-")
    } == found.keys()


def test_json_of_doctor() -> None:
    """Every key has its row."""
    found = json.loads(CliRunner().invoke(cli, ["doctor", "--offline", "--json"]).stdout)
    assert {
        word for word in _code_words(_rows(SECTIONS["doctor"])) if not word.startswith("-")
    } == found.keys()
