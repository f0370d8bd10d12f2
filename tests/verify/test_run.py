"""A verification from end to end, without an engine: what passes, what is caught, where it is recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.api import run
from compressor.errors import UserError
from compressor.export import exported
from compressor.progress import Progress, Silent
from compressor.report.manifest import check_manifest, read_manifest
from compressor.report.model import load_report
from compressor.report.verification import Verification
from compressor.verify.base import EngineAnswer, EngineRequest
from compressor.verify.engine import read_answer
from compressor.verify.judge import distance
from compressor.verify.run import verify
from compressor.verify.serving import EngineFinding, Questions, engine_facts
from compressor.verify.spec import VerifySpec
from tests.cli.test_main import compress
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama, tiny_llama4
from tests.verify.corrupt import corrupt, edit_config, rewrite

EVALUATED = "evaluate: {tokens: 256, context: 64}"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in NVFP4A16, measured."""
    folder = tmp_path_factory.mktemp("verified")
    source = tiny_llama(folder / "source", hidden=128, intermediate=256)
    recipe = write_recipe(folder / "recipe.yaml", source, "{scheme: nvfp4a16}", EVALUATED)
    return run(recipe, output=folder / "out" / "result").output


def verified(folder: Path, **changes: object) -> Verification:
    """A verification without an engine, on few tokens."""
    given: dict[str, object] = {
        "cache": folder.parent / "cache",
        "engine": "none",
        "tokens": 256,
        "text": "calibration/heldout.jsonl",
        **changes,
    }
    spec = VerifySpec(checkpoint=folder, **given)  # type: ignore[arg-type]
    return verify(spec, Silent())


def copy_of(result: Path) -> Path:
    """Beside the original, so that the relative name of the source still holds."""
    copy = result.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(result, copy)
    return copy


def statuses(found: Verification) -> dict[str, str]:
    """Check -> status."""
    return {check.name: check.status for check in found.checks}


def test_a_good_result_passes_and_is_recorded(result: Path) -> None:
    """The source is found through the result's own recipe; the report tells; the manifest still holds."""
    content = read_manifest(result).content_sha256
    found = verified(result)
    assert found.passed
    assert statuses(found).items() >= {"weights": "passed", "copies": "passed", "loss": "passed"}.items()
    assert load_report(result).verification == found
    assert check_manifest(result) == []
    assert read_manifest(result).content_sha256 == content
    assert "## Verified" in (result / "README.md").read_text()


@pytest.mark.parametrize("kind", ["swap_nibbles", "swap_scales", "double_scale"])
def test_wrong_values_are_caught(result: Path, kind: str) -> None:
    """Shapes, dtypes and ranges are right, and the manifest is gone: only the source tells."""
    copy = copy_of(result)
    corrupt(copy, kind)
    found = verified(copy)
    assert not found.passed
    assert statuses(found)["weights"] == "failed"


def test_an_edited_copy_is_caught(result: Path) -> None:
    """A norm that is not the source's."""
    from safetensors.torch import load_file, save_file

    copy = copy_of(result)
    (copy / "manifest.json").unlink()
    shard = copy / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, shard, metadata={"format": "pt"})
    found = verified(copy)
    assert statuses(found)["copies"] == "failed"


def test_a_broken_structure_stops_early(result: Path) -> None:
    """Nothing is loaded, and the verdict names the check."""
    copy = copy_of(result)
    corrupt(copy, "drop_scale")
    found = verified(copy)
    assert not found.passed
    assert statuses(found)["models"] == "skipped"
    assert "weights" not in statuses(found)


def test_another_source_is_no_source(result: Path, tmp_path: Path) -> None:
    """The right shapes with other weights."""
    other = tiny_llama(tmp_path / "other", hidden=128, intermediate=256, seed=1)
    found = verified(result, source=str(other))
    assert statuses(found)["weights"] == "failed"


def test_experts_are_verified_too(tmp_path: Path) -> None:
    """One by one in the result, fused in the source."""
    source = tiny_llama4(tmp_path / "source", hidden=128)
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: fp8_dynamic}")
    output = run(recipe, output=tmp_path / "out" / "moe").output
    assert verified(output).passed
    corrupt(output, "double_scale")
    assert statuses(verified(output))["weights"] == "failed"


def test_a_result_that_lost_more_than_it_says_fails(result: Path) -> None:
    """The report's own figure is what the loss is held to."""
    copy = copy_of(result)
    (copy / "manifest.json").unlink()
    report = json.loads((copy / "report.json").read_text())
    report["quality"]["perplexity"]["increase"] = -0.9
    (copy / "report.json").write_text(json.dumps(report))
    assert statuses(verified(copy))["loss"] == "failed"


