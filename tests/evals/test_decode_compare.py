"""The whole comparison on tiny models: figures by domain, loops left out, divergences, the gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.data import find
from compressor.drafts.draft_model import DraftModel
from compressor.drafts.repeat import RepeatLast
from compressor.errors import CheckpointError, UserError
from compressor.evals import decode_compare
from compressor.evals.decode import DecodeResult, decode
from compressor.evals.decode_compare import (
    check_lossless,
    compare_decoding,
    divergence,
    end_tokens,
    loops,
)
from compressor.evals.decode_spec import HELD_OUT_EVERY, SHIPPED_DOMAINS, DecodeSpec
from compressor.evals.decode_texts import prompts_of
from compressor.progress import Silent
from tests.evals.decode_models import prompts, small
from tests.tiny import BOS_ID, write_byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """Of bytes, with a chat template."""
    write_byte_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def texts(folder: Path) -> dict[str, Path]:
    """Two domains of three documents."""
    plain, chat = folder / "plain.jsonl", folder / "chat.jsonl"
    plain.write_text("\n".join(json.dumps({"text": f"{word} " * 9}) for word in ("one", "two", "three")))
    lines = [[{"role": "user", "content": f"{word} " * 9}] for word in ("four", "five", "six")]
    chat.write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    return {"prose": plain, "chat": chat}


def test_drafters_are_measured_by_domain_and_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A perfect drafter, a poor one and the control; all give plain decoding's text."""
    model = small(256)
    spec = DecodeSpec(
        texts(tmp_path), prompts=3, prompt_tokens=12, new_tokens=21, tokens=3, batches=(1, 3), runs=2
    )
    drafters = {
        "own": DraftModel(small(256)),
        "other": DraftModel(small(256, seed=1)),
        "repeat": RepeatLast(),
    }
    found = compare_decoding(model, tokenizer, drafters, spec, Silent())
    assert found.identical
    check_lossless(found)
    assert [(domain.domain, domain.batch) for domain in found.domains] == [
        ("prose", 1), ("chat", 1), ("prose", 3), ("chat", 3),
    ]  # fmt: skip
    for domain in found.domains:
        assert domain.prompts + domain.looping == 3
        own, other, repeat = domain.drafts
        assert own.acceptance.length == 4
        assert own.acceptance.rates == (1, 1, 1)
        assert own.tokens == domain.prompts * 21
        assert own.acceptance.drafts == domain.prompts * 5
        assert max(other.acceptance.length, repeat.acceptance.length) < 2
        assert min(figures.wall_s for figures in domain.drafts) > 0
        assert min(figures.speedup for figures in domain.drafts) > 0
        passes = 5 if domain.batch == 3 else 5 * domain.prompts
        assert own.passes == passes
    json.dumps(found.to_json())


def test_prompts_that_loop_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose plain continuation loops is not decoded again; where all do, nothing is measured."""
    model, domain = small(256), {"prose": texts(tmp_path)["prose"]}
    spec = DecodeSpec(domain, prompts=3, prompt_tokens=12, new_tokens=40, runs=1)
    asked: list[tuple[int, int]] = []

    def looping(which: set[int]) -> None:
        def decoded(
            target: object, drafter: object, given: list[torch.Tensor], *more: int, **how: int
        ) -> DecodeResult:
            found = decode(target, drafter, given, *more, **how)  # type: ignore[arg-type]
            asked.append((len(given), drafter is not None))
            ids = tuple(
                (7,) * 40 if len(given) == 3 and n in which else one for n, one in enumerate(found.ids)
            )
            return replace(found, ids=ids)

        monkeypatch.setattr(decode_compare, "decode", decoded)

    looping({1})
    assert loops((7,) * 40)
    assert not loops(tuple(range(40)))
    found = compare_decoding(model, tokenizer, {"repeat": RepeatLast()}, spec, Silent()).domains[0]
    assert (found.prompts, found.looping) == (2, 1)
    assert asked == [(3, False), (2, True), (2, False), (2, True)]
    looping({0, 1, 2})
    found = compare_decoding(model, tokenizer, {"repeat": RepeatLast()}, spec, Silent()).domains[0]
    assert (found.prompts, found.looping, found.drafts) == (0, 3, ())


def test_a_divergence_says_where_and_how_near(tmp_path: Path) -> None:
    """The gap of the two tokens' logits; a float32 result that has one is refused, a bfloat16 one is not."""
    model, ids_T = small(12), prompts(1, 6, 12)[0]
    usual = decode(model, None, [ids_T], 5).ids[0]
    wrong = (usual[0] + 1) % 12
    found = divergence(model, ids_T, usual, (*usual[:2], wrong if wrong != usual[2] else wrong + 1, 0, 0), 4)
    assert (found.prompt, found.at) == (4, 2)
    with torch.no_grad():
        logits_V = model(torch.cat([ids_T, torch.tensor(usual[:2])])[None]).logits[0, -1]
    other = wrong if wrong != usual[2] else wrong + 1
    assert found.gap == pytest.approx(float(logits_V.max() - logits_V[other]), rel=1e-4)
    assert found.gap > 0


