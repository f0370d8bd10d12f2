"""Perplexity, KL and agreement against a second, slow implementation; reading of texts."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError, UserError
from compressor.evals import text as text_module
from compressor.evals.head import plain_head
from compressor.evals.text import compare_on_text, tokens_from_text
from compressor.progress import Silent
from tests.tiny import tiny_llama


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two random models over the same 300 words."""
    root = tmp_path_factory.mktemp("pair")
    first, second = (tiny_llama(root / str(seed), vocab=300, seed=seed) for seed in (0, 1))
    return _load(first), _load(second)


def _capped_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two random Gemma 2 models, whose logits pass through a soft cap after the head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    models = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(Gemma2ForCausalLM(config).eval())
            with torch.no_grad():
                models[-1].model.embed_tokens.weight.mul_(20)
    return models[0], models[1]


def _slowly(
    models: tuple[PreTrainedModel, PreTrainedModel], ids: list[int], context: int
) -> tuple[list[list[float]], list[float], list[bool]]:
    """Losses of both models, KL and agreement by position, one token and one window at a time in float64."""
    losses: list[list[float]] = [[], []]
    kl, agree = [], []
    for start in range(0, len(ids), context):
        window = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            source, result = (model(window).logits[0].double().softmax(-1) for model in models)
        for position in range(window.shape[1] - 1):
            target = window[0, position + 1]
            losses[0].append(-float(source[position, target].log()))
            losses[1].append(-float(result[position, target].log()))
            terms = source[position] * (source[position] / result[position]).log()
            kl.append(float(terms.sum()))
            agree.append(bool(source[position].argmax() == result[position].argmax()))
    return losses, kl, agree


