"""The search on a tiny model, and what it decides where scores are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from compressor.checkpoint.base import Source
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.sources import open_source
from compressor.errors import UserError
from compressor.model.load import load_source_model
from compressor.progress import Silent
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.search import SearchSpace
from compressor.rope.search_spec import SearchSpec
from compressor.rope.spec import ContextSpec
from compressor.stages.context_scores import Score, ScoredText, Scorer
from compressor.stages.context_search import RECORD_NAME, Found, bootstrap, search_factors, yarn_context
from compressor.stages.context_texts import search_texts
from compressor.stages.tokens import source_tokenizer
from tests.tiny import tiny_model, tokens_of_bytes

LENGTH = 64
ASKED = ContextSpec("longrope", 4 * LENGTH)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model of 64 tokens whose heads turn 8 pairs."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        **tokens_of_bytes() | {"max_position_embeddings": LENGTH},
    )
    folder = tmp_path_factory.mktemp("source") / "model"
    return open_source(str(tiny_model(folder, LlamaForCausalLM, config, torch.float32)))


@pytest.fixture
def spec(tmp_path: Path) -> SearchSpec:
    """Two documents to search on and three others, each of its own words."""
    return SearchSpec(
        write_documents(tmp_path / "long.jsonl", [300, 280, 270, 260, 500]),
        "sha",
        population=6,
        generations=2,
        search_documents=2,
        accept_documents=3,
    )


def write_documents(path: Path, lengths: Sequence[int]) -> Path:
    """A file with a document of so many characters, which are tokens here, a line."""
    texts = [f"word{number} and {number * 7} or " * length for number, length in enumerate(lengths)]
    lines = (json.dumps({"text": text[:length]}) for text, length in zip(texts, lengths, strict=True))
    path.write_text("\n".join(lines))
    return path


class Stopping(Silent):
    """Ends the process, as a kill would, after so many candidates."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, amount: int, note: str = "") -> None:
        """Counts."""
        self.left -= amount
        if not self.left:
            raise KeyboardInterrupt


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        """Keeps it."""
        self.warnings.append(text)

    def advance(self, amount: int, note: str = "") -> None:
        """Keeps the note."""
        self.notes.append(note)


def search(source: Source, spec: SearchSpec, folder: Path, progress: Any = None) -> Found:
    """The search in a folder."""
    folder.mkdir(exist_ok=True)
    return search_factors(source, ASKED, spec, folder, progress or Silent())


