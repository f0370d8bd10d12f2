"""Reading on after tokens were unread, against passes over the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import CheckpointError
from compressor.model.reader import Reader, check_unreading
from tests.evals.decode_models import family, small

# Of logits up to about 30, summed in another order; routers may be near a tie.
CLOSE = {"rtol": 1e-3, "atol": 1e-2}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bloom"])
@pytest.mark.parametrize("parts", [(4,), (1, 1, 2), (2, 1, 1)])
def test_rows_forget_what_they_like(name: str, parts: tuple[int, ...], tmp_path: Path) -> None:
    """Over several rounds of one or several reads, past windows of 8 tokens; rows leave and change places."""
    model = family(name, tmp_path)
    generator = torch.Generator().manual_seed(2)
    reader, texts = Reader(model), [[], [], []]  # type: ignore[var-annotated]

    def read(count: int) -> None:
        ids_BT = torch.randint(250, (len(texts), count), generator=generator)
        found = reader.read(ids_BT).logits_BTV
        for row, (text, ids) in enumerate(zip(texts, ids_BT.tolist(), strict=True)):
            text += ids
            whole = model(torch.tensor([text]), use_cache=False).logits[0, -count:]
            torch.testing.assert_close(found[row], whole.float(), **CLOSE)

    read(5)
    forgotten = [(0, 1, 4), (4, 0, 2), (3, 3, 3), (0, 0, 0), (1, 4, 0), (4, 4, 4), (2, 0, 1)]
    for number, counts in enumerate(forgotten):
        reader.mark()
        for count in parts:
            read(count)
        reader.unread(torch.tensor(counts[: len(texts)]))
        texts[:] = [text[: len(text) - count] for text, count in zip(texts, counts, strict=False)]
        assert reader.lengths_B.tolist() == [len(text) for text in texts]
        if number == 4:
            reader.select(torch.tensor([2, 0]))
            texts[:] = [texts[2], texts[0]]
    read(2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "nemotron_h", "deepseek_v4"])
@pytest.mark.parametrize("parts", [(4,), (1, 2, 1)])
def test_states_are_as_if_nothing_had_been_read(name: str, parts: tuple[int, ...], tmp_path: Path) -> None:
    """One row: all, some and none of what was read since the mark is forgotten."""
    model = family(name, tmp_path)
    generator = torch.Generator().manual_seed(2)
    reader, text = Reader(model), []  # type: ignore[var-annotated]
    for forgotten in (0, 3, 4, 1, 0, 2):
        reader.mark() if text else None
        for count in parts:
            ids_1T = torch.randint(250, (1, count), generator=generator)
            found = reader.read(ids_1T).logits_BTV[0]
            text += ids_1T[0].tolist()
            torch.testing.assert_close(
                found, model(torch.tensor([text]), use_cache=False).logits[0, -count:], **CLOSE
            )
        if len(text) > 4:
            reader.unread(torch.tensor([forgotten]))
            text = text[: len(text) - forgotten]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama4", "qwen3_next", "qwen3_5", "deepseek_v3", "glm4_moe"])
def test_the_last_hidden_state_enters_the_head(name: str, tmp_path: Path) -> None:
    """In the families that have heads: behind the last norm, from a prompt and from tokens that follow."""
    model = family(name, tmp_path)
    ids_1T = torch.randint(250, (1, 12), generator=torch.Generator().manual_seed(2))
    # Llama 4 for text names itself its decoder.
    decoder = model.model if model.get_decoder() is model else model.get_decoder()
    wanted_1TD = decoder(ids_1T, use_cache=False)[0]
    reader = Reader(model, (-1, 1))
    parts = [reader.read(part_1T) for part_1T in ids_1T.split([8, 4], dim=1)]
    found_1TD = torch.cat([part.hidden[-1] for part in parts], dim=1)
    torch.testing.assert_close(found_1TD, wanted_1TD, **CLOSE)
    logits_1TV = torch.cat([part.logits_BTV for part in parts], dim=1)
    torch.testing.assert_close(model.get_output_embeddings()(found_1TD), logits_1TV, **CLOSE)
    assert not torch.allclose(parts[1].hidden[1], parts[1].hidden[-1], rtol=0.1)


@torch.no_grad()
def test_slots_that_no_row_needs_are_dropped() -> None:
    """The longest row has no empty slot before it: batches stay as wide as their longest text."""
    model = small()
    reader = Reader(model)
    reader.read(torch.zeros(2, 3, dtype=torch.long))
    for _ in range(5):
        for counts in ([0, 4], [4, 0]):
            reader.mark()
            reader.read(torch.zeros(2, 4, dtype=torch.long))
            reader.unread(torch.tensor(counts))
    assert reader.lengths_B.tolist() == [23, 23]
    assert reader._cache.get_seq_length() == 23


@pytest.mark.parametrize(
    ("name", "rows", "why"),
    [
        ("jamba", 1, "does not give back"),
        ("mamba", 1, "does not give back"),
        ("qwen3_next", 2, "measure at batch 1"),
        ("deepseek_v4", 2, "measure at batch 1"),
    ],
)
def test_models_that_cannot_are_refused(name: str, rows: int, why: str, tmp_path: Path) -> None:
    """With the reason; the others pass (those of tests/evals/test_decode.py)."""
    model = family(name, tmp_path)
    with pytest.raises(CheckpointError, match=why):
        check_unreading(model, rows)
    with pytest.raises(CheckpointError, match=why):
        check_unreading(model.to(torch.bfloat16), rows)


def test_coarse_inputs_are_no_lost_state(tmp_path: Path) -> None:
    """Inputs of four bits fall otherwise in every pass; what moves plain decoding as much is let pass."""
    model = family("llama_tied", tmp_path).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def coarse(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        noise = torch.randn(inputs[0].shape, generator=generator)
        return ((inputs[0] * (1 + 0.03 * noise)).to(inputs[0].dtype),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(coarse)
    check_unreading(model, 3)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "llama4", "deepseek_v3", "glm4_moe"])
def test_models_that_can_pass(name: str, tmp_path: Path) -> None:
    """Alone and in batches, in 16 bit too."""
    model = family(name, tmp_path)
    check_unreading(model, 1)
    check_unreading(model, 4)
    if name == "llama_tied":
        check_unreading(model.to(torch.bfloat16), 3)


def test_hidden_states_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets one token too few is found out."""
    model = small()
    crop = Reader._crop

    def lazy(self: Reader, count: int, before: dict[int, object]) -> None:
        crop(self, max(count - 1, 0), before)
        self._slots += count > 0
        self._lengths_B = self._lengths_B + (count > 0)

    monkeypatch.setattr(Reader, "_crop", lazy)
    with pytest.raises(CheckpointError):
        check_unreading(model, 1)
