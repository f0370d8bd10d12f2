"""Recipes that scale positions, from end to end: what is written, loaded back and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import compressor
from compressor.checkpoint.folded import KvFold
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.stored import StoredTensors
from compressor.cli.inspect import command as inspect
from compressor.compare import compare
from compressor.errors import PlanError, UserError
from compressor.model.load import load_checkpoint_model
from compressor.planner.keys import stream_key
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.smoke.run import smoke
from compressor.verify.meaning import check_meaning
from compressor.verify.run import verify
from compressor.verify.scaled import scaled_source
from compressor.verify.spec import VerifySpec
from compressor.workspace import Workspace
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.tiny import tiny_llama

from .cases import content, write_recipe

YARN = "context: {method: yarn, target_length: 2048}\n"
MEASURED = "evaluate: {tokens: 512, context: 128}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 tokens whose heads turn 16 pairs."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=64, intermediate=128, heads=2, kv_heads=1)


def run(folder: Path, source: Path, rest: str, weights: str = "{scheme: nvfp4a16}") -> Path:
    """The output folder of a run."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", source, weights, rest)
    return compressor.run(recipe, output=folder / "out" / "result").output


def test_the_result_reads_further(tmp_path: Path, source: Path) -> None:
    """config.json as scaled, a raised tokenizer limit, and nothing else of the source's config changed."""
    output = run(tmp_path, source, f"{YARN}evaluate: null\n")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert after.pop("max_position_embeddings") == 2048
    rope = after.pop("rope_parameters")
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 512)
    after.pop("quantization_config")
    assert after == {name: before[name] for name in after}
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 2048
    assert (output / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    model = load_checkpoint_model(output, torch.float32).model
    assert model.config.max_position_embeddings == 2048
    assert model(torch.arange(1024)[None] % 256).logits.isfinite().all()
    made = json.loads((output / "report.json").read_text())["created"]
    again = run(tmp_path, source, f"{YARN}evaluate: null\n")
    assert json.loads((again / "report.json").read_text())["created"] == made
    (tmp_path / "text.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    text = str(tmp_path / "text.txt")
    space = Workspace(tmp_path / "space")
    measured = compare(
        output, str(source), text, revision=None, tokens=1536, context=1024, space=space, progress=Silent()
    )
    assert measured.text.context == 1024


def test_weights_are_those_of_the_source(tmp_path: Path, source: Path) -> None:
    """Round to nearest sees no positions: the same bytes, under another key."""
    plain = run(tmp_path / "plain", source, "evaluate: null\n")
    scaled = run(tmp_path / "scaled", source, f"{YARN}evaluate: null\n")
    assert (plain / "model.safetensors").read_bytes() == (scaled / "model.safetensors").read_bytes()


def test_what_scaling_alone_costs_is_told_apart(tmp_path: Path, source: Path) -> None:
    """The 16-bit source with and without scaling, beside the whole; where nothing else is done they agree."""
    both = run(tmp_path / "both", source, f"{YARN}{MEASURED}")
    alone = run(tmp_path / "alone", source, f"{YARN}{MEASURED}", "{scheme: nvfp4a16, ignore: ['*']}")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (both, alone)]
    apart, whole = (report["context"]["cost"] for report in reports)
    assert (apart["is_all"], whole["is_all"]) == (False, True)
    assert apart | {"is_all": True} == whole
    assert reports[0]["quality"]["perplexity"]["result"] != apart["scaled"]
    assert reports[1]["quality"]["perplexity"]["result"] == whole["scaled"] != whole["source"]
    assert reports[0]["serve"]["command"].endswith(" --max-model-len 2048")
    assert "## Context" in (both / "README.md").read_text()


def test_a_verification_takes_the_config_for_right(tmp_path: Path, source: Path) -> None:
    """As the recipe says it, and no other: compared with the source under the same config."""
    output = run(tmp_path, source, f"{YARN}{MEASURED}")
    found = checks(output)
    assert found.pop("engine").startswith("skipped")
    assert found["context"].startswith("passed yarn, factor 4, 2,048 tokens")
    assert {name: text for name, text in found.items() if not text.startswith("passed")} == {}
    config = json.loads((output / "config.json").read_text())
    config["rope_parameters"]["beta_fast"] = 16.0
    (output / "config.json").write_text(json.dumps(config))
    scaled, (check,) = scaled_source(output, FolderSource(source))
    assert check.status == "passed"
    assert scaled is not None
    assert "beta_fast" in check_meaning(output, scaled, near=tmp_path).detail
    (output / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    for known in (FolderSource(source), None):
        assert [check.status for check in scaled_source(output, known)[1]] == ["failed"]


def checks(output: Path) -> dict[str, str]:
    """What a verification without an engine finds."""
    text = output.parent / "text.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 20)
    spec = VerifySpec(checkpoint=output, text=str(text), tokens=256, engine="none", cache=output.parent / "c")
    return {check.name: f"{check.status} {check.detail}" for check in verify(spec, Silent()).checks}


def test_inspect_says_how_positions_are_scaled(tmp_path: Path, source: Path) -> None:
    """Of the result, and what is wrong with one that somebody edited."""
    output = run(tmp_path, source, f"{YARN}evaluate: null\n")
    shown = CliRunner().invoke(inspect, [str(output)])
    told = " ".join(shown.output.split())
    assert "yarn, factor 4.0, from 512 tokens, up to 2,048 tokens, theta 10000.0" in told
    config = json.loads((output / "config.json").read_text())
    config["rope_parameters"].pop("original_max_position_embeddings")
    (output / "config.json").write_text(json.dumps(config))
    assert "error: " in CliRunner().invoke(inspect, [str(output)]).output
    shown = CliRunner().invoke(inspect, [str(source), "--json"])
    assert json.loads(shown.output)["scaling"]["method"] == "default"


def shown(folder: Path) -> str:
    """Calibration on a text in ``folder``, and no evaluation."""
    folder.mkdir(exist_ok=True)
    text = folder / "shown.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    datasets = f"datasets: [{{path: {text}}}], num_samples: 4, sequence_length: 64"
    return f"calibration: {{{datasets}}}\nevaluate: null\n"


class Stopping(Silent):
    """Interrupts the run when something is told."""

    def __init__(self, note: str) -> None:
        self._note = note

    def advance(self, amount: int, note: str = "") -> None:
        if note == self._note:
            raise KeyboardInterrupt


def test_with_a_folded_cache_killed_and_resumed(tmp_path: Path) -> None:
    """Scaling, a fit and folds for the cache, NVFP4: stopped in the fit and in a shard, the same bits."""
    source = tiny_llama(tmp_path / "source", layers=6, hidden=128, intermediate=128, heads=2, kv_heads=1)
    rest = f"{YARN}kv_cache: {{format: turboquant_4bit_nc, contexts: [2048]}}\n{shown(tmp_path / 'texts')}"
    weights = "{scheme: nvfp4a16}"
    whole = run(tmp_path / "whole", source, rest, weights)
    parts = tmp_path / "parts"
    parts.mkdir()
    recipe = write_recipe(parts / "recipe.yaml", source, weights, rest)
    for moment in ("block 2", "model.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            compressor.run(recipe, output=parts / "out" / "result", progress=Stopping(moment))
    assert content(compressor.run(recipe, output=parts / "out" / "result").output) == content(whole)
    assert KvFold.read(whole).values == (2, 3)
    report = json.loads((whole / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]][:3] == ["context", "kv", "stream"]
    command = report["serve"]["command"]
    assert command.endswith(" --max-model-len 2048 --kv-cache-dtype turboquant_4bit_nc")
    found = checks(whole)
    assert found["fold"].startswith("passed")
    assert not [name for name, text in found.items() if text.startswith("failed")], found


def test_calibration_hears_scaled_positions(tmp_path: Path, source: Path) -> None:
    """What GPTQ is shown, and so what it stores, depends on them."""
    weights, texts = "{scheme: nvfp4a16, solver: gptq}", shown(tmp_path / "texts")
    stored = [
        (run(tmp_path / name, source, f"{section}{texts}", weights) / "model.safetensors").read_bytes()
        for name, section in (("plain", ""), ("scaled", YARN))
    ]
    assert stored[0] != stored[1]


def test_a_gguf_source(tmp_path: Path) -> None:
    """Its config is rebuilt, then scaled; the tokenizer made of its metadata is raised."""
    source = tiny_gguf(tmp_path / "tiny.gguf")
    output = run(tmp_path / "run", source, f"{YARN}evaluate: null\n", "{scheme: int8}")
    config = json.loads((output / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["original_max_position_embeddings"] == 512
    assert json.loads((output / "tokenizer_config.json").read_text())["model_max_length"] == 2048
    load_checkpoint_model(output, torch.float32)


def test_stored_weights_are_kept_under_another_config(tmp_path: Path, source: Path) -> None:
    """``from: keep`` carries what a result stores, ``from: dequantize`` reads it; both are scaled."""
    stored = run(tmp_path / "stored", source, "evaluate: null\n", "{scheme: fp8_dynamic, ignore: ['*mlp*']}")
    for how, weights in (("keep", "{scheme: int8}"), ("dequantize", "{scheme: int8}")):
        folder = tmp_path / how
        folder.mkdir()
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"model: {{source: {stored}, from: {how}}}\nweights: {weights}\n{YARN}evaluate: null\n"
        )
        output = compressor.run(recipe, output=folder / "result").output
        assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 2048
        kept = [header for header in StoredTensors(output).headers.values() if header.dtype == "F8_E4M3"]
        assert len(kept) == (8 if how == "keep" else 0)
        load_checkpoint_model(output, torch.float32)


def test_a_smoke_run_scales_the_small_model(tmp_path: Path, source: Path) -> None:
    """The section goes as it is: lengths and head widths of the small model are the real one's."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: int8}", f"{YARN}{MEASURED}")
    done = smoke(make_plan(load_recipe(str(recipe)), output=tmp_path / "out"), Silent())
    assert done.report.context is not None
    assert done.report.context.length == 2048
    assert done.report.context.cost is not None


def test_faults_of_the_plan(tmp_path: Path, source: Path) -> None:
    """At their key; a factor that is too large, and windows past the trained length, are warned of."""
    faulty = write_recipe(tmp_path / "a.yaml", source, "{scheme: int8}", YARN.replace("yarn", "dynamic"))
    with pytest.raises(PlanError, match="vLLM") as raised:
        make_plan(load_recipe(str(faulty)))
    assert "a.yaml:3:11: context.method: " in str(raised.value)
    # What is too long for the source alone is no second fault: it is not what is wrong.
    longer = f"{YARN.replace('yarn', 'dynamic')}evaluate: {{tokens: 2048, context: 1024}}\n"
    faulty = write_recipe(tmp_path / "c.yaml", source, "{scheme: int8}", longer)
    with pytest.raises(PlanError) as raised:
        make_plan(load_recipe(str(faulty)))
    assert len(raised.value.faults) == 1
    long = "evaluate: {tokens: 256, context: 64, long: {documents: no.txt, tokens: 1024}}\n"
    faulty = write_recipe(
        tmp_path / "d.yaml", source, "{scheme: int8}", YARN.replace("yarn", "dynamic") + long
    )
    with pytest.raises(PlanError) as raised:
        make_plan(load_recipe(str(faulty)))
    assert "more than the 512" not in str(raised.value)
    section = (
        "context: {method: linear, target_length: 1024, factor: 4}\nevaluate: {tokens: 2048, context: 1024}\n"
    )
    plan = make_plan(load_recipe(str(write_recipe(tmp_path / "b.yaml", source, "{scheme: int8}", section))))
    warned = " ".join(plan.warnings)
    assert "context.factor 4 reaches 2,048 tokens; 1,024 need 2" in warned
    assert "beyond the 512 tokens that the source was trained at" in warned
    assert plan.prediction.context == 2048


def test_keys_change_with_the_scaling_only(tmp_path: Path, source: Path) -> None:
    """Another spelling of the same config has the same stages; another factor has others."""
    keys = []
    for number, section in enumerate(
        ("", YARN, YARN.replace("}", ", factor: 4}"), YARN.replace("2048", "1024"))
    ):
        path = write_recipe(
            tmp_path / f"{number}.yaml", source, "{scheme: int8}", f"{section}evaluate: null\n"
        )
        keys.append(stream_key(make_plan(load_recipe(str(path)))))
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_a_shared_stage_skips_no_check(tmp_path: Path, source: Path) -> None:
    """A text that is too short is found before the weights, though the scaling is done already."""
    run(tmp_path, source, f"{YARN}evaluate: null\n")
    (tmp_path / "short.txt").write_text("Too short, though of enough bytes. " * 8)
    rest = f"{YARN}evaluate: {{text: {tmp_path / 'short.txt'}, tokens: 500, context: 128}}\n"
    other = write_recipe(tmp_path / "other.yaml", source, "{scheme: int8}", rest)
    with pytest.raises(UserError, match="tokens"):
        compressor.run(other, output=tmp_path / "out" / "other")
    assert len(list((tmp_path / "out" / ".compress-workspace" / "stages").glob("stream-*"))) == 1
