"""``compress plan`` prints what a result is worth, and its JSON has the same."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from compressor.cli.compounding_view import print_compounding
from compressor.cli.plan import command
from compressor.report.compounding import CompoundingFacts

RECIPE = "recipes/qwen3-32b-nvfp4.yaml"


def test_json_has_the_facts() -> None:
    """As the report stores them, with what was set on the command line."""
    found = CliRunner().invoke(command, [RECIPE, "--json", "--set", "serve.price_per_hour=2.5"])
    assert found.exit_code == 0
    facts = CompoundingFacts.model_validate_json(json.dumps(json.loads(found.stdout)["compounding"]))
    assert facts.point.price_per_hour == 2.5
    assert {"output_price", "input_price", "weights", "users"} <= {row.key for row in facts.rows}


@pytest.mark.parametrize("width", ["50", "80", "160"])
def test_the_table_is_printed(width: str) -> None:
    """Table, ledgers, claims and notes at any width."""
    found = CliRunner().invoke(command, [RECIPE], env={"COLUMNS": width})
    assert found.exit_code == 0
    shown = "".join(found.stdout.split())
    # Columns may break a cell, but not a short one.
    for expected in ("baseline", "optimized", "15.83x", "3.17x", "claimedelsewhere", "alowerbound"):
        assert expected in shown


def test_a_reason_stands_where_nothing_is_known() -> None:
    """One line."""
    file = io.StringIO()
    print_compounding(Console(file=file, width=80), None, "no layer of the model has a cache")
    assert file.getvalue() == "\nserving not computed: no layer of the model has a cache\n"