def test_without_a_source_it_says_so(result: Path) -> None:
    """A folder from elsewhere: structure and loading only."""
    copy = copy_of(result)
    for name in ("recipe.yaml", "manifest.json", "report.json"):
        (copy / name).unlink()
    found = verified(copy)
    assert found.passed
    assert statuses(found)["loss"] == "skipped"
    assert not (copy / "report.json").exists()


def test_a_linked_report_is_left_alone(result: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub's cache is made of links: nothing is written through them."""
    copy = copy_of(result)
    report = tmp_path / "report.json"
    shutil.move(copy / "report.json", report)
    (copy / "report.json").symlink_to(report)
    before = report.read_bytes()
    verified(copy)
    assert report.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 0.01}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}],
    ids=lambda change: next(iter(change)),
)
def test_a_config_of_another_meaning_is_caught(result: Path, change: dict[str, object]) -> None:
    """Every engine reads the same wrong config, so that all agree."""
    copy = copy_of(result)
    (copy / "manifest.json").unlink()
    edit_config(copy, lambda config: config.update(change))
    assert statuses(verified(copy))["meaning"] == "failed"


def test_another_end_of_text_is_caught(result: Path) -> None:
    """It loads and scores as before, but does not stop where its source does."""
    copy = copy_of(result)
    (copy / "manifest.json").unlink()
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 7}))
    [found] = [check for check in verified(copy).checks if check.name == "meaning"]
    assert found.status == "failed"
    assert "eos_token_id is 7 instead of 255" in found.detail


def test_another_vocabulary_is_caught(result: Path) -> None:
    """Two tokens have changed places; the second copy has ids beyond the embedding."""
    for move in (lambda ids: {71: 73, 73: 71}.get(ids, ids), lambda ids: ids + 5000 if ids > 60 else ids):
        copy = copy_of(result)
        (copy / "manifest.json").unlink()
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {token: move(number) for token, number in vocabulary.items()}
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert statuses(verified(copy))["meaning"] == "failed"


def test_without_a_tokenizer_the_source_lends_its_own(result: Path) -> None:
    """Engines take one by an option, so that its absence is no fault."""
    copy = copy_of(result)
    for name in ("manifest.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    found = verified(copy)
    assert found.passed
    assert statuses(found)["tokenizer"] == "skipped"


def test_a_tensor_that_the_source_lacks_is_caught(tmp_path: Path) -> None:
    """A head beside a tied embedding: transformers prefers it."""
    source = tiny_llama(tmp_path / "source", hidden=128, intermediate=256, tie=True)
    copy = tmp_path / "copy"
    run(write_recipe(tmp_path / "recipe.yaml", source, "{scheme: int8}"), output=copy)
    (copy / "manifest.json").unlink()
    for factor, status in ((1.0, "passed"), (2.0, "failed")):
        rewrite(
            copy,
            lambda tensors, by=factor: (
                tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * by}
            ),
        )
        assert statuses(verified(copy))["copies"] == status


def test_an_unquantized_edited_copy_is_caught(result: Path, tmp_path: Path) -> None:
    """Nothing to decode, but still not the source."""
    source = result.parent.parent / "source"
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert verified(copy, source=str(source)).passed
    rewrite(copy, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.01})
    assert statuses(verified(copy, source=str(source)))["copies"] == "failed"


@pytest.mark.parametrize("positions", [-3, 0, 1])
def test_impossible_positions_are_told(result: Path, positions: int) -> None:
    """No prompt fits: a finding, not a crash."""
    copy = copy_of(result)
    (copy / "manifest.json").unlink()
    edit_config(copy, lambda config: config.update(max_position_embeddings=positions))
    assert statuses(verified(copy))["transformers"] == "failed"


def test_edited_files_are_not_made_exported(result: Path) -> None:
    """A second verification must not find a manifest that the first one mended."""
    copy = copy_of(result)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    for _ in range(2):
        assert statuses(verified(copy))["manifest"] == "failed"


def test_a_verification_that_was_killed_leaves_an_export(result: Path) -> None:
    """Report, page and card are written before the manifest: the next verification mends it, and says so."""
    copy = copy_of(result)
    (copy / "report.json").write_text((copy / "report.json").read_text() + " ")
    assert exported(copy) is not None
    [told] = [check.detail for check in verified(copy).checks if check.name == "manifest"]
    assert "describe the run" in told
    assert check_manifest(copy) == []


