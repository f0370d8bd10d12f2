"""RULER's tasks as lm-eval has them, on a model of our own, without the network."""

from __future__ import annotations

import random
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compressor.errors import UserError
from compressor.evals import ruler
from compressor.evals.long_spec import NETWORKED_RULER_TASKS, RULER_TASKS, check_ruler
from compressor.evals.ruler import ruler_samples, run_ruler
from compressor.progress import Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RULER = Path(lm_eval.__file__).parent / "tasks/ruler"
# Hardly more than the shortest prompts.
TOKENS = {"ruler_vt": 1300, "ruler_cwe": 700, "ruler_fwe": 300}
needs_words = pytest.mark.skipif(find_spec("wonderwords") is None, reason="wonderwords is not installed")
AVAILABLE = [
    pytest.param(task, marks=needs_words if "wonderwords" in needed else ())
    for task, needed in RULER_TASKS.items()
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is tried."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """A token for each word and mark: about as many as real tokenizers make of English."""
    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("task", AVAILABLE)
def test_samples_fit_and_are_of_the_seed(task: str, words: PreTrainedTokenizerBase) -> None:
    """The same for source and result; what draws from Python's generator elsewhere is not disturbed."""
    random.seed(5)
    tokens = TOKENS.get(task, 500)
    made = ruler_samples(task, words, tokens=tokens, count=3, seed=1)
    after = random.random()
    assert made == ruler_samples(task, words, tokens=tokens, count=3, seed=1)
    assert made != ruler_samples(task, words, tokens=tokens, count=3, seed=2)
    random.seed(5)
    assert random.random() == after
    assert len(made) == 3
    for sample in made:
        assert sample["max_length"] == tokens
        assert tokens // 3 < len(words.encode(sample["input"])) <= tokens
        assert all(answer in sample["input"] for answer in sample["outputs"])


@needs_words
@pytest.mark.parametrize("task", list(RULER_TASKS))
def test_the_first_samples_are_lm_evals(
    task: str, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own entry points, but for their number, which cannot be said."""
    tokens, seed = TOKENS.get(task, 500), 7
    made = ruler_samples(task, words, tokens=tokens, count=2, seed=seed)
    with ruler._offline(), ruler._seeded(seed):
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils

        cwe_utils.RNG.seed(seed)
        for module in (niah_utils, vt_utils, cwe_utils, fwe_utils):
            monkeypatch.setattr(module, "get_tokenizer", lambda _: words)
        entry = {
            "ruler_vt": vt_utils.get_vt_dataset,
            "ruler_cwe": cwe_utils.get_cw_dataset,
            "ruler_fwe": fwe_utils.fwe_download,
        }.get(task) or getattr(niah_utils, task)
        upstream = entry(max_seq_lengths=[tokens])["test"]
    assert len(upstream) == 500
    assert list(upstream.select(range(2))) == made


def test_the_tasks_are_upstreams() -> None:
    """What lm-eval's YAML files say, but for where samples come from and at which lengths."""

    class Loader(yaml.SafeLoader):
        """Reads ``!function`` as its text."""

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    upstream: dict[str, dict[str, Any]] = {}
    for path in sorted(RULER.glob("*.yaml")):
        read = yaml.load(path.read_text(), Loader)
        if isinstance(read["task"], str):
            upstream[read["task"]] = read
    assert set(upstream) == set(RULER_TASKS) | set(NETWORKED_RULER_TASKS)
    for task in RULER_TASKS:
        theirs = {**upstream["niah_single_1"], **upstream[task]}
        ours = ruler._ruler_task(task, 4096, [])
        for key in ("tag", "include", "metadata", "custom_dataset", "metric_list", "process_results"):
            for described in (theirs, ours):
                described.pop(key, None)
        assert ours == theirs


@pytest.mark.parametrize("task", AVAILABLE)
def test_a_length_that_holds_no_sample(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Is refused: lm-eval's functions would try for ever."""
    with pytest.raises(UserError, match=f"{task}: no sample of 300 tokens can be made"):
        ruler_samples(task, tokenizer, tokens=300, count=1, seed=0)


@pytest.mark.parametrize("length", [1000, 4096])
def test_a_model_is_scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By how much of the answer is in what it goes on with after the whole prompt; silently."""
    samples = ruler_samples("ruler_fwe", tokenizer, tokens=1000, count=2, seed=0)
    for sample in samples:
        sample["max_length"] = length
    # Whole, although the model has 512 positions.
    prompts = [f"{sample['input']} {sample['gen_prefix']}" for sample in samples]
    seen = set()

    def generate(**asked: Any) -> torch.Tensor:
        ids_1T = asked["input_ids"]
        prompt = tokenizer.decode(ids_1T[0])
        number = prompts.index(prompt)  # lm-eval begins with the longest
        seen.add(number)
        # All three words for the first prompt, one for the second.
        words = samples[number]["outputs"][: 3 if number == 0 else 1]
        return torch.cat([ids_1T, torch.tensor([tokenizer.encode(" " + " ".join(words))])], dim=1)

    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(ruler, "ruler_samples", lambda *_, **__: samples)
        patched.setattr(model, "generate", generate)
        found = run_ruler(
            model, tokenizer, "ruler_fwe", tokens=length, limit=2, seed=0, whose="result", progress=Silent()
        )
    assert (found.task, found.tokens, found.samples) == ("ruler_fwe", length, 2)
    assert found.score == pytest.approx((1 + 1 / 3) / 2)
    assert seen == {0, 1}
    alone = run_ruler(
        model, tokenizer, "ruler_fwe", tokens=800, limit=1, seed=0, whose="source", progress=Silent()
    )
    assert alone.score == 0.0
    assert capfd.readouterr() == ("", "")


def test_tasks_that_need_the_network_say_so(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a package, or do not exist."""
    assert "needs the network: its haystack" in (check_ruler("niah_single_2") or "")
    assert "needs the network: its questions" in (check_ruler("ruler_qa_squad") or "")
    assert "unknown RULER task 'niah'" in (check_ruler("niah") or "")
    assert check_ruler("ruler_vt") is None
    monkeypatch.setattr("compressor.evals.long_spec.find_spec", lambda _: None)
    asked: dict[str, Any] = {"tokens": 9, "limit": 1, "seed": 0, "whose": "x", "progress": Silent()}
    with pytest.raises(UserError, match="ruler_cwe needs the package wonderwords, which is not installed"):
        run_ruler(model, tokenizer, "ruler_cwe", **asked)
    with pytest.raises(UserError, match="needs the network"):
        run_ruler(model, tokenizer, "ruler_qa_hotpot", **asked)
