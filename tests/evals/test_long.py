"""The whole of a long evaluation: what it measures, what it keeps, how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import UserError
from compressor.evals import long, long_needle, long_text
from compressor.evals.head import logits_at
from compressor.evals.long import check_long, evaluate_long
from compressor.evals.long_needle import find, hide
from compressor.evals.long_record import FoundCell
from compressor.evals.long_spec import LongNeedles, LongRuler, LongSpec
from compressor.evals.long_text import Sliding, long_documents, measure
from compressor.evals.ruler import run_ruler
from compressor.progress import Silent
from tests.tiny import tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS, TRAINED, STRIDE = 400, 128, 32


class Killed(BaseException):
    """No code of ours catches it."""


class Dying(Silent):
    """Progress that ends the process at its step number ``at``."""

    def __init__(self, at: int) -> None:
        self.left = at

    def advance(self, amount: int, note: str = "") -> None:
        """Counts down."""
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny Llamas, which need not be related."""
    root = tmp_path_factory.mktemp("models")
    return (
        tiny_llama(root / "source", dtype=torch.float32),
        tiny_llama(root / "result", dtype=torch.float32, seed=1),
    )


@pytest.fixture
def models(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """In float32, also where the CPU multiplies bfloat16 fast."""
    monkeypatch.setattr(long, "fast_dtype", lambda _: torch.float32)
    source, result = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders
    )
    return source, result


@pytest.fixture(scope="module")
def tokenizer(folders: tuple[Path, Path]) -> PreTrainedTokenizerBase:
    """Of bytes."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folders[0])
    return loaded


@pytest.fixture
def spec(tmp_path: Path) -> LongSpec:
    """Two documents, two lengths, a task."""
    path = tmp_path / "long.jsonl"
    texts = ["Of many words a text is made. " * 20, "short", "Another one says something else. " * 20]
    path.write_text("\n".join(json.dumps({"id": f"d{n}", "text": text}) for n, text in enumerate(texts)))
    return LongSpec(
        documents=path,
        documents_label="long.jsonl",
        count=2,
        tokens=TOKENS,
        trained=TRAINED,
        stride=STRIDE,
        needles=LongNeedles(("needle", "passkey"), (300, 350), (0.0, 1.0), 2),
        ruler=LongRuler(("ruler_fwe",), (800,), 1),
        seed=2,
    )


def test_it_is_what_its_parts_measure(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, spec: LongSpec
) -> None:
    """Source, sliding source and result on the same documents; both on the same needles and samples."""
    check_long(tokenizer, spec)
    found = evaluate_long(*models, tokenizer, spec, Silent())
    documents = long_documents(tokenizer, spec.documents, documents=2, tokens=TOKENS, first=None)
    assert found.text is not None
    assert found.text.names == documents.names == ("d0", "d2")
    assert [bucket.start for bucket in found.text.buckets] == [0, 16, 64, 128, 256]
    assert (found.text.reference, found.text.window, found.text.stride) == ("sliding", TRAINED, STRIDE)
    for name, model, sliding in (
        ("source", models[0], None),
        ("sliding", models[0], Sliding(TRAINED, STRIDE)),
        ("result", models[1], None),
    ):
        nll_NP = measure(model, documents, sliding=sliding, progress=Silent())
        assert found.text.buckets[-1].nll[name] == pytest.approx(float(nll_NP[:, 255:].double().mean()))
    in_window = found.text.buckets[1]
    # The first window is the document's beginning: another kernel may take another order of sums.
    assert in_window.change["source"].mean == pytest.approx(0, abs=1e-5)
    wanted: list[FoundCell] = []
    for kind in ("passkey", "needle"):
        for tokens in (300, 350):
            needles = hide(
                tokenizer,
                "passkey" if kind == "passkey" else "needle",
                documents.ids_NT[0],
                tokens=tokens,
                depths=(0.0, 1.0),
                trials=2,
                first=None,
                seed=2,
            )
            wanted += find(
                models[1], "passkey" if kind == "passkey" else "needle", needles, progress=Silent()
            )
    assert found.needles["result"] == tuple(wanted)
    assert len(found.needles["source"]) == 8
    score = run_ruler(
        models[0],
        tokenizer,
        "ruler_fwe",
        tokens=800,
        limit=1,
        seed=2,
        whose="source",
        progress=Silent(),
    )
    assert found.ruler["source"] == (score,)
    written = json.loads(json.dumps(found.to_json()))
    assert set(written) == {"text", "needles", "ruler", "documents_label"}
    assert written["needles"]["result"][0]["tokens"] == 300


def test_a_killed_one_goes_on(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    spec: LongSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After any document or number; to the same figures, and without doing anything twice."""
    spec = replace(spec, ruler=None)
    whole = evaluate_long(*models, tokenizer, spec, Silent())
    passes: list[int] = []

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            passes.append(1)
            return work(*args, **kwargs)

        return counting

    for module in (long_text, long_needle):
        monkeypatch.setattr(module, "logits_at", counted(logits_at))
    evaluate_long(*models, tokenizer, spec, Silent())
    needed, passes[:] = len(passes), []
    kept = tmp_path / "kept"
    kept.mkdir()
    for at in (1, 3, 4, 12):
        with pytest.raises(Killed):
            evaluate_long(*models, tokenizer, spec, Dying(at), kept)
    assert evaluate_long(*models, tokenizer, spec, Silent(), kept) == whole
    assert len(passes) == needed


def test_a_device_that_is_too_small_is_no_fault_of_ours(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    spec: LongSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said, and what to do."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")

    monkeypatch.setattr(long, "measure", full)
    with pytest.raises(UserError, match=r"so many tokens: CUDA out of memory\n") as caught:
        evaluate_long(*models, tokenizer, spec, Silent())
    assert caught.value.where == "evaluate.long"


def test_what_another_device_measured_is_measured_again(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    spec: LongSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table is of one device and dtype, which it names."""
    spec = replace(spec, needles=None, ruler=None)
    whole = evaluate_long(*models, tokenizer, spec, Silent())
    with monkeypatch.context() as patch:
        patch.setattr(long, "fast_dtype", lambda _: torch.bfloat16)
        with pytest.raises(Killed):
            evaluate_long(*models, tokenizer, spec, Dying(2), tmp_path)
    assert list(tmp_path.rglob("long-*"))
    for model in models:
        model.float()
    found = evaluate_long(*models, tokenizer, spec, Silent(), tmp_path)
    assert found.text is not None
    assert whole.text is not None
    assert found.text.dtype == whole.text.dtype == "float32"
    assert len(list(tmp_path.rglob("cpu-float32/long-*"))) == 3 * spec.count


def test_within_the_trained_length_nothing_slides(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, spec: LongSpec
) -> None:
    """The source is then what the result is compared with."""
    spec = replace(spec, trained=TOKENS, needles=None, ruler=None)
    found = evaluate_long(*models, tokenizer, spec, Silent())
    assert found.text is not None
    assert (found.text.reference, found.text.window) == ("source", None)
    assert set(found.text.buckets[0].nll) == {"source", "result"}
    assert (found.needles, found.ruler) == ({}, {})


def test_faults_come_before_the_models(tokenizer: PreTrainedTokenizerBase, spec: LongSpec) -> None:
    """Too few long documents, and lengths without room."""
    with pytest.raises(UserError, match="2 of 3 documents have 400 tokens, 3 are asked for"):
        check_long(tokenizer, replace(spec, count=3))
    with pytest.raises(UserError, match="no room"):
        check_long(tokenizer, replace(spec, needles=LongNeedles(("passkey",), (100,), (0.5,), 1)))
