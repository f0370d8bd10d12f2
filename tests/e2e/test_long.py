"""Recipes and commands that measure long context, from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compressor
from compressor.cli.long_options import _KEYS, _OPTIONS
from compressor.errors import PlanError, UserError
from compressor.planner import evaluated_long
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.runner import execute
from tests.tiny import tiny_llama

from .cases import content, write_recipe

CONTEXT = "context: {method: yarn, target_length: 1024}\n"
MEASURED = (
    "evaluate:\n  tokens: 256\n  context: 128\n  gates: [{metric: needle, max_increase: 0}]\n"
    "  long:\n    documents: long.jsonl\n    count: 2\n"
    "    tokens: 700\n    stride: 128\n    needles: {lengths: [300, 600], depths: [0, 1], trials: 1}\n"
    "    ruler: {tasks: [ruler_fwe], lengths: [900], limit: 1}\n"
)


class Killed(BaseException):
    """No code of ours catches it."""


class Dying(Silent):
    """Ends the process at the second passkey."""

    def advance(self, amount: int, note: str = "") -> None:
        """Looks for it."""
        if note == "300 tokens, depth 1":
            raise Killed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 tokens."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=64, intermediate=128, heads=2, kv_heads=1)


def recipe(folder: Path, source: Path, rest: str = CONTEXT + MEASURED) -> Path:
    """A recipe, with its documents beside it."""
    folder.mkdir(exist_ok=True)
    texts = [f"Document {number} says many things at great length. " * 20 for number in range(3)]
    (folder / "long.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return write_recipe(folder / "recipe.yaml", source, "{scheme: int8}", rest)


def test_a_recipe_measures_long_context(tmp_path: Path, source: Path) -> None:
    """Report, page, card and JSON; killed within it goes on to the same; the exported copy plans too."""
    whole = compressor.run(recipe(tmp_path / "whole", source), output=tmp_path / "whole" / "out" / "result")
    report = json.loads((whole.output / "report.json").read_text())
    text = report["long"]["text"]
    assert [(bucket["start"], bucket["stop"]) for bucket in text["buckets"]] == [
        (0, 64),
        (64, 256),
        (256, 512),
        (512, 700),
    ]
    assert (text["window"], text["stride"], text["documents"]) == (512, 128, ["line 1", "line 2"])
    assert {cell["kind"] for cell in report["long"]["needles"]["result"]} == {"passkey", "needle"}
    (gate,) = report["gates"]
    # Two kinds, lengths and depths; of a random model nothing is found, so nothing is lost.
    assert (gate["verdict"], gate["units"], gate["unit"], gate["value"]) == ("PASS", 8, "texts", 0.0)
    assert report["long"]["ruler"]["source"][0]["task"] == "ruler_fwe"
    assert "Long context" in (whole.output / "README.md").read_text()
    page = (whole.output / "report.html").read_text()
    (section,) = re.findall(r'<section id="long".*?</section>', page, re.DOTALL)
    assert section.count("<svg") == 3  # likelihood by position, and what each of the two kinds finds
    killed = tmp_path / "killed"
    path = recipe(killed, source)

    def again(progress: Silent) -> Any:
        plan = make_plan(load_recipe(str(path), ()), output=killed / "out" / "result", planning=False)
        return execute(plan, progress)

    with pytest.raises(Killed):
        again(Dying())
    kept = list((killed / "out" / ".compress-workspace" / "partial").rglob("long-*"))
    assert len(kept) == 8  # two documents in three ways, and two passkeys
    assert content(again(Silent()).output) == content(whole.output)
    planned = make_plan(load_recipe(str(whole.output / "recipe.yaml"), ()), output=tmp_path / "x" / "y")
    assert planned.evaluation is not None
    assert planned.evaluation.long is not None
    assert planned.evaluation.long.documents == tmp_path / "whole" / "long.jsonl"
    measured = report["quality"]["command"].split()
    assert measured[measured.index("--long-tokens") + 1] == "700"
    # Whatever the report's command says, the command line knows.
    known = {f"--{name.replace('_', '-')}" for name in (*_KEYS, "long", "long_window", "long_seed")}
    assert {word for word in measured if word.startswith("--long")} <= known
    assert len(_OPTIONS) == len(known)


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ("evaluate.long.tokens=1025", "evaluate.long.tokens", "more than the 1,024 that the result reads"),
        ("evaluate.long.count=4", "evaluate.long.documents", "long.jsonl has 3 documents with the bytes"),
        ("evaluate.long.stride=512", "evaluate.long.stride", "cannot slide"),
        ("evaluate.long.documents=no.jsonl", "evaluate.long.documents", "no such file"),
        (
            "calibration={datasets: [{path: long.jsonl}], num_samples: 1, sequence_length: 64}",
            "calibration.datasets",
            "is the long evaluation's documents",
        ),
        (
            "adapters={documents: [long.jsonl], sequence_length: 64, tokens: 128}",
            "adapters.documents",
            "is an evaluation text",
        ),
        (
            "context={method: longrope, target_length: 1024, search: {documents: long.jsonl}}",
            "context.search.documents",
            "is what evaluate.long.documents reads",
        ),
    ],
)
def test_the_plan_refuses(tmp_path: Path, source: Path, change: str, where: str, what: str) -> None:
    """What would be found hours later."""
    changes = [change, "weights.solver=gptq"]
    with pytest.raises((PlanError, UserError)) as caught:
        compressor.plan(recipe(tmp_path, source), overrides=changes)
    faults = caught.value.faults if isinstance(caught.value, PlanError) else [caught.value]
    assert any(what in fault.what and _is_at(where, change, fault) for fault in faults)


def _is_at(where: str, change: str, fault: UserError) -> bool:
    """At the key: as the file or the override has it, or by its name."""
    return "recipe.yaml:" in fault.where or change in fault.where or where in fault.where


def test_the_plan_says_how_long_it_takes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By operations: attention of long texts is most of it; nothing where nothing is asked for."""
    plan = compressor.plan(recipe(tmp_path, source))
    assert plan.long is not None
    described = " ".join(plan.long.described())
    assert "2 documents of 700 tokens of long.jsonl" in described
    assert "in a window of 512 tokens that slides by 128" in described
    assert "4 texts with a passkey and as many with a needle, at 300, 600 tokens" in described
    longer = compressor.plan(tmp_path / "recipe.yaml", overrides=["evaluate.long.count=3"])
    assert longer.long is not None
    assert longer.long.time_s > plan.long.time_s > 0
    assert compressor.plan(recipe(tmp_path, source, CONTEXT)).long is None
    assert not any("evaluate.long" in warning for warning in plan.warnings)
    monkeypatch.setattr(evaluated_long, "FLOPS", {"cpu": 1e4, "cuda": 1e4})
    monkeypatch.setattr(evaluated_long, "planned_device", lambda: "cpu")
    slow = compressor.plan(recipe(tmp_path, source))
    assert any(re.match(r"evaluate\.long takes about [0-9,]+ h", warning) for warning in slow.warnings)


