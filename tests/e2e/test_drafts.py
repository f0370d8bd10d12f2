"""Recipes with drafts, from end to end: what is written, planned, refused and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.drafts.eagle3 import SharedEnds
from compressor.drafts.eagle3_files import read_head
from compressor.errors import PlanError, UserError
from compressor.model.load import load_checkpoint_model
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.runner import execute
from compressor.verify.structure import check_structure
from tests.model.published import PUBLISHED
from tests.tiny import tiny_llama

from .cases import content, write_recipe

TRAIN = (
    "train: {data: text, sequence_length: 32, tokens: 512, batch: 4, held_out_rows: 4, save_every: 2, "
    "learning_rate: 0.005"
)
EAGLE = f"drafts: {{kind: eagle3, tokens: 2, {TRAIN}, vocabulary_size: 64}}}}\n"
WRITTEN = EAGLE.replace("data: text", "new_tokens: 16, temperature: 1")
TEXTS = "calibration: {datasets: [{path: long.txt}]}\nevaluate: null\n"


WEIGHTS = "draft/model.safetensors"


class _Stopping(Silent):
    """Interrupts a stage after so many of its items."""

    def __init__(self, stage: str, after: int) -> None:
        self._stage, self._left, self._counts = stage, after, False

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._counts = stage == self._stage

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= self._counts
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks with a tied head."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=3, tie=True)


def recipe(folder: Path, source: Path, rest: str, weights: str = "{scheme: nvfp4a16}") -> Path:
    """A recipe beside a text."""
    folder.mkdir(exist_ok=True)
    (folder / "long.txt").write_text("the cat sat on the mat and the dog sat on the cat. " * 200)
    return write_recipe(folder / "recipe.yaml", source, weights, rest)


def run(folder: Path, source: Path, rest: str) -> Path:
    """The output folder of a run."""
    return compressor.run(recipe(folder, source, rest), output=folder / "out" / "result").output


def _report(output: Path) -> Any:
    return json.loads((output / "report.json").read_text())


def test_a_head_beside_the_weights(tmp_path: Path, source: Path) -> None:
    """It lies in draft/, can be read for its target, is served by the line of the report, and is told of."""
    texts = TEXTS.replace("evaluate: null", "evaluate: {tokens: 128, context: 32}")
    output = run(tmp_path, source, EAGLE + texts)
    report = _report(output)
    told = report["drafts"]["training"]
    assert report["quality"]["tokens"] == 128
    assert (told["steps"], told["written"], told["looping"]) == (4, 0, 0)
    assert told["held_out_steps"] == [2, 4]
    assert told["after"]["loss"] < told["before"]["loss"]
    assert [stage["name"] for stage in report["stages"]] == ["stream", "assemble", "drafts", "evaluate"]
    model = load_checkpoint_model(output, torch.float32).model
    config = json.loads((output / "config.json").read_text())
    head = read_head(output / "draft", config, SharedEnds.of(model))
    assert (head.shape.draft_vocabulary, len(head.vocabulary.ids_R)) == (64, 64)
    spoken = json.loads((output / "draft" / "config.json").read_text())["speculators_config"]
    assert spoken["verifier"]["name_or_path"] == report["serve"]["model"]
    command = report["serve"]["command"]
    asked = json.loads(command.partition("--speculative-config ")[2].strip("'"))
    assert asked == {
        "method": "eagle3", "model": f"{report['serve']['model']}/draft", "num_speculative_tokens": 2,
    }  # fmt: skip
    assert {"draft/config.json", "draft/model.safetensors"} <= report["files"].keys()
    checks = check_structure(output, Silent())
    assert all(check.status != "failed" for check in checks), checks
    assert "An EAGLE-3 head proposes 2 tokens at a time" in (output / "README.md").read_text()
    assert "tokens a pass" in (output / "report.html").read_text()


def test_a_rerun_on_what_the_target_writes_is_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, whatever is kept on the disk meanwhile, and wherever the output lies."""
    first = run(tmp_path / "one", source, WRITTEN + TEXTS)
    other = WRITTEN.replace("save_every", "cache: 1MB, save_every")
    second = run(tmp_path / "two", source, other + TEXTS)
    assert (first / "draft" / "model.safetensors").read_bytes() == (
        second / "draft" / "model.safetensors"
    ).read_bytes()
    told = _report(first)["drafts"]["training"]
    assert told["written"] > 0
    # A head names its verifier as it is typed: from the present folder.
    (tmp_path / "three").mkdir()
    monkeypatch.chdir(tmp_path / "three")
    third = run(tmp_path / "three", source, WRITTEN + TEXTS)
    (tmp_path / "four").mkdir()
    monkeypatch.chdir(tmp_path / "four")
    assert content(third) == content(run(tmp_path / "four", source, WRITTEN + TEXTS))


