"""Adapters beside the weights: what vLLM would refuse, or compute otherwise, is told in the plan."""

from __future__ import annotations

import dataclasses
import lzma
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.kv.spec import KvSpec
from compressor.planner.adapted import AdaptPlan
from compressor.planner.adapter_spec import fold_faults, found_documents, unmerged_faults
from compressor.planner.kv_job import KvStage
from compressor.recipe.adapters import AdaptersSection
from compressor.stages.adapt import AdaptSpec
from compressor.stages.kv import KvJob

SPEC = AdaptSpec((), 128, steps=1, sequences=1, merge=False)


@pytest.mark.parametrize(
    ("folded", "merge", "refused"), [((0,), False, True), ((0,), True, False), ((), False, False)]
)
def test_folds_are_not_for_adapters_beside(folded: tuple[int, ...], merge: bool, refused: bool) -> None:
    """Values that are rotated inside the weights are others than those that the adapter was trained on."""
    stage = KvStage(KvJob(KvSpec("turboquant_4bit_nc", "vllm"), (), folded, (), {}, None), None, None, ())
    assert bool(fold_faults(dataclasses.replace(SPEC, merge=merge), stage)) == refused
    assert not fold_faults(SPEC, None)


def test_layers_that_no_engine_adapts() -> None:
    """Projections under other names than vLLM's are merged or refused."""
    assert not unmerged_faults(["model.layers.0.self_attn.q_proj"], ())
    (fault,) = unmerged_faults(["model.layers.0.self_attn.kv_b_proj"], ())
    assert "adapters of kv_b_proj" in fault.what


def test_evaluation_texts_are_refused_packed_or_not(tmp_path: Path) -> None:
    """Any text that the result is measured on, whatever its file is called."""
    text = '{"text": "a long document"}\n'
    (tmp_path / "measured.jsonl").write_text(text)
    (tmp_path / "packed.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "other.jsonl").write_text(text * 2)
    section = AdaptersSection(documents=("other.jsonl", "packed.jsonl.xz"))
    faults: list[UserError] = []
    held_out = [tmp_path / "other.txt", tmp_path / "measured.jsonl"]
    held_out[0].write_text("another text")
    found = found_documents(section, tmp_path, held_out, faults)
    assert [document.name for document in found] == ["other.jsonl", "packed.jsonl.xz"]
    (fault,) = faults
    assert fault.where == "adapters.documents.1"
    assert "packed.jsonl.xz is an evaluation text" in fault.what


def test_norms_and_embeddings_are_merged() -> None:
    """vLLM refuses ``modules_to_save``."""
    with pytest.raises(ValueError, match=r"vLLM 0.32 refuses adapters with trained norms and embeddings"):
        AdaptersSection(merge=False)
    assert not AdaptersSection(merge=False, train=()).merge


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_ranks_are_rounded_up_to_what_is_served(rank: int, served: int) -> None:
    """``--max-lora-rank`` takes a few values only."""
    spec = dataclasses.replace(SPEC, rank=rank)
    assert AdaptPlan(spec, "cpu", 4, ("q_proj",), 1, 1, 1, 1.0, False).served_rank == served