def test_an_engine_that_is_insisted_on_must_be_there(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is loaded."""
    monkeypatch.setattr("compressor.verify.run.find_engine_python", lambda *given: None)
    with pytest.raises(UserError, match="no environment with vLLM"):
        verified(result, engine="vllm")


@pytest.mark.parametrize(
    ("factor", "verdict", "passed"), [(0.0, "agrees", True), (0.5, "undecided", False)], ids=["quiet", "loud"]
)
def test_insisting_on_the_engine_takes_agreement(
    result: Path, monkeypatch: pytest.MonkeyPatch, factor: float, verdict: str, passed: bool
) -> None:
    """Rounded activations whose noise is half the effect hide faults: no proof for who insists on one."""
    from compressor.verify import run as module

    def answering(asked: Questions, progress: Progress) -> EngineFinding:
        reference = asked.reference
        assert reference.source is not None
        scored = tuple(map(tuple, reference.checkpoint))
        noise = factor * distance(reference.checkpoint, reference.source).mean
        rounded = replace(
            reference, rounded=reference.checkpoint, rounded_noise=noise, checkpoint=reference.source
        )
        answer = EngineAnswer("vllm", "0", "cpu", "float32", (), None, scored, (), None, "done")
        finding = engine_facts(answer, rounded, 1e-6, None)
        assert finding.rounded
        return finding

    monkeypatch.setattr(module, "question_engine", answering)
    monkeypatch.setattr(module, "find_engine_python", lambda *given: Path("python"))
    copy = copy_of(result)
    insisted = verified(copy, engine="vllm")
    assert insisted.engine is not None
    assert insisted.engine.verdict == verdict
    assert insisted.passed is passed
    assert verified(copy, engine="auto").passed


def test_a_source_without_room_is_no_floor(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is asked about the checkpoint, but not about a source that cannot be written for it."""
    from compressor.verify import run as module

    sources = []

    def answering(asked: Questions, progress: Progress) -> EngineFinding:
        sources.append(asked.source)
        scored = tuple(map(tuple, asked.reference.checkpoint))
        answer = EngineAnswer("vllm", "0", "cpu", "float32", (), None, scored, (), None, "done")
        return engine_facts(answer, asked.reference, None, None)

    monkeypatch.setattr(module, "question_engine", answering)
    monkeypatch.setattr(module, "find_engine_python", lambda *given: Path("python"))
    copy = copy_of(result)
    assert verified(copy, engine="auto").passed
    monkeypatch.setattr(module, "missing_room", lambda *given: "the disk is full")
    assert verified(copy, engine="auto").passed
    assert sources[0] is not None
    assert sources[1] is None


def test_exit_codes(result: Path) -> None:
    """0 for what is right, 1 for what is not, 2 for what is not there."""
    few = ("--engine", "none", "--tokens", "256", "-q")
    good = compress("verify", str(result), *few, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["passed"] is True
    copy = copy_of(result)
    corrupt(copy, "drop_tensor")
    bad = compress("verify", str(copy), *few)
    assert bad.returncode == 1
    assert bad.stdout.rstrip().splitlines()[-1].startswith("FAILED")
    assert compress("verify", str(result / "nowhere"), *few).returncode == 2


@pytest.mark.parametrize("broken", [False, True], ids=["died", "broken answer"])
def test_logs_of_a_failed_engine_are_kept(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool
) -> None:
    """The working folder goes; what the engine wrote is what a user needs then."""
    from compressor.verify import run as module

    def failing(asked: Questions, progress: Progress) -> EngineFinding:
        (asked.scratch / "ask-1").mkdir()
        (asked.scratch / "ask-1" / "engine.log").write_text("Traceback: no such operation")
        answer = EngineAnswer("vllm", "0", "cpu", "float32", (), None, (), (), "it died", "load")
        if broken:
            (asked.scratch / "answer.json").write_text('{"stage": "done", "logpr')
            request = EngineRequest("model", "float32", [], [], 1)
            answer = read_answer(asked.scratch / "answer.json", request)
        return engine_facts(answer, asked.reference, None, None)

    monkeypatch.setattr(module, "question_engine", failing)
    monkeypatch.setattr(module, "find_engine_python", lambda *given: Path("python"))
    found = verified(copy_of(result), engine="auto", cache=tmp_path / "work" / "hub")
    assert not found.passed
    [log] = (tmp_path / "work").glob("engine-*.log")
    assert "no such operation" in log.read_text()
    assert not list((tmp_path / "work").glob("verify.tmp-*"))
