"""``compress eval --draft`` on tiny checkpoints: every kind of draft, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from compressor.cli.main import cli
from compressor.drafts.eagle3_files import write_head
from compressor.evals import decode, decode_compare
from tests.drafts.eagle import make_head, make_target
from tests.model.published import PUBLISHED
from tests.tiny import tiny_llama, write_byte_tokenizer


@pytest.fixture(autouse=True)
def every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models run in circles, and are measured here all the same."""
    monkeypatch.setattr(decode_compare, "loops", lambda ids: False)


def measure(checkpoint: Path, draft: str, *more: str) -> Result:
    """On two short documents, in the folder of the checkpoint."""
    text = checkpoint.parent / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{word} " * 9}) for word in ("one", "two")))
    how = {
        "text": f"words={text}", "prompts": "2", "prompt-tokens": "10", "new-tokens": "12", "runs": "1",
        "tokens": "2", "dtype": "float32",
    }  # fmt: skip
    options = [word for name, value in how.items() for word in (f"--draft-{name}", value)]
    asked = [str(checkpoint), "--source", str(checkpoint), "--draft", draft, *options, "-q", *more]
    return CliRunner().invoke(cli, ["eval", *asked])


def told(result: Result) -> Any:
    """What ``--json`` prints of decoding."""
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)["decoding"]


def test_a_draft_model_is_measured(tmp_path: Path) -> None:
    """The checkpoint as its own draft foretells everything; both controls are there; tables are printed."""
    checkpoint = tiny_llama(tmp_path / "model")
    found = told(measure(checkpoint, str(checkpoint), "--draft-batch", "1,2", "--json"))
    assert found["identical"]
    assert (found["tokens"], found["dtype"]) == (2, "float32")
    assert [domain["batch"] for domain in found["domains"]] == [1, 2]
    for domain in found["domains"]:
        assert domain["prompts"] == 2
        assert [draft["name"] for draft in domain["drafts"]] == ["draft_model", "last token", "look-up"]
        assert domain["drafts"][0]["length"] == 3
    printed = measure(checkpoint, str(checkpoint))
    assert printed.exit_code == 0, printed.output
    assert "100% 100%" in printed.stdout
    assert "2 of 2" in printed.stdout
    assert "Rates are of all proposals." in " ".join(printed.stdout.split())


def test_an_eagle3_head_is_measured(tmp_path: Path) -> None:
    """Found by its config."""
    target = make_target(tmp_path / "model")
    draft = tmp_path / "draft"
    draft.mkdir()
    write_head(draft, make_head(target), verifier=str(target.folder), tokens=2, dtype=torch.float32)
    found = told(measure(target.folder, str(draft), "--json"))
    assert found["identical"]
    assert [part["name"] for part in found["domains"][0]["drafts"]] == ["eagle3", "last token", "look-up"]


def test_a_native_layer_is_measured(tmp_path: Path) -> None:
    """Of the checkpoint itself; a folder without one is refused."""
    checkpoint = PUBLISHED["qwen3_next"](tmp_path / "model")
    write_byte_tokenizer(checkpoint)
    assert told(measure(checkpoint, "native", "--json"))["identical"]
    refused = measure(tiny_llama(tmp_path / "other"), "native")
    assert refused.exit_code != 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Folders that hold no draft, other vocabularies, options without a draft."""
    checkpoint = tiny_llama(tmp_path / "model")
    cases = {
        str(tmp_path / "nothing"): "no draft: there is no config.json",
        str(tiny_llama(tmp_path / "larger", vocab=320)): "has 320 rows and the target's 256",
    }
    other = tmp_path / "medusa"
    shutil.copytree(checkpoint, other)
    (other / "config.json").write_text(json.dumps({"speculators_model_type": "medusa"}))
    cases[str(other)] = "speculators of type 'medusa' are not run here"
    for draft, why in cases.items():
        refused = measure(checkpoint, draft)
        assert refused.exit_code != 0
        assert why in str(refused.exception)
    alone = CliRunner().invoke(cli, ["eval", str(checkpoint), "--source", "x", "--draft-tokens", "3"])
    assert "--draft-tokens says how --draft measures" in str(alone.exception)
    wrong = measure(checkpoint, str(checkpoint), "--draft-batch", "1,no")
    assert "is no list of batch sizes" in str(wrong.exception)
    for more, why in (
        (("--draft-temperature", "nan"), "--draft-temperature nan is neither 0 nor from 0.01 to 2"),
        (("--draft-temperature", "1e-9"), "is neither 0 nor from 0.01 to 2"),
        (("--draft-text", "a=README.md,a=README.md"), "--draft-text names 'a' twice"),
        (("--tokens", "64"), "--tokens has no text to read"),
    ):
        assert why in str(measure(checkpoint, str(checkpoint), *more).exception)
    assert str(measure(checkpoint, "native").exception).startswith("--draft: prediction layers of")


def test_drafts_of_no_numbers_are_refused(tmp_path: Path) -> None:
    """NaN would be proposed for tokens, or end sampling with a message of no use."""
    checkpoint = PUBLISHED["qwen3_next"](tmp_path / "model")
    write_byte_tokenizer(checkpoint)
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    for name in ("mtp.fc.weight", "model.norm.weight"):
        tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight has values that are not" in str(measure(checkpoint, str(broken)).exception)
    tensors["model.norm.weight"].fill_(0)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "mtp.fc.weight has values that are not finite" in str(measure(broken, "native").exception)


def test_what_is_lost_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy decoding in float32 that differs from plain decoding: printed, and an error."""

    def careless(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(logits),), 2), logits[:, -1].argmax(-1)

    monkeypatch.setattr(decode, "verify", careless)
    checkpoint = tiny_llama(tmp_path / "model")
    failed = measure(checkpoint, str(checkpoint), "--json")
    assert failed.exit_code != 0
    assert "differs from plain decoding in float32" in str(failed.exception)
    assert json.loads(failed.stdout)["decoding"]["identical"] is False