def test_a_lossy_drafter_is_caught(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that keeps whatever is proposed: found, and refused in float32."""
    from compressor.evals import decode as loop

    def careless(logits: torch.Tensor, proposal, *_: object) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
        return torch.full((len(logits),), 3), logits[:, -1].argmax(-1)

    monkeypatch.setattr(loop, "verify", careless)
    spec = DecodeSpec({"prose": texts(tmp_path)["prose"]}, prompts=2, prompt_tokens=12, new_tokens=12, runs=1)
    found = compare_decoding(small(256), tokenizer, {"repeat": RepeatLast()}, spec, Silent())
    assert not found.identical
    with pytest.raises(
        CheckpointError,
        match="with repeat differs from plain decoding in float32: prose, prompt 1, new token 2",
    ):
        check_lossless(found)
    check_lossless(replace(found, dtype="bfloat16"))
    check_lossless(replace(found, rounded=True))


def test_bfloat16_is_measured_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Divergences are near ties."""
    model = small(256).to(torch.bfloat16)
    spec = DecodeSpec(texts(tmp_path), prompts=3, prompt_tokens=12, new_tokens=40, runs=1, batches=(3,))
    found = compare_decoding(model, tokenizer, {"own": DraftModel(small(256))}, spec, Silent())
    assert found.dtype == "bfloat16"
    gaps = [
        abs(one.gap) for domain in found.domains for part in domain.drafts for one in part.divergences or ()
    ]
    # bfloat16 has 8 bits: logits up to 8 are 1/32 apart, and a few such steps come together.
    assert all(gap <= 0.25 for gap in gaps)


def test_sampling_is_measured_without_comparing_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Own proposals always stay: p / q is 1."""
    model = small(256, spread=0.25)
    spec = DecodeSpec(
        texts(tmp_path), prompts=3, prompt_tokens=12, new_tokens=21, runs=1, temperature=1.0, batches=(3,)
    )
    found = compare_decoding(model, tokenizer, {"own": DraftModel(small(256, spread=0.25))}, spec, Silent())
    assert all(domain.drafts[0].divergences is None for domain in found.domains)
    # Probabilities from passes of other shapes differ in their last bits.
    assert all(domain.drafts[0].acceptance.length > 3.9 for domain in found.domains)


def test_prompts_are_beginnings_of_one_length(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """After a first token, or through the template; short documents are passed over; too few are refused."""
    paths = texts(tmp_path)
    plain = prompts_of(tokenizer, paths["prose"], 3, 10, first=BOS_ID)
    assert [ids_T[0].item() for ids_T in plain] == [BOS_ID] * 3
    assert tokenizer.decode(plain[1][1:]) == "two two t"
    chat = prompts_of(tokenizer, paths["chat"], 3, 14, first=BOS_ID)
    assert [tokenizer.decode(ids_T) for ids_T in chat] == [
        "user: four fou",
        "user: five fiv",
        "user: six six ",
    ]
    assert len(prompts_of(tokenizer, paths["prose"], 1, 50)) == 1
    with pytest.raises(UserError, match="1 stretches for measuring have 50 tokens, fewer than the 2"):
        prompts_of(tokenizer, paths["prose"], 2, 50)


@pytest.mark.parametrize("first", [None, BOS_ID])
def test_few_documents_give_several_stretches(
    first: int | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Beginnings come first; a further stretch begins four prompts on; conversations have one."""
    path = tmp_path / "two.jsonl"
    long, short = "".join(map(chr, range(33, 93))), "only so much"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, short)))
    found = [ids_T[first is not None :] for ids_T in prompts_of(tokenizer, path, 3, 8, first=first)]
    size = len(found[0])
    assert [tokenizer.decode(ids_T) for ids_T in found] == [long[:size], short[:size], long[32 : 32 + size]]
    talks = texts(tmp_path)["chat"]
    with pytest.raises(UserError, match="fewer than the 1000"):
        prompts_of(tokenizer, talks, 1000, 8)


def test_shipped_texts_have_as_many_as_recipes_ask_for(tokenizer: PreTrainedTokenizerBase) -> None:
    """The recipe smollm2-eagle3 measures on 16 prompts of each."""
    for name in SHIPPED_DOMAINS.values():
        assert len(prompts_of(tokenizer, find(name), 24, 64)) == 24


def test_shipped_texts_for_calibration_are_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every eighth document of chat and code; all of the text that is for measuring only."""
    for domain, name in SHIPPED_DOMAINS.items():
        lines = [json.loads(line) for line in find(name).read_text().splitlines()]
        begin = [
            line["text"]
            if "text" in line
            else tokenizer.apply_chat_template(line["messages"], tokenize=False)
            for line in lines
        ]
        wanted = begin if domain == "prose" else begin[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        found = [tokenizer.decode(ids_T) for ids_T in prompts_of(tokenizer, find(name), 4, 16)]
        assert [text[:8] for text in found] == [text[:8] for text in wanted[:4]]


def test_end_tokens_are_one_or_several() -> None:
    """As generation configs have them."""
    model = small()
    assert end_tokens(model) == frozenset()
    model.generation_config.eos_token_id = 3
    assert end_tokens(model) == {3}
    model.generation_config.eos_token_id = [3, 5]
    assert end_tokens(model) == {3, 5}
