"""Recipes that train adapters, from end to end: what is written, planned, refused and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError, UserError
from compressor.model.load import load_checkpoint_model
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama

from .cases import content, write_recipe

CONTEXT = "context: {method: yarn, target_length: 2048}\n"
TRAIN = (
    "adapters: {documents: long.txt, sequence_length: 128, tokens: 512, tokens_per_step: 128, "
    "warmup_steps: 1, rank: 4, learning_rate: 0.01, direct_learning_rate: 0.01"
)
ADAPTERS = f"{TRAIN}}}\n"
BESIDE = f"{TRAIN}, train: [], merge: false}}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tied head whose heads turn 16 pairs."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=64, intermediate=128, heads=2, kv_heads=1, tie=True)


def recipe(folder: Path, source: Path, rest: str, weights: str = "{scheme: nvfp4a16}") -> Path:
    """A recipe beside a long text."""
    folder.mkdir(exist_ok=True)
    (folder / "long.txt").write_text("the cat sat on the mat and the dog sat on the cat. " * 40)
    return write_recipe(folder / "recipe.yaml", source, weights, rest)


def run(folder: Path, source: Path, rest: str, weights: str = "{scheme: nvfp4a16}") -> Path:
    """The output folder of a run."""
    return compressor.run(recipe(folder, source, rest, weights), output=folder / "out" / "result").output


@pytest.mark.parametrize("rest", [ADAPTERS, BESIDE])
def test_another_name_is_no_other_training(tmp_path: Path, source: Path, rest: str) -> None:
    """Unless it is written into the adapter that is shipped."""
    path = recipe(tmp_path, source, f"{CONTEXT}{rest}evaluate: null\n")
    keys = set()
    for name in ("one", "other"):
        path.write_text(f"name: {name}\n" + "".join(path.read_text().partition("model:")[1:]))
        plan = make_plan(load_recipe(str(path)), output=tmp_path / "out")
        assert plan.adapters is not None
        keys.add(plan.adapters.key(plan.scaled_source))
    assert len(keys) == (1 if rest == ADAPTERS else 2)


def test_several_processes_are_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would run every stage, and wait for the others in the training."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        run(tmp_path, source, f"{CONTEXT}{ADAPTERS}evaluate: null\n")


def test_adapters_are_in_the_weights(tmp_path: Path, source: Path) -> None:
    """Norms and embeddings that stay in 16 bit are others than the source's; the head stays tied."""
    output = run(tmp_path, source, f"{CONTEXT}{ADAPTERS}evaluate: {{tokens: 256, context: 64}}\n")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert before[name].dtype == after[name].dtype
        assert not torch.equal(before[name], after[name])
    model = load_checkpoint_model(output, torch.float32).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    values = {check.name: check for check in check_source_values(output, FolderSource(source), Silent())}
    assert (values["weights"].status, values["copies"].status) == ("passed", "passed")
    assert "8 of them to about that, trained" in values["weights"].detail
    assert "6 were trained on long documents" in values["copies"].detail
    report = json.loads((output / "report.json").read_text())
    stages = [stage["name"] for stage in report["stages"]]
    assert stages[:2] == ["context", "adapt"]
    assert len(report["adapters"]["losses"]) == 4
    assert report["context"]["cost"] is not None


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_verify_tells_other_weights(tmp_path: Path, source: Path, name: str) -> None:
    """Values that are no training's are found, and so are trained ones that the recipe does not train."""
    rules = "{scheme: nvfp4a16, ignore: ['*.self_attn.*']}"
    output = run(tmp_path, source, f"{ADAPTERS}evaluate: null\n", rules)
    tensors = load_file(output / "model.safetensors")
    other = tensors | {name: tensors[name].flip(0) * -1}
    save_file(other, output / "model.safetensors", metadata={"format": "pt"})
    given = FolderSource(source)
    (copies,) = [check for check in check_source_values(output, given, Silent()) if check.name == "copies"]
    assert (copies.status, name in copies.detail) == ("failed", True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    text = (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text(text.partition("adapters:")[0] + "weights: {scheme: nvfp4a16}\n")
    (copies,) = [check for check in check_source_values(output, given, Silent()) if check.name == "copies"]
    assert copies.status == "failed"


def test_adapters_beside_the_weights(tmp_path: Path, source: Path) -> None:
    """Not merged, they lie in a folder of their own, as peft reads it, and weights are the source's."""
    from peft import PeftModel

    plain = run(tmp_path / "plain", source, f"{CONTEXT}evaluate: null\n")
    output = run(tmp_path / "beside", source, f"{CONTEXT}{BESIDE}evaluate: null\n")
    assert (plain / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    model = load_checkpoint_model(output, torch.float32).model
    ids_BT = torch.arange(32)[None]
    with torch.no_grad():
        before = model(ids_BT).logits
        after = PeftModel.from_pretrained(model, str(output / "adapter"))(ids_BT).logits
    assert float((after - before).abs().max()) > 1e-3
    report = json.loads((output / "report.json").read_text())
    assert "--lora-modules adapter=" in report["serve"]["command"]
    assert "adapter/adapter_model.safetensors" in report["files"]
    assert all(check.status != "failed" for check in check_structure(output, Silent()))


def test_calibrated_on_what_was_trained(tmp_path: Path, source: Path) -> None:
    """A walk follows, and a run that is done again from nothing is the same to the byte."""
    calibration = "calibration: {datasets: [{path: long.txt}], num_samples: 2, sequence_length: 64}\n"
    rest = f"{CONTEXT}{ADAPTERS}{calibration}evaluate: null\n"
    weights = "{scheme: nvfp4a16, solver: gptq}"
    outputs = [run(tmp_path / name, source, rest, weights) for name in ("one", "two")]
    assert content(outputs[0]) == content(outputs[1])


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            ADAPTERS.replace("128, tokens:", "4096, tokens:"),
            "sequences of 4,096 tokens are longer than the 512",
        ),
        (ADAPTERS.replace("long.txt", "missing.txt"), "missing.txt"),
        (ADAPTERS.replace("step: 128", "step: 64"), "holds no whole sequence of 128"),
        (ADAPTERS.replace("tokens: 512", "tokens: 100"), "no whole step of 128"),
        (ADAPTERS.replace("steps: 1", "steps: 4"), "a warm-up of 4 steps leaves nothing"),
        (ADAPTERS.replace("rank: 4", "rank: 4, targets: [w_q]"), "no matrix is called w_q"),
        (f"{ADAPTERS}evaluate: {{text: long.txt, tokens: 256, context: 64}}\n", "is an evaluation text"),
    ],
)
def test_faults_of_the_plan(tmp_path: Path, source: Path, rest: str, message: str) -> None:
    """Found before anything is trained."""
    path = recipe(tmp_path, source, rest if "evaluate" in rest else f"{rest}evaluate: null\n")
    with pytest.raises(PlanError) as caught:
        make_plan(load_recipe(str(path), ()))
    assert message in str(caught.value)


