"""Which document each token is of, and figures by document, domain and window."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.evals.text import compare_on_text, read_labelled, read_passage
from compressor.evals.units import ENOUGH_DOCUMENTS, Unit, Units
from compressor.progress import Silent
from tests.tiny import tiny_llama

Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two random models over bytes."""
    root = tmp_path_factory.mktemp("units")
    folders = [tiny_llama(root / str(seed), seed=seed) for seed in (0, 1)]
    first, second = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders)
    return first, second


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> PreTrainedTokenizerBase:
    """Its ids are the bytes of the text."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(pair[0].name_or_path)
    return found


def _write(folder: Path, *documents: dict[str, object]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def test_domains_come_from_the_field_the_id_or_the_file(tmp_path: Path) -> None:
    """In this order; an id without a slash says nothing of a domain, and a plain text is its file's."""
    path = _write(
        tmp_path,
        {"id": "sotu/1999.txt", "text": "a"},
        {"id": "sotu/2000.txt", "domain": "speech", "text": "b"},
        {"id": "plain", "text": "c"},
        {"text": "d", "domain": 3},
    )
    assert list(read_labelled(path)) == [
        ("sotu/1999.txt", "a", "sotu"),
        ("sotu/2000.txt", "b", "speech"),
        ("plain", "c", "text.jsonl"),
        ("line 4", "d", "text.jsonl"),
    ]
    plain = tmp_path / "plain.txt"
    plain.write_text("words")
    assert list(read_labelled(plain)) == [("plain.txt", "words", "plain.txt")]


def test_each_token_is_of_the_document_that_it_begins_in(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Bytes of letters of two bytes too; the blank line between two documents is of the first."""
    documents = ({"id": "a/1", "text": "äöü"}, {"id": "b/2", "text": "xyz"}, {"text": "never read"})
    path = _write(tmp_path, *documents)
    passage = read_passage(tokenizer, path, 9)
    assert bytes(passage.ids_T.tolist()).decode() == "äöü\n\nx"
    assert passage.document_T is not None
    assert passage.document_T.tolist() == [0] * 8 + [1]
    assert (passage.names, passage.domains) == (("a/1", "b/2"), ("a", "b"))
    assert read_passage(tokenizer, path, None).names == ("a/1", "b/2", "line 3")


def test_figures_by_document_are_those_of_its_own_tokens(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Summed one token at a time by hand; windows cut documents, and their first tokens are not scored."""
    lengths = (40, 25, 60, 31)
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(n)) for i, n in enumerate(lengths, 3)]
    path = _write(tmp_path, *({"id": f"{'ab'[i % 2]}/{i}", "text": text} for i, text in enumerate(texts)))
    passage = read_passage(tokenizer, path, None)
    for first in (None, 254):
        found = compare_on_text(
            *pair, passage.ids_T, context=32, progress=Silent(), first=first, passage=passage
        )
        assert found.units is not None
        expected = [[0.0, 0.0, 0] for _ in texts]
        own = 32 - (first is not None)
        ids = passage.ids_T.tolist()
        assert passage.document_T is not None
        for start in range(0, len(ids), own):
            ahead = [] if first is None else [first]
            window = torch.tensor([ahead + ids[start : start + own]])
            with torch.no_grad():
                logprobs = [model(window).logits[0].log_softmax(-1) for model in pair]
            for place in range(1, window.shape[1]):
                number = passage.document_T[start + place - len(ahead)]
                for whose in (0, 1):
                    expected[number][whose] -= float(logprobs[whose][place - 1, window[0, place]])
                expected[number][2] += 1
        for unit, (source, result, scored) in zip(found.units.documents, expected, strict=True):
            assert (unit.nll_source, unit.nll_result) == pytest.approx((source, result), rel=1e-5)
            assert unit.scored == scored
        assert sum(unit.kl for unit in found.units.documents) == pytest.approx(
            found.kl_mean * found.scored_tokens, rel=1e-5
        )
        domains = {domain["name"]: domain for domain in found.to_json()["domains"]}
        scored = [unit.scored for unit in found.units.documents]
        source = (expected[0][0] + expected[2][0]) / (scored[0] + scored[2])
        assert domains["a"]["perplexity_source"] == pytest.approx(exp(source), rel=1e-5)
        assert (list(domains), domains["b"]["documents"]) == (["a", "b"], 2)


def test_intervals_are_drawn_over_documents_where_there_are_enough(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Else over windows, of which a text always has its number; and the record says which."""
    for count, kind in ((ENOUGH_DOCUMENTS - 1, "windows"), (ENOUGH_DOCUMENTS, "documents")):
        texts = [{"id": f"d/{i}", "text": f"{i} apples and pears"} for i in range(count)]
        passage = read_passage(tokenizer, _write(tmp_path, *texts), None)
        found = compare_on_text(*pair, passage.ids_T, context=25, progress=Silent(), passage=passage)
        assert found.units is not None
        assert found.units.kind == found.to_json()["interval_unit"] == kind
        assert len(found.units.units) == (count if kind == "documents" else found.windows)
        assert found.kl_ci95 is not None
        assert 0 < found.kl_ci95[0] < found.kl_mean < found.kl_ci95[1]


def test_a_divergence_is_never_negative() -> None:
    """Nor is the low end of its interval, however few and unlike the units are."""
    units = tuple(Unit(10, 1.0, 1.0, kl) for kl in (0.0, 0.0, 0.0, 0.0, 0.0, 9.0))
    found = Units("windows", units, ()).kl_interval(0.95, 0)
    assert found is None or found[0] == 0.0