@pytest.mark.parametrize("family", ["llama", "capped"])
def test_figures_match_a_slow_computation(
    family: str, pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked logits, windows and the short last window give what whole windows in float64 give."""
    models = pair if family == "llama" else _capped_pair()
    ids_T = torch.randint(300, (50,), generator=torch.Generator().manual_seed(3))
    assert plain_head(models[0], ids_T) is (family == "llama")
    # Three positions at a time.
    monkeypatch.setattr(text_module, "LOGIT_BYTES", 3 * 5 * 4 * 300)
    found = compare_on_text(*models, ids_T, context=16, progress=Silent())
    losses, kl, agree = _slowly(models, ids_T.tolist(), 16)
    means = [sum(values) / len(values) for values in losses]
    assert (found.tokens, found.scored_tokens, found.windows, found.context) == (50, 46, 4, 16)
    assert found.perplexity_source == pytest.approx(exp(means[0]), rel=1e-5)
    assert found.perplexity_result == pytest.approx(exp(means[1]), rel=1e-5)
    assert found.increase == pytest.approx(exp(means[1] - means[0]) - 1, rel=1e-4)
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.kl_p999 == pytest.approx(max(kl), rel=1e-4)
    assert found.top1_agreement == sum(agree) / len(agree)
    assert found.increase_ci95 is not None
    assert found.increase_ci95[0] < found.increase < found.increase_ci95[1]


def test_a_model_against_itself_loses_nothing(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """No increase, no divergence, full agreement, an interval of width zero."""
    ids_T = torch.arange(64)
    found = compare_on_text(pair[0], pair[0], ids_T, context=16, progress=Silent())
    assert (found.increase, found.kl_mean, found.kl_p999, found.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert found.increase_ci95 == (0.0, 0.0)


def test_a_leading_token_is_read_but_not_scored(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """With ``<bos>`` before each window every token of the text is scored, after it."""
    ids_T = torch.arange(1, 31)
    found = compare_on_text(*pair, ids_T, context=16, progress=Silent(), first=0)
    by_hand = torch.cat([torch.cat([torch.tensor([0]), part]) for part in ids_T.split(15)])
    same = compare_on_text(*pair, by_hand, context=16, progress=Silent())
    assert found == replace(same, tokens=30)
    assert (found.scored_tokens, found.windows) == (30, 2)


def test_one_window_has_no_interval(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Nothing can be resampled, and a last window of one token scores nothing."""
    found = compare_on_text(*pair, torch.arange(17), context=16, progress=Silent())
    assert found.increase_ci95 is None
    assert (found.windows, found.tokens, found.scored_tokens) == (1, 16, 15)


def test_broken_and_unlike_models_are_refused(tmp_path: Path) -> None:
    """NaN weights name the model; another vocabulary and too long windows are the user's faults."""
    good = _load(tiny_llama(tmp_path / "good"))
    broken = _load(tiny_llama(tmp_path / "broken"))
    other = _load(tiny_llama(tmp_path / "other", vocab=300))
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    ids_T = torch.arange(40)
    with pytest.raises(CheckpointError, match=r"the result's logits are NaN or infinite in window 1"):
        compare_on_text(good, broken, ids_T, context=16, progress=Silent())
    with pytest.raises(CheckpointError, match="256 tokens in its vocabulary and the result 300"):
        compare_on_text(good, other, ids_T, context=16, progress=Silent())
    with pytest.raises(UserError, match="1024 tokens is longer than the model's 512"):
        compare_on_text(good, good, ids_T, context=1024, progress=Silent())
    with pytest.raises(UserError, match="scores nothing"):
        compare_on_text(good, good, ids_T, context=1, progress=Silent())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The byte tokenizer: ids are the bytes of the text."""
    return AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("t") / "m"))


def test_texts_become_tokens(tokenizer: object, tmp_path: Path) -> None:
    """Plain text as it is, JSON lines joined by blank lines; a start only, or all; no special tokens."""
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text("Grüße " * 10_000, encoding="utf-8")
    whole = list(plain.read_bytes())
    assert tokens_from_text(tokenizer, plain, 500).tolist() == whole[:500]
    assert tokens_from_text(tokenizer, plain, None).tolist() == whole
    documents = [{"id": 1, "text": "one\u2028line"}, {"id": 2, "text": "two"}]
    lines.write_text("\n".join(json.dumps(document, ensure_ascii=False) for document in documents) + "\n")
    assert bytes(tokens_from_text(tokenizer, lines, None).tolist()).decode() == "one\u2028line\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 " * 100, r"a\.txt: not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.txt", b" \n", r"a\.txt: the text is empty"),
        ("a.txt", b"short", r"a\.txt: the text has 5 tokens, fewer than the 100 asked for"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl:2: no field `text` with a string"),
        ("a.jsonl", b'{"text": "a"}\n\n[1', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"a\.jsonl:1: no field `text` with a string"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: no field `text` with a string"),
    ],
)
def test_unusable_texts_are_told_apart(
    name: str, content: bytes, message: str, tokenizer: object, tmp_path: Path
) -> None:
    """Each fault has its own message, with the byte or the line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokens_from_text(tokenizer, tmp_path / name, 100)


def test_a_folder_is_no_text(tokenizer: object, tmp_path: Path) -> None:
    """What cannot be opened is said with the system's reason."""
    with pytest.raises(UserError, match="the text cannot be read: Is a directory"):
        tokens_from_text(tokenizer, tmp_path, 100)


def test_forward_passes_are_quiet(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers has to say of slow kernels is no line of ours, in a run and in a verification."""
    from transformers.utils import logging

    from compressor.model import load
    from compressor.stages.evaluate import reload
    from compressor.verify.reference import greedy_tokens, prompt_logprobs

    loaded = load.LoadedCheckpoint(pair[0], "transformers", None)
    monkeypatch.setattr(load, "load_checkpoint_model", lambda *_, **__: loaded)
    source = open_source(pair[0].name_or_path)
    levels: list[int] = []
    hook = pair[0].register_forward_pre_hook(lambda *_: levels.append(logging.get_verbosity()))
    before = logging.get_verbosity()
    try:
        for work in (
            lambda: compare_on_text(*pair, torch.arange(20), context=8, progress=Silent()),
            lambda: prompt_logprobs(pair[0], [[1, 2, 3]]),
            lambda: greedy_tokens(pair[0], [[1, 2, 3]], 2),
            lambda: reload(Path("anywhere"), source),
        ):
            levels.clear()
            work()
            assert set(levels) == {logging.ERROR}
            assert logging.get_verbosity() == before != logging.ERROR
    finally:
        hook.remove()
