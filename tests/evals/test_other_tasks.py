"""Tasks that do not ship: found by lm-eval's names, items from a Hub that is not asked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.errors import UserError
from compressor.evals import tasks
from compressor.evals.answers import Answers
from compressor.evals.run import check_tasks
from compressor.evals.task_record import compare_tasks
from compressor.evals.tasks import load_task, run_tasks
from compressor.progress import Silent
from tests.tiny import tiny_llama

Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    """A random model with a byte tokenizer."""
    folder = tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def some_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own, but for those that are not asked for here: indexing all takes seconds."""
    folders = [str(TASKS / name) for name in ("arc", "gsm8k", "humaneval", "cruxeval")]
    manager = tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(tasks, "_known", lambda: manager)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``load_dataset`` gives a few items, and says where it would have kept them."""
    folder = tmp_path / "hub"

    def load(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        assert Path(datasets.config.HF_DATASETS_CACHE) == folder / "datasets"
        if path == "openai/gsm8k":
            rows = [{"question": f"{n} and {n}?", "answer": f"so #### {2 * n}"} for n in range(12)]
            splits = ("train", "test")
        else:
            assert (path, name) == ("allenai/ai2_arc", "ARC-Easy")
            choices = {"text": ["red", "green"], "label": ["A", "B"]}
            rows = [
                {"id": str(n), "question": f"Which {n}?", "choices": choices, "answerKey": "AB"[n % 2]}
                for n in range(6)
            ]
            splits = ("train", "validation", "test")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return folder


def test_a_hub_task_is_run_by_its_name(tiny: Model, some_tasks: None, hub: Path) -> None:
    """Its items are answered as its prompt says; limits count, and the cache's place is put back."""
    before = datasets.config.HF_DATASETS_CACHE
    found = run_tasks(*tiny, {"arc_easy": 4}, whose="source", progress=Silent(), hub=hub)["arc_easy"]
    assert before == datasets.config.HF_DATASETS_CACHE
    assert {metric: len(scores) for metric, scores in found.scores.items()} == {"acc": 4, "acc_norm": 4}
    model, tokenizer = tiny
    right = []
    for number in range(4):
        context = tokenizer.encode(f"Question: Which {number}?\nAnswer:")
        scores = []
        for choice in ("red", "green"):
            ids = torch.tensor([context + tokenizer.encode(f" {choice}")])
            with torch.no_grad():
                logprob = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(logprob[-len(choice) - 1 :].sum()))
        right.append(float(scores.index(max(scores)) == number % 2))
    assert found.scores["acc"] == tuple(right)


def test_what_is_drawn_is_drawn_with_each_seed(
    tiny: Model, some_tasks: None, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot examples of gsm8k differ by seed and an item counts with its mean; piqa draws nothing."""
    asked: list[list[str]] = []

    def answer(_: object, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked.append([request.args[0] for request in requests])
        # Right for the first item, and for the second with the first seed only.
        return ["#### 0", "#### 2" if len(asked) == 1 else "#### 7"][: len(requests)]

    monkeypatch.setattr(tasks.HFLM, "generate_until", answer)
    found = run_tasks(*tiny, {"gsm8k": 2}, whose="source", progress=Silent(), hub=hub, seeds=(0, 1))["gsm8k"]
    assert (len(asked), found.seeds) == (2, 2)
    assert asked[0] != asked[1]
    assert found.scores["exact_match"] == (1.0, 0.5)
    again = run_tasks(*tiny, {"piqa": 2}, whose="source", progress=Silent(), hub=hub, seeds=(0, 1))["piqa"]
    assert again.seeds == 1
    compared = compare_tasks(found, found)
    assert compared.main == "exact_match"
    figures = compared.metrics["exact_match"]
    # Two items that are more or less right: no counts, and too few for an interval.
    assert (figures.source, figures.lost, figures.p_value) == (0.75, None, None)
    assert figures.difference_ci95 is None


def test_answers_of_the_source_are_computed_once(
    tiny: Model, some_tasks: None, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same items give the same figures without the model; other items are asked."""
    answers = Answers(tmp_path / "answers", {"source": "tiny"})

    def ask(limit: int) -> dict[str, Any]:
        return run_tasks(
            *tiny, {"piqa": limit, "arc_easy": 2}, whose="source", progress=Silent(), hub=hub, answers=answers
        )

    first = ask(5)
    with monkeypatch.context() as patched:
        patched.setattr(tasks._Scorer, "_loglikelihoods", lambda *_: pytest.fail("computed again"))
        assert ask(5) == first
    assert len(ask(6)["piqa"].scores["acc"]) == 6


def test_kept_texts_are_of_one_tokenizer_and_version(
    tiny: Model, some_tasks: None, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written to a prompt is not taken for what other tokens or another lm-eval would make of it."""
    answers = Answers(tmp_path / "answers", {"source": "tiny"})
    made: list[int] = []

    def answer(_: object, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        made.append(len(requests))
        return ["#### 0"] * len(requests)

    monkeypatch.setattr(tasks.HFLM, "generate_until", answer)

    def ask() -> int:
        run_tasks(*tiny, {"gsm8k": 2}, whose="source", progress=Silent(), hub=hub, answers=answers)
        return len(made)

    assert [ask(), ask()] == [1, 1]
    with monkeypatch.context() as patched:
        patched.setattr(tasks.HFLM, "tok_encode", lambda *_, **__: [1, 2, 3])
        assert ask() == 2
    with monkeypatch.context() as patched:
        patched.setattr(tasks, "VERSION", "0.0")
        assert ask() == 3


def test_items_that_cannot_be_fetched_are_the_users_fault(
    some_tasks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason in one line, and what to do without a network."""

    def load(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"arc_easy cannot be prepared: Couldn't reach the Hub\n.*piqa"):
        load_task("arc_easy", tmp_path)


def test_code_of_the_hub_is_not_run(
    some_tasks: None, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics that a task would fetch and import are refused, and what would run the model's answers."""
    loading = pytest.importorskip("evaluate.loading")
    monkeypatch.setattr(loading, "evaluation_module_factory", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UserError, match="humaneval cannot be prepared: its metric code_eval is code from"):
        load_task("humaneval", hub)
    rows = [{"code": "def f(x): return x", "input": "1", "output": "1", "id": "0"}]
    made = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    with pytest.raises(UserError, match="cruxeval_output runs code that the model writes"):
        load_task("cruxeval_output", hub)


def test_unknown_tasks_are_refused_with_their_like(some_tasks: None) -> None:
    """At their place in the recipe; known ones pass without a network."""
    with pytest.raises(UserError, match=r"evaluate\.tasks\.1: unknown task 'arc_eazy'.*\n.*arc_easy"):
        check_tasks(["piqa", "arc_eazy"], where="evaluate.tasks")
    check_tasks(["arc_easy", "piqa", "ai2_arc"])


@pytest.mark.slow
def test_every_name_of_lm_eval_is_known() -> None:
    """Tasks, groups and tags of its whole index, which takes a while to read."""
    with pytest.raises(UserError, match=r"evaluate\.tasks\.1: unknown task 'hellaswagg'.*\n.*hellaswag"):
        check_tasks(["piqa", "hellaswagg"], where="evaluate.tasks")
    check_tasks(["hellaswag", "mmlu", "piqa"])