def test_smoothing_and_adapters_apart(tmp_path: Path, source: Path) -> None:
    """A solver that scales what matrices read goes with merged adapters only."""
    rest = "calibration: {datasets: [{path: long.txt}], num_samples: 2, sequence_length: 64}\n"
    rest += "evaluate: null\n"
    weights = "{scheme: nvfp4a16, solver: smooth}"
    path = recipe(tmp_path, source, BESIDE + rest, weights)
    with pytest.raises(PlanError, match="solver smooth scales what matrices read"):
        make_plan(load_recipe(str(path), ()))
    path = recipe(tmp_path, source, ADAPTERS + rest, weights)
    plan = make_plan(load_recipe(str(path), ()))
    assert plan.adapters is not None
    assert any("without a context section" in warning for warning in plan.warnings)


def test_plan_counts_what_is_trained(tmp_path: Path, source: Path) -> None:
    """Adapters, norms and one embedding; time grows with tokens."""
    plan = make_plan(load_recipe(str(recipe(tmp_path, source, f"{ADAPTERS}evaluate: null\n")), ()))
    adapters = plan.adapters
    assert adapters is not None
    inner = {"q": 64 + 64, "k": 64 + 32, "v": 64 + 32, "o": 64 + 64}
    assert adapters.trained == 2 * 4 * sum(inner.values()) + 5 * 64 + 256 * 64
    assert (adapters.spec.steps, adapters.spec.sequences, adapters.tokens) == (4, 1, 512)
    longer = ADAPTERS.replace("tokens: 512", "tokens: 1024") + "evaluate: null\n"
    twice = make_plan(load_recipe(str(recipe(tmp_path, source, longer)), ())).adapters
    assert twice is not None
    assert twice.time_s == pytest.approx(2 * adapters.time_s)
