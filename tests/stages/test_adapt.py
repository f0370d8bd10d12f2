"""Adapters: that training helps, resumes bit by bit, and that what is merged computes what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.adapted import ADAPTED_NAME, AdaptedSource, write_adapted
from compressor.checkpoint.base import Source
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.gguf import GgufSource
from compressor.errors import CheckpointError, UserError
from compressor.model.load import load_source_model
from compressor.progress import Silent
from compressor.stages import adapt_loss
from compressor.stages.adapt import AdaptSpec, adapt_stage
from compressor.stages.adapt_loss import SequenceLoss
from compressor.stages.adapt_memory import attention_width
from compressor.stages.adapt_model import AdaptedModel
from compressor.stages.trainer import rate_share
from compressor.workspace import file_sha256
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
LENGTH = 64
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


class _Stopping(Silent):
    """Interrupts after so many steps."""

    def __init__(self, after: int) -> None:
        self._left = after
        self._counts = False

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._counts = stage == "adapt"

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= self._counts
        if self._left == 0:
            raise KeyboardInterrupt


class _Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a few words: a language that little training is enough for."""
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text("the cat sat on the mat and the dog sat on the cat. " * 60)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings, in fp32."""
    return tiny_llama(tmp_path_factory.mktemp("adapt") / "model", tie=True, dtype=torch.float32)


def _spec(text: Path, **changes: Any) -> AdaptSpec:
    documents = (DatasetSpec(text.name, text, file_sha256(text)),)
    spec = AdaptSpec(
        documents,
        LENGTH,
        steps=8,
        sequences=2,
        rank=4,
        alpha=8,
        norms=True,
        embeddings=True,
        learning_rate=2e-2,
        direct_learning_rate=2e-2,
        warmup_steps=2,
        save_every=3,
    )
    return replace(spec, **changes)


def _adapted(source: Source, spec: AdaptSpec, folder: Path, progress: Silent | None = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return adapt_stage(source, spec, folder, progress or Silent())["adapt"]


def _trained_model(source: FolderSource, spec: AdaptSpec) -> AdaptedModel:
    """With adapters that do something."""
    made = AdaptedModel(
        source,
        rank=spec.rank,
        alpha=spec.alpha,
        targets=spec.targets,
        norms=spec.norms,
        embeddings=spec.embeddings,
        seed=spec.seed,
        dtype=torch.float32,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def test_loss_falls_and_the_merged_model_has_it(model: Path, text: Path, tmp_path: Path) -> None:
    """The loss ends far below where it began, and so does that of the merged checkpoint."""
    source = FolderSource(model)
    facts = _adapted(source, _spec(text, steps=16), tmp_path)
    assert len(facts["losses"]) == 16
    assert facts["losses"][-1] < 0.8 * facts["losses"][0]
    adapted = AdaptedSource(source, tmp_path, "key")
    assert adapted.fingerprint != source.fingerprint
    assert set(facts["changed"]) == set(adapted.changed)
    ids_1T = torch.tensor([list(text.read_bytes()[:LENGTH])])
    losses = []
    for which in (source, adapted):
        with torch.no_grad():
            logits = load_source_model(which, torch.float32)(ids_1T).logits[0]
        losses.append(float(cross_entropy(logits[:-1], ids_1T[0, 1:])))
    assert losses[1] < 0.8 * losses[0]
    # The state is gone: nothing but the result and its texts stays.
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTED_NAME, "sequences.tensors"}


def test_goes_on_bit_by_bit(model: Path, text: Path, tmp_path: Path) -> None:
    """Killed between two saved states, a second run ends with the bytes of one that was not killed."""
    source, spec = FolderSource(model), _spec(text)
    whole = _adapted(source, spec, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _adapted(source, spec, tmp_path / "killed", _Stopping(5))
    again = adapt_stage(source, spec, tmp_path / "killed", Silent())
    assert again["resumed"]
    assert again["adapt"]["losses"] == whole["losses"]
    files = [(tmp_path / name / ADAPTED_NAME).read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_layers_that_are_no_product_get_none(text: Path, tmp_path: Path) -> None:
    """DeepSeek-V4's ``o_a_proj`` is a Linear by its class alone: it takes its inputs in groups."""
    source = FolderSource(FAMILIES["deepseek_v4"](tmp_path / "model"))
    facts = _adapted(source, _spec(text, steps=2), tmp_path / "work")
    assert "q_b_proj" in facts["targets"]
    assert "o_a_proj" not in facts["targets"]


