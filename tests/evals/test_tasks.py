"""The shipped lm-eval task, and the scorer against lm-eval's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.data import shipped_root
from compressor.errors import CheckpointError
from compressor.evals import tasks as tasks_module
from compressor.evals.answers import Answers
from compressor.evals.base import SHIPPED_TASKS
from compressor.evals.tasks import run_tasks
from compressor.progress import Silent
from tests.tiny import tiny_llama

Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    """A random model with a byte tokenizer."""
    folder = tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_scores_are_lm_evals_own(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches by length and the short projection give HFLM's numbers, in the order of the requests."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(tasks_module, "BATCH_TOKENS", 100)
    monkeypatch.setattr(tasks_module, "LOGIT_BYTES", 2 * 4 * 256 * 7)
    scorer = tasks_module._Scorer(*tiny, "test", Silent())
    generator = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(250, (count,), generator=generator).tolist()

    requests = [(("", ""), some(1, 60), some(1, 30)) for _ in range(40)]
    # Longer than the model's 512 positions, and one that greedy decoding would give.
    requests.append((("", ""), some(500, 501), some(20, 21)))
    context = some(5, 6)
    greedy = tiny[0](torch.tensor([context])).logits[0, -1].argmax().item()
    requests.append((("", ""), context, [greedy]))
    found = scorer._loglikelihood_tokens(requests)
    expected = HFLM._loglikelihood_tokens(scorer, requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert found[-1][1]
    torch.testing.assert_close(
        torch.tensor([total for total, _ in found]), torch.tensor([total for total, _ in expected])
    )


def test_piqa_is_answered_as_its_prompt_says(
    tiny: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """acc is by log-likelihood, acc_norm by that per character, on the upstream prompt; silent."""
    found = run_tasks(*tiny, {"piqa": 12}, whose="source", progress=Silent(), hub=tmp_path)["piqa"]
    assert capfd.readouterr() == ("", "")
    model, tokenizer = tiny
    lines = (shipped_root() / "calibration/piqa/piqa.jsonl").read_text(encoding="utf-8").splitlines()
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for line in lines[:12]:
        item = json.loads(line)
        context = tokenizer.encode(f"Question: {item['question']}\nAnswer:")
        scores = []
        for choice in item["choices"]:
            ids = torch.tensor([(context + tokenizer.encode(f" {choice}"))[-513:]])
            with torch.no_grad():
                logprob = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(logprob[-len(tokenizer.encode(f" {choice}")) :].sum()))
        by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        right["acc"].append(scores.index(max(scores)) == item["gold"])
        right["acc_norm"].append(by_length.index(max(by_length)) == item["gold"])
    assert {metric: list(values) for metric, values in found.scores.items()} == right
    assert found.accuracy("acc_norm") == sum(right["acc_norm"]) / 12


@pytest.mark.parametrize("task", SHIPPED_TASKS)
def test_the_tasks_are_upstreams(task: str) -> None:
    """The YAML differs from lm-eval's of that name only in where the items come from."""
    import lm_eval

    class Loader(yaml.SafeLoader):
        """Reads ``!function`` as its text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    upstream, ours = (
        yaml.load(path.read_text(), Loader)
        for path in (
            Path(lm_eval.__file__).parent / f"tasks/{task}/{task}.yaml",
            shipped_root() / f"calibration/{task}/{task}.yaml",
        )
    )
    assert ours.pop("custom_dataset") == f"{task}_items.load"
    assert ours.pop("num_fewshot") == 0
    for key in ("dataset_path", "dataset_name", *(key for key in upstream if key.endswith("_split"))):
        if key not in ours:
            upstream.pop(key)
    assert ours == upstream


def test_openbookqa_has_its_right_answers(tiny: Model, tmp_path: Path) -> None:
    """A scorer that knows the shipped file's gold answers is right everywhere."""
    lines = (
        (shipped_root() / "calibration/openbookqa/openbookqa.jsonl").read_text(encoding="utf-8").splitlines()
    )
    items = [json.loads(line) for line in lines]
    gold = {(item["question"], f" {item['choices'][item['gold']]}") for item in items}

    class Knowing(Answers):
        """Answers without the model."""

        def kept(self, kind: str, asked: list[list[list[int]]], compute: object) -> list[tuple[float, bool]]:
            words = [tuple(tiny[1].decode(ids) for ids in request) for request in asked]
            return [(0.0 if pair in gold else -9.0, False) for pair in words]

    found = run_tasks(
        *tiny,
        {"openbookqa": 40},
        whose="source",
        progress=Silent(),
        hub=tmp_path,
        answers=Knowing(tmp_path, {}),
    )["openbookqa"]
    assert found.scores["acc"] == (1.0,) * 40


def test_nan_is_not_an_answer(tiny: Model, tmp_path: Path) -> None:
    """A broken model is an error, not a coin toss."""
    with torch.no_grad():
        tiny[0].lm_head.weight[:] = torch.nan
    with pytest.raises(CheckpointError, match=r"piqa \(result\): log-likelihoods are NaN"):
        run_tasks(*tiny, {"piqa": 2}, whose="result", progress=Silent(), hub=tmp_path)