@pytest.mark.parametrize("where", [("draft texts", 1), ("draft", 3), ("hidden states", 5)])
def test_an_interrupted_run_ends_the_same(tmp_path: Path, source: Path, where: tuple[str, int]) -> None:
    """While the target writes, while the head is trained, while states are kept."""
    rest = WRITTEN.replace("save_every", "cache: 1MB, save_every") + TEXTS
    whole = run(tmp_path / "whole", source, rest)
    path = recipe(tmp_path / "killed", source, rest)
    plan = make_plan(
        load_recipe(str(path), ()), output=tmp_path / "killed" / "out" / "result", planning=False
    )
    with pytest.raises(KeyboardInterrupt):
        execute(plan, _Stopping(*where))
    resumed = execute(plan, Silent())
    assert (resumed.output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    (told,) = [stage for stage in resumed.report.stages if stage.name == "drafts"]
    assert told.resumed


def test_a_smaller_model(tmp_path: Path, source: Path) -> None:
    """It is copied, or quantized as the target is, and served as a draft."""
    small = tiny_llama(tmp_path / "small", layers=1)
    rest = f"drafts: {{kind: draft_model, model: {small}, tokens: 3}}\n{TEXTS}"
    output = run(tmp_path / "plain", source, rest)
    before, after = (load_file(folder / "model.safetensors") for folder in (small, output / "draft"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in (output / "draft").iterdir()} == {path.name for path in small.iterdir()}
    assert '"method": "draft_model"' in _report(output)["serve"]["command"]
    assert _report(output)["drafts"]["bytes"] == (output / "draft" / "model.safetensors").stat().st_size
    # The recipe in the result runs from there: its paths are named from that folder.
    near = tiny_llama(tmp_path / "near" / "small", layers=1)
    output = run(near.parent, source, rest.replace(str(small), "small"))
    assert load_recipe(str(output / "recipe.yaml"), ()).recipe.drafts.model == "../../small"
    quantized = run(tmp_path / "quantized", source, rest.replace("tokens: 3", "tokens: 3, quantize: true"))
    assert any(
        name.endswith("weight_packed") for name in load_file(quantized / "draft" / "model.safetensors")
    )
    assert load_checkpoint_model(quantized / "draft", torch.float32).model is not None
    assert all(check.status != "failed" for check in check_structure(quantized, Silent()))


def test_prediction_layers_are_trained_in_their_place(tmp_path: Path) -> None:
    """The weights of the source's own layer are others, all other tensors the same, and all names."""
    given = PUBLISHED["qwen3_next"](tmp_path / "source")
    rest = f"drafts: {{kind: native, tokens: 2, {TRAIN}}}}}\n{TEXTS}"
    plain = run(tmp_path / "plain", given, TEXTS)
    kept = run(tmp_path / "kept", given, f"drafts: {{kind: native, tokens: 2}}\n{TEXTS}")
    output = run(tmp_path / "trained", given, rest)
    before, same, after = (load_file(folder / "model.safetensors") for folder in (plain, kept, output))
    assert before.keys() == same.keys() == after.keys()
    assert all(torch.equal(before[name], same[name]) for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("mtp.") for name in changed)
    told = _report(output)["drafts"]["training"]
    assert told["after"]["loss"] < told["before"]["loss"]
    assert _report(kept)["drafts"]["training"]["planned_steps"] == 0
    command = _report(output)["serve"]["command"]
    assert json.loads(command.partition("--speculative-config ")[2].strip("'")) == {
        "method": "mtp",
        "num_speculative_tokens": 2,
    }
    assert all(check.status != "failed" for check in check_structure(output, Silent()))


def test_decoding_is_measured(tmp_path: Path) -> None:
    """By domain, against a control; the same texts; in every view."""
    # A random model with a tied head says the same token again and again.
    source = tiny_llama(tmp_path / "source", layers=3)
    asked = "measure: {prompts: 2, prompt_tokens: 16, new_tokens: 12, batches: [1, 2], runs: 1}"
    gate = "gates: [{metric: acceptance, min_recovery: 0, confidence: 95%}]"
    gated = TEXTS.replace("null", f"{{tokens: 64, context: 32, {gate}}}")
    output = run(tmp_path, source, EAGLE.replace("tokens: 2,", f"tokens: 2, {asked},") + gated)
    found = _report(output)["drafts"]["decoding"]
    (gate,) = _report(output)["gates"]
    # At the first batch size only; the interval of a share is within it, so that no share at all is enough.
    drafts = [one["drafts"][0] for one in found["domains"] if one["batch"] == 1]
    prompts = [prompt for draft in drafts for prompt in draft["prompts"]]
    assert (gate["unit"], gate["units"]) == ("prompts", len(prompts))
    assert gate["value"] == sum(kept for kept, _ in prompts) / sum(asked for _, asked in prompts)
    assert gate["passed"]
    assert sum(kept for kept, _ in prompts) == sum(sum(draft["accepted_at"]) for draft in drafts)
    assert [(one["domain"], one["batch"]) for one in found["domains"]] == [
        (domain, batch) for batch in (1, 2) for domain in ("prose", "chat", "code")
    ]
    drafts = [draft for one in found["domains"] for draft in one["drafts"]]
    assert {draft["name"] for draft in drafts} == {"draft", "repeat"}
    assert found["identical"]
    assert "speedup" in (output / "README.md").read_text()
    # To measure otherwise, no head is trained again.
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("prompts: 2", "prompts: 1"))
    again = compressor.run(path, output=tmp_path / "out" / "again").report
    assert {stage.name: stage.resumed for stage in again.stages} == {
        "stream": True, "assemble": True, "drafts": True, "decode": False, "evaluate": True,
    }  # fmt: skip


def test_faults_of_a_run_before_anything_is_spent(tmp_path: Path, source: Path) -> None:
    """Other tokens in a draft model of the same size, and more prompts than the texts have."""
    small = tiny_llama(tmp_path / "small", layers=1)
    words = json.loads((small / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (small / "tokenizer.json").write_text(json.dumps(words))
    for drafts, message in (
        (f"{{kind: draft_model, model: {small}}}", "differs from the target's in 2 tokens"),
        (
            "{kind: eagle3, measure: {prompts: 1000}}",
            "prose: [0-9]+ stretches for measuring have 64 tokens, fewer than the 1000",
        ),
    ):
        path = recipe(tmp_path / "run", source, f"drafts: {drafts}\nevaluate: null\n")
        with pytest.raises(UserError, match=message) as caught:
            compressor.run(path, output=tmp_path / "out")
        assert caught.value.where.startswith(str(path))
    assert not (tmp_path / ".compress-workspace" / "stages").exists()


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("drafts: {kind: native}\n", "prediction layers of model_type 'llama' are not run"),
        (EAGLE.replace("size: 64", "size: 4096"), "a draft vocabulary of 4,096 tokens, the target has 256"),
        (EAGLE.replace("length: 32", "length: 1024"), "rows of 1,024 tokens are longer than the 512"),
        (
            EAGLE.replace("kind: eagle3", "kind: eagle3, measure: {prompt_tokens: 500, new_tokens: 13}"),
            "prompts of 500 tokens and 13 more are longer than the 512",
        ),
        (EAGLE.replace("tokens: 512", "tokens: 100"), "100 tokens are no whole step of 4 x 32"),
        (EAGLE.replace("rows: 4", "rows: 4000"), "surely hold only"),
        (EAGLE.replace("length: 32", "length: 4"), "too short to propose 2 tokens ahead"),
        ("drafts: {kind: draft_model, model: nowhere}\n", "the draft model"),
    ],
)
def test_faults_of_the_plan(tmp_path: Path, source: Path, rest: str, message: str) -> None:
    """Found before anything is trained."""
    path = recipe(tmp_path, source, rest + TEXTS)
    with pytest.raises(PlanError) as caught:
        make_plan(load_recipe(str(path), ()))
    (fault,) = caught.value.faults
    assert message in fault.what
    assert fault.where.startswith(str(path))


def test_faults_of_a_draft_model(tmp_path: Path, source: Path) -> None:
    """Another vocabulary, or no smaller a model."""
    for name, sizes, message in (
        ("words", {"layers": 1, "vocab": 300}, "vocabulary has 300 tokens, the target's 256"),
        ("large", {"layers": 4}, "no smaller than the target"),
    ):
        small = tiny_llama(tmp_path / name, **sizes)
        path = recipe(tmp_path, source, f"drafts: {{kind: draft_model, model: {small}}}\n{TEXTS}")
        with pytest.raises(PlanError, match=message):
            make_plan(load_recipe(str(path), ()))


def test_texts_that_are_measured_on_are_refused(tmp_path: Path, source: Path) -> None:
    """A head trained on them would seem better than it is."""
    texts = "calibration: {datasets: [{path: long.txt}]}\n"
    path = recipe(tmp_path, source, f"{EAGLE}{texts}evaluate: {{text: long.txt, tokens: 64, context: 32}}\n")
    with pytest.raises(PlanError, match="measures nothing"):
        make_plan(load_recipe(str(path), ()))
    # Prompts for decoding are of this text, whether it is what the result is evaluated on or not.
    texts = "calibration: {datasets: [{path: calibration/heldout.jsonl}]}\nevaluate: null\n"
    path = recipe(tmp_path, source, EAGLE + texts)
    with pytest.raises(PlanError, match=r"what drafts are measured on: .* measures nothing"):
        make_plan(load_recipe(str(path), ()))


def test_recurrent_states_are_measured_one_at_a_time(tmp_path: Path) -> None:
    """Said by the plan, not after training."""
    given = PUBLISHED["qwen3_next"](tmp_path / "source")
    path = recipe(tmp_path, given, f"drafts: {{kind: native, measure: {{batches: [1, 2]}}}}\n{TEXTS}")
    with pytest.raises(PlanError, match="recurrent states"):
        make_plan(load_recipe(str(path), ()))