def texts_of(source: Source, spec: SearchSpec, folder: Path) -> list[ScoredText]:
    """The texts of a search: those that candidates are scored on come first."""
    texts: list[ScoredText] = []

    def score(self: Scorer, config: Mapping[str, Any], given: Sequence[ScoredText]) -> Score:
        texts.extend(given)
        return Score((1.0,), (1.0,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", score)
        search(source, spec, folder)
    return texts


@pytest.mark.parametrize("objective", ["perplexity", "needle"])
def test_scores_are_those_of_models_built_so(
    tmp_path: Path, source: Source, spec: SearchSpec, objective: Any
) -> None:
    """The best of the search, computed again token by token on a model that is built with its factors."""
    spec = replace(spec, objective=objective, needles=2, short_slack=100.0, accept_documents=1)
    found = search(source, spec, tmp_path / "work")
    assert found.facts["tried"] > 6
    best = found.facts["best"]
    context = replace(ASKED, factors=tuple(best["factors"]), attention_factor=best["attention_factor"])
    scaled = scaled_config(source.config, context)
    model = load_source_model(ReconfiguredSource(source, scaled.config, scaled.length), torch.float32)
    texts = texts_of(source, spec, tmp_path / "texts")
    long_N, short_N = [], []
    for text in texts[:2]:
        assert len(text.ids_T) == 4 * LENGTH
        with torch.inference_mode():
            nll_T = -model(text.ids_T[None]).logits[0].log_softmax(-1)[torch.arange(255), text.ids_T[1:]]
            long_N.append(float(nll_T[[int(index) - 1 for index in text.long_A]].mean()))
            first = text.short[0]
            assert len(first) == LENGTH
            parts = [
                -model(part[None]).logits[0].log_softmax(-1)[torch.arange(63), part[1:]]
                for part in text.short
            ]
            short_N.append(float(torch.cat(parts).mean()))
    assert best["long"] == pytest.approx(sum(long_N) / 2, rel=1e-5)
    assert best["short"] == pytest.approx(sum(short_N) / 2, rel=1e-5)
    if objective == "perplexity":
        assert [int(index) for index in texts[0].long_A] == list(range(LENGTH, 4 * LENGTH))
    else:
        assert 10 <= len(texts[0].long_A) <= 12  # two numbers of five digits, and the spaces


def test_a_killed_search_goes_on_to_the_same_bits(tmp_path: Path, source: Source, spec: SearchSpec) -> None:
    """Scores known before the kill are not computed again, and everything is as without it."""
    whole = search(source, spec, tmp_path / "whole")
    computed: list[int] = []
    score = Scorer.score

    def counted(self: Scorer, config: Mapping[str, Any], texts: Sequence[ScoredText]) -> Score:
        computed.append(len(texts))
        return score(self, config, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", counted)
        for after in (3, 9):
            with pytest.raises(KeyboardInterrupt):
                search(source, spec, tmp_path / "killed", Stopping(after))
        assert len(computed) == 1 + 9
        resumed = search(source, spec, tmp_path / "killed")
        total = len(computed)
        again = search(source, spec, tmp_path / "killed")
        assert len(computed) == total
    assert resumed == again == whole
    records = [(tmp_path / name / RECORD_NAME).read_bytes() for name in ("whole", "killed")]
    assert records[0] == records[1]
    # Each candidate once, YaRN among them, and both on the documents that decide.
    assert total == whole.facts["tried"] + (2 if whole.facts["held_out"] else 0)


def test_another_seed_file_or_model_is_searched_anew(
    tmp_path: Path, source: Source, spec: SearchSpec
) -> None:
    """A record is gone on with for the same question only; a damaged one is none."""
    first = search(source, spec, tmp_path)
    record = tmp_path / RECORD_NAME
    key = json.loads(record.read_text())["key"]
    others = [replace(spec, seed=1), replace(spec, documents_sha256="other"), replace(spec, tokens=200)]
    for other in others:
        search(source, other, tmp_path)
        changed = json.loads(record.read_text())["key"]
        assert changed != key
        key = changed
    record.write_text('{"key": ')
    assert search(source, spec, tmp_path) == first


def known_scores(patch: pytest.MonkeyPatch, accept: Mapping[str, tuple[float, float]]) -> None:
    """Candidates of steady factors score well; on the documents that decide, as ``accept`` says."""

    def score(self: Scorer, config: Mapping[str, Any], texts: Sequence[ScoredText]) -> Score:
        rope = read_positions(config).parameters
        if len(texts) == 3:
            long, short = accept[str(rope["rope_type"])]
            return Score((long, long + 0.01, long - 0.01), (short,) * 3)
        if rope["rope_type"] == "yarn":
            return Score((3.0, 3.0), (2.0, 2.0))
        apart = sum(abs(log(factor / 2)) for factor in rope["long_factor"]) / 40
        return Score((2.8 + apart, 2.8 + apart), (1.99, 1.99))

    patch.setattr(Scorer, "score", score)


@pytest.mark.parametrize(
    ("long", "short", "accepted"),
    [(2.9, 2.0, True), (2.9, 2.0015, True), (2.9, 2.01, False), (3.0, 1.9, False), (3.1, 2.0, False)],
)
def test_it_is_accepted_where_it_beats_yarn_elsewhere(
    tmp_path: Path,
    source: Source,
    spec: SearchSpec,
    monkeypatch: pytest.MonkeyPatch,
    long: float,
    short: float,
    accepted: bool,
) -> None:
    """Lower past the original length on other documents, no more within it; else YaRN, and by how much."""
    known_scores(monkeypatch, {"yarn": (3.0, 2.0), "longrope": (long, short)})
    found = search(source, spec, tmp_path)
    assert found.accepted is accepted
    compared = found.facts["held_out"]
    assert compared["difference"] == pytest.approx(long - 3.0)
    assert compared["short_difference"] == pytest.approx(short - 2.0)
    assert f"{long - 3.0:+.4f} nats" in found.reason
    if accepted:
        assert found.reason.startswith("the factors found are used")
        assert found.context.factors == tuple(found.facts["best"]["factors"])
        assert scaled_config(source.config, found.context).length == 4 * LENGTH
    else:
        assert found.context == ContextSpec("yarn", 4 * LENGTH)
        assert found.reason.startswith("YaRN is used")
    bests = [one["long"] for one in found.facts["generations"]]
    assert len(bests) == 1 + spec.generations
    assert bests == sorted(bests, reverse=True)


def test_short_texts_rule_candidates_out(
    tmp_path: Path, source: Source, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all cost them more, nothing is compared."""

    def score(self: Scorer, config: Mapping[str, Any], texts: Sequence[ScoredText]) -> Score:
        searched = read_positions(config).rope_type == "longrope"
        return Score((2.0 if searched else 3.0,) * 2, (2.1 if searched else 2.0,) * 2)

    monkeypatch.setattr(Scorer, "score", score)
    progress = Heard()
    found = search(source, spec, tmp_path, progress)
    assert (found.accepted, found.facts["best"], found.facts["held_out"]) == (False, None, None)
    assert "costs short texts more" in found.reason
    assert progress.notes[-1].startswith("generation 2 of 2: best ")
    assert progress.notes[-1].endswith("YaRN 3.0000")


def test_families_that_read_no_yarn_get_it_as_factors(tmp_path: Path) -> None:
    """Phi 3: the same frequencies and multiplier, written as longrope."""
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        original_max_position_embeddings=LENGTH,
        **tokens_of_bytes() | {"max_position_embeddings": LENGTH},
    )
    phi = open_source(str(tiny_model(tmp_path / "phi", Phi3ForCausalLM, config, torch.float32)))
    space = SearchSpace.of(phi.config, ASKED)
    found = yarn_context(phi, ASKED, space)
    assert (found.method, found.factors) == ("longrope", space.yarn)
    assert found.attention_factor == pytest.approx(0.1 * log(4) + 1)


def test_documents_that_are_too_short(tmp_path: Path, source: Source, spec: SearchSpec) -> None:
    """Shorter than the target: said; hardly longer than the original length: refused."""
    progress = Heard()
    some = write_documents(tmp_path / "some.jsonl", [300, 200, 180, 290, 300, 30])
    found = search(source, replace(spec, documents=some, generations=0), tmp_path / "some", progress)
    (warning,) = progress.warnings
    assert "2 of 5 documents of some.jsonl are shorter than 256 tokens (the shortest is 180)" in warning
    held_out = found.facts["held_out"]
    assert held_out is None or sorted(held_out["tokens"]) == [180, 200, 256]
    few = write_documents(tmp_path / "few.jsonl", [300, 300, 300, 300, 120])
    with pytest.raises(UserError, match="longer than 128 tokens; 5 are asked for"):
        search(source, replace(spec, documents=few), tmp_path / "few")
    # The file that decides may be another.
    search(source, replace(spec, documents=few, held_out=some, held_out_sha256="b"), tmp_path / "two")


@pytest.mark.parametrize("apart", [False, True])
def test_no_document_is_searched_and_accepted_on(
    tmp_path: Path, source: Source, spec: SearchSpec, apart: bool
) -> None:
    """Whether it is twice in one file, or in both."""
    lines = spec.documents.read_text().splitlines()
    twice = tmp_path / "twice.jsonl"
    twice.write_text("\n".join([*lines, *lines]))
    asked = replace(spec, held_out=twice) if apart else replace(spec, documents=twice)
    (tmp_path / "work").mkdir()
    found = search_texts(
        source_tokenizer(source, tmp_path / "work"),
        asked,
        original_length=LENGTH,
        target_length=4 * LENGTH,
        progress=Silent(),
    )
    texts = {tuple(ids_T.tolist()) for ids_T in (*found.search, *found.accept)}
    assert len(texts) == len(found.search) + len(found.accept) == 5


def test_the_bootstrap_holds_the_mean() -> None:
    """Wider where documents differ more; none for one document."""
    assert bootstrap([0.5], 0) is None
    assert bootstrap([0.5, 0.5], 0) == [0.5, 0.5]
    values = [-0.1, 0.0, 0.1, 0.2, 0.3, 0.1, 0.0, 0.2]
    interval = bootstrap(values, 0)
    assert interval is not None
    low, high = interval
    # Mean and standard error of these: 0.1 and 0.045.
    assert low == pytest.approx(0.1 - 1.96 * 0.045, abs=0.02)
    assert high == pytest.approx(0.1 + 1.96 * 0.045, abs=0.02)


def test_no_mask_of_all_pairs_is_made(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is causal by itself: at 131,072 tokens a mask would take 16 GiB."""
    from torch.nn import functional

    masks: list[object] = []
    attend: Any = functional.scaled_dot_product_attention

    def heard(*tensors: torch.Tensor, **how: Any) -> torch.Tensor:
        masks.append((how["attn_mask"], how["is_causal"]))
        attended: torch.Tensor = attend(*tensors, **how)
        return attended

    monkeypatch.setattr(functional, "scaled_dot_product_attention", heard)
    text = ScoredText(torch.arange(200) % 250, torch.arange(LENGTH, 200), (torch.arange(LENGTH),))
    yarn = scaled_config(source.config, ContextSpec("yarn", 4 * LENGTH))
    Scorer(source, Silent()).score(yarn.config, [text])
    assert masks
    assert set(masks) == {(None, True)}