def test_a_document_with_too_few_tokens_stops_the_run_at_once(tmp_path: Path, source: Path) -> None:
    """Before a weight is read, where its bytes were enough; the place is the recipe's."""
    path = recipe(tmp_path, source)
    # Ids of the specials are no bytes of a text: these make a token each.
    text = json.dumps({"text": "</s>" * 300})
    (tmp_path / "long.jsonl").write_text(text)
    loaded = load_recipe(str(path), ["evaluate.long.count=1"])
    plan = make_plan(loaded, output=tmp_path / "out" / "result", planning=False)
    with pytest.raises(UserError, match="0 of 1 documents have 700 tokens") as caught:
        execute(plan, Silent())
    assert "recipe.yaml" in caught.value.where
    assert not list((tmp_path / "out" / ".compress-workspace" / "stages").glob("*"))


def test_the_command(tmp_path: Path, source: Path) -> None:
    """Table and JSON, without a text of its own; options that say nothing are refused."""
    result = compressor.run(
        recipe(tmp_path, source, CONTEXT + "evaluate: null\n"), output=tmp_path / "out" / "result"
    ).output

    def evaluate(*options: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "compressor", "eval", str(result), "--source", str(source), "--quiet"]
        return subprocess.run([*words, *options], capture_output=True, text=True, cwd=tmp_path, check=False)

    asked = ("--long", "long.jsonl", "--long-documents", "1", "--long-tokens", "900", "--tokens", "64")
    found = evaluate(*asked, "--long-needles", "400", "--long-depths", "0.5", "--long-trials", "2", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)["long"]
    assert (told["text"]["window"], told["text"]["stride"]) == (512, 64)
    assert [bucket["start"] for bucket in told["text"]["buckets"]] == [0, 64, 256, 512]
    assert len(told["needles"]["source"]) == 2
    for options, message in (
        (("--long-tokens", "64"), "--long-tokens say how --long measures"),
        ((*asked, "--long-trials", "3"), "--long-trials goes with --long-needles"),
        ((*asked, "--long-documents", "9"), "lower --long-documents or --long-tokens"),
        ((*asked, "--long-needles", "a"), "--long-needles 'a' is no list of numbers"),
        ((*asked, "--long-needles", "5000"), "--long-needles: 5,000 tokens are more than the 1,024"),
        ((*asked, "--long-ruler", "ruler_qa_squad"), "--long-ruler: ruler_qa_squad needs the network"),
        ((), "nothing to measure on"),
    ):
        refused = evaluate(*options)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