def test_heads_that_are_more_than_the_hidden_state() -> None:
    """Of a config that makes no sense, or spells it otherwise (BLOOM): an estimate, no traceback."""
    assert attention_width({"hidden_size": 32, "num_attention_heads": 64}) == 64


def test_what_no_token_reaches_is_left_as_it_is(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer without a gradient, such as an expert that nothing is sent to, is no fault."""
    skipped = torch.nn.Parameter(torch.ones(3))
    build = AdaptedModel.__init__

    def init(self: AdaptedModel, *args: Any, **named: Any) -> None:
        build(self, *args, **named)
        self.direct["skipped"] = skipped

    monkeypatch.setattr(AdaptedModel, "__init__", init)
    facts = _adapted(FolderSource(model), _spec(text, steps=3), tmp_path)
    assert len(facts["losses"]) == 3
    assert torch.equal(skipped, torch.ones(3))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "phi3", "gemma2", "granite", "gpt2"])
def test_merged_computes_what_was_trained(name: str, text: Path, tmp_path: Path) -> None:
    """Logits of the model with adapters are those of the merged checkpoint; tied embeddings stay tied."""
    source = FolderSource(FAMILIES[name](tmp_path / "model"))
    trained = _trained_model(source, _spec(text))
    folder = tmp_path / "adapted"
    folder.mkdir()
    write_adapted(folder, source.headers, trained.changed, trained.merged())
    merged = load_source_model(AdaptedSource(source, folder, "key"), torch.float32)
    ids_BT = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = load_source_model(source, torch.float32)(ids_BT).logits
        expected = trained.whole.model(ids_BT, use_cache=False).logits
        found = merged(ids_BT, use_cache=False).logits
    # fp32 products in another order, against changes that move the logits by far more.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - before).abs().max()) > 0.05
    if "tied" in name:
        assert len({id(trained.whole.model.get_parameter(name)) for name in _ENDS}) == 1
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "granite"])
@pytest.mark.parametrize("chunk", [256, 1 << 20])
def test_loss_is_that_of_all_logits(
    name: str, chunk: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients in chunks are those of the model's own logits, whatever it does to them."""
    monkeypatch.setattr(adapt_loss, "CHUNK_LOGITS", {"cpu": chunk * 3})
    source = FolderSource(FAMILIES[name](tmp_path / "model"))
    trained = _trained_model(source, _spec(text))
    ids_BT = torch.arange(40).reshape(2, 20)
    gradients = []
    logits = trained.whole.model(ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    plain = cross_entropy(logits, ids_BT[:, 1:].flatten(), reduction="sum")
    chunked, told = SequenceLoss(trained.whole.model, torch.float32)(ids_BT)
    torch.testing.assert_close(told, chunked.detach())
    for loss in (plain, chunked):
        loss.backward()
        gradients.append({name: found.grad for name, found in trained.trained.items()})
        for parameter in trained.trained.values():
            parameter.grad = None
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=0)
    for key, gradient in gradients[0].items():
        assert gradient is not None
        # The factor of granite's logits is fitted.
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradients(model: Path, text: Path) -> None:
    """Recomputing saves memory and changes nothing."""
    ids_BT = torch.arange(LENGTH)[None]
    gradients = []
    for again in (False, True):
        trained = _trained_model(FolderSource(model), _spec(text))
        if again:
            trained.recompute_blocks()
        SequenceLoss(trained.whole.model, torch.float32)(ids_BT)[0].backward()
        gradients.append({name: found.grad for name, found in trained.trained.items()})
    for key, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize("embeddings", [False, True])
def test_bfloat16_trains_masters_in_fp32(text: Path, tmp_path: Path, embeddings: bool) -> None:
    """Products in bfloat16 give about the losses of fp32, and hidden states are bfloat16 all the way."""
    source = FolderSource(tiny_llama(tmp_path / "model", tie=True))
    spec = _spec(text, embeddings=embeddings, steps=12)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = _adapted(source, replace(spec, dtype=dtype), tmp_path / dtype)["losses"]
    # bfloat16 keeps 8 bits of each number; the first losses differ by that, later ones by what it adds up to.
    assert losses["bfloat16"][:2] == pytest.approx(losses["float32"][:2], rel=0.01)
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.1)
    made = AdaptedModel(
        source,
        rank=2,
        alpha=2,
        targets=(),
        norms=True,
        embeddings=embeddings,
        seed=0,
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert {parameter.dtype for parameter in made.trained.values()} == {torch.float32}
    with made.autocast():
        hidden = made.whole.model.get_decoder()(torch.arange(8)[None], use_cache=False)[0]
    assert hidden.dtype == torch.bfloat16


def test_only_what_was_asked_for_changes(model: Path, text: Path, tmp_path: Path) -> None:
    """Without norms and embeddings only the attention's projections are others."""
    source = FolderSource(model)
    facts = _adapted(source, _spec(text, steps=2, norms=False, embeddings=False), tmp_path)
    assert facts["targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    adapted = AdaptedSource(source, tmp_path, "key")
    different = {name for name in source.headers if not torch.equal(source.read(name), adapted.read(name))}
    assert different == set(adapted.changed) == {name for name in source.headers if ".self_attn." in name}


def test_rounds_to_the_dtype_of_the_source(text: Path, tmp_path: Path) -> None:
    """A bfloat16 source stays one."""
    source = FolderSource(tiny_llama(tmp_path / "model"))
    _adapted(source, _spec(text, steps=2), tmp_path / "work")
    tensors = load_file(tmp_path / "work" / ADAPTED_NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_gguf_sources_are_trained_as_they_are_read(tmp_path: Path) -> None:
    """Dequantized to bfloat16, under the names and the config that the result will have."""
    source = GgufSource(tiny_gguf(tmp_path / "model.gguf"))
    path = tmp_path / "long.txt"
    path.write_text("the cat sat on the mat. " * 200)
    changed = _adapted(source, _spec(path, steps=2, embeddings=False), tmp_path / "work")["changed"]
    adapted = AdaptedSource(source, tmp_path / "work", "key")
    different = {name for name in source.headers if not torch.equal(source.read(name), adapted.read(name))}
    assert different == {name for name in changed if ".self_attn." in name or "norm" in name}
    assert load_source_model(adapted, torch.float32)(torch.arange(4)[None]).logits.isfinite().all()


def test_short_documents_are_joined_and_shown_again(model: Path, tmp_path: Path) -> None:
    """Short documents make whole sequences together; too few of them are told of."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(f'{{"text": "document {index} is short"}}\n' for index in range(20)))
    heard = _Heard()
    facts = _adapted(FolderSource(model), _spec(path, steps=4), tmp_path / "work", heard)
    assert facts["sequences"] == facts["joined"] > 2
    assert any("each is shown" in warning for warning in heard.warnings)


def test_faults_of_the_user(model: Path, text: Path, tmp_path: Path) -> None:
    """Texts that fill no sequence, layers that are not there, and rates that run away are told in a line."""
    source = FolderSource(model)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UserError, match="fewer than one sequence of 64"):
        _adapted(source, _spec(short), tmp_path / "a")
    with pytest.raises(UserError, match=r"no layer is called w_q[^$]*q_proj"):
        _adapted(source, _spec(text, targets=("w_q",)), tmp_path / "b")
    with pytest.raises(UserError, match=r"adapters.learning_rate: (the loss is|.*not finite)"):
        _adapted(source, _spec(text, steps=6, learning_rate=1e25, warmup_steps=1), tmp_path / "c")


def test_refuses_tensors_of_another_model(model: Path, text: Path, tmp_path: Path) -> None:
    """Trained tensors of other names or shapes, and values that are not finite, are refused."""
    source = FolderSource(model)
    _adapted(source, _spec(text, steps=1), tmp_path / "work")
    other = FolderSource(tiny_llama(tmp_path / "other", hidden=32, dtype=torch.float32))
    with pytest.raises(CheckpointError, match="none of this model's"):
        AdaptedSource(other, tmp_path / "work", "key")
    from safetensors.torch import save_file

    name = "model.norm.weight"
    save_file({name: torch.full((64,), float("nan"))}, tmp_path / "work" / ADAPTED_NAME)
    with pytest.raises(CheckpointError, match="not finite"):
        AdaptedSource(source, tmp_path / "work", "key").read(name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "adapters.sequence_length: the accelerator's memory"),
        (
            RuntimeError("No available kernel. Aborting execution."),
            "no kernel computes this model's attention",
        ),
    ],
)
def test_what_an_accelerator_lacks_is_told(
    model: Path, text: Path, tmp_path: Path, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence in the place of a traceback."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(SequenceLoss, "forward", fail)
    with pytest.raises(UserError, match=said):
        _adapted(FolderSource(model), _spec(text), tmp_path)


def test_rates() -> None:
    """A linear rise to the highest, then down to a tenth."""
    shares = [rate_share(step, 100, 10) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)
