"""What the plan says of a search: its files, its time by hand, and its place in the stage's key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.errors import PlanError
from compressor.planner import sizes
from compressor.planner.context_search import SearchPlan
from compressor.planner.plan import Plan, make_plan
from compressor.recipe.load import load_recipe
from tests.tiny import tiny_llama

# Operations a second that the plan assumes of a CPU.
CPU_FLOPS = 9e10


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "has_accelerator", lambda: False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 tokens."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Eight documents of 3,000 bytes."""
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{number} or so " * 300}) for number in range(8)))
    return path


def plan(folder: Path, source: Path, search: str, *, evaluate: str = "null", target: str = "2048") -> Plan:
    """Of a recipe that searches factors for 2,048 tokens."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {source}}}\nweights: {{scheme: nvfp4a16}}\nevaluate: {evaluate}\n"
        f"context: {{method: longrope, target_length: {target}, search: {{{search}}}}}\n"
    )
    return make_plan(load_recipe(str(recipe)), output=folder / "out")


def search_of(found: Plan) -> SearchPlan:
    """The search of a plan."""
    assert found.context is not None
    assert found.context.search is not None
    return found.context.search


def test_time_by_hand(tmp_path: Path, source: Path, documents: Path) -> None:
    """Passes of the weights and of causal attention over all candidates and the documents that decide."""
    found = plan(
        tmp_path, source, "documents: long.jsonl, population: 4, generations: 3, search_documents: 2"
    )
    search = search_of(found)
    # Four known ways, and critical pairs 4 and 3 of 8: four have periods below 512 tokens.
    assert search.candidates == 6 + 3 * 2
    parameters = sum(claim.tensor.numel for claim in found.claims)
    # Two layers of four heads of 16: two products of half a square each.
    one = 2 * parameters * 2048 + 2 * 2 * 64 * 2048**2
    short = 4 * (2 * parameters * 512 + 2 * 2 * 64 * 512**2)
    expected = (search.candidates * 2 + 2 * 4) * (one + short) / CPU_FLOPS
    assert search.time_s == pytest.approx(expected)
    without = make_plan(load_recipe(str(_without_search(tmp_path, source))), output=tmp_path / "out")
    assert found.prediction.time_s == pytest.approx(without.prediction.time_s + expected)
    told = " ".join(found.context.described()) if found.context else ""
    assert "searched by perplexity on 2 documents of 2,048 tokens" in told
    assert search.to_json()["time_s"] == search.time_s


def _without_search(folder: Path, source: Path) -> Path:
    recipe = folder / "plain.yaml"
    recipe.write_text(f"model: {{source: {source}}}\nweights: {{scheme: nvfp4a16}}\nevaluate: null\n")
    return recipe


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("documents: none.jsonl", "no such file of long documents: none.jsonl"),
        (
            "documents: long.jsonl, accept_documents: 7",
            "long.jsonl has 8 documents that can have 576 tokens; 9 are asked",
        ),
        ("documents: short.jsonl", "short.jsonl has 0 documents that can have 576 tokens; 6 are asked"),
        ("documents: broken.jsonl", "broken.jsonl:1: not JSON"),
        (
            "documents: long.jsonl, held_out: long.jsonl",
            "held_out: the same text as context.search.documents",
        ),
        ("documents: long.jsonl, tokens: 512", "512 tokens are not more than the original length, 512"),
        ("documents: measured.txt", "is what evaluate.text reads"),
        ("documents: long.jsonl, held_out: measured.txt", "is what evaluate.text reads"),
    ],
)
def test_faults_come_before_hours_are_spent(
    tmp_path: Path, source: Path, documents: Path, search: str, message: str
) -> None:
    """Of files that are missing, too small, or measured on."""
    (tmp_path / "measured.txt").write_text("a text to measure on " * 400)
    (tmp_path / "short.jsonl").write_text("\n".join([json.dumps({"text": "x" * 575})] * 8))
    (tmp_path / "broken.jsonl").write_text("{")
    evaluate = "{text: measured.txt, tokens: 512, context: 128, tasks: []}"
    with pytest.raises(PlanError, match=message):
        plan(tmp_path, source, search, evaluate=evaluate)


def test_the_key_follows_the_file_and_the_search(tmp_path: Path, source: Path, documents: Path) -> None:
    """Another text, seed or length of documents is another stage; where the file lies is nothing."""

    def key(search: str) -> str:
        found = plan(tmp_path, source, search)
        assert found.context is not None
        return found.context.key("source")

    keys = [key(f"documents: long.jsonl{more}") for more in ("", ", seed: 1", ", tokens: 1024")]
    (tmp_path / "moved.jsonl").write_bytes(documents.read_bytes())
    assert key("documents: moved.jsonl") == keys[0]
    documents.write_text(documents.read_text().replace("or so", "or thus"))
    keys.append(key("documents: long.jsonl"))
    assert len(set(keys)) == 4


def test_the_key_follows_the_length_of_the_documents(tmp_path: Path, source: Path, documents: Path) -> None:
    """Which is the target's by default, however far the factor reaches."""
    found = [
        plan(tmp_path, source, "documents: long.jsonl", target=f"{target}, factor: 4").context
        for target in (1800, 2048)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].job.scaled.length == found[1].job.scaled.length
    assert found[0].key("source") != found[1].key("source")


def test_a_model_that_takes_no_longrope_is_refused(tmp_path: Path, documents: Path) -> None:
    """In the plan, not after the search."""
    source = tiny_llama(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="scaled by linear already"):
        plan(tmp_path, source, "documents: long.jsonl")


def test_windows_take_a_mask(tmp_path: Path, source: Path, documents: Path) -> None:
    """A bool and a number of 16 bit for each pair of tokens, where layers see a window."""
    found = plan(tmp_path, source, "documents: long.jsonl")
    search, config = search_of(found), dict(found.source.config)
    windows = config | {"model_type": "mistral", "sliding_window": 256}
    plain, masked = (search.costed(found.claims, one).held_bytes for one in (config, windows))
    assert plain == search.held_bytes
    assert masked - plain == 3 * 2048**2


def test_what_a_machine_is_too_small_for(tmp_path: Path, source: Path, documents: Path) -> None:
    """Memory, and hours on a CPU; silence where all is well."""
    search = search_of(plan(tmp_path, source, "documents: long.jsonl, tokens: 700"))
    assert search.warnings() == []
    (shorter,) = search_of(plan(tmp_path, source, "documents: long.jsonl")).warnings()
    assert "about 0 of 6 documents of long.jsonl look as long as 2,048 tokens" in shorter
    (memory,) = replace(search, held_bytes=10**15).warnings()
    assert "1000000.0 GB; this machine has" in memory
    (hours,) = replace(search, time_s=7200.0).warnings()
    assert "about 2 h 00 min on this machine, which has no GPU" in hours
