"""llm-compressor's values in this tool's layout: the same as from the library itself, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import compress_module
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError, UserError
from compressor.model.load import load_source_model, load_tokenizer
from compressor.progress import Silent
from compressor.stages.base import Claim
from compressor.stages.oneshot import check_oneshot, oneshot
from compressor.stages.oneshot_model import OneshotModel
from compressor.stages.receipts import all_receipts
from compressor.stages.walked import WalkedTensors
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama, tiny_llama4, tiny_model, tokens_of_bytes

from .walking import claims_of, some_tokens

SAMPLES, LENGTH = 6, 48
INT4 = {"kind": "int4", "group_size": 32}


class _Heard(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, amount: int, note: str = "") -> None:
        self.notes.append(note)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks."""
    folder = tiny_llama(tmp_path_factory.mktemp("oneshot") / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    # SpinQuantModifier takes the mean of an embedding for zero, as it about is in trained models.
    rows = tensors["model.embed_tokens.weight"].float()
    tensors["model.embed_tokens.weight"] = (rows - rows.mean(dim=1, keepdim=True)).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _claims(folder: Path, scheme: Any, *modifiers: Any, **weights: Any) -> list[Claim]:
    solver = {"kind": "llmcompressor", "modifiers": list(modifiers)}
    return claims_of(FolderSource(folder), {"scheme": scheme, "solver": solver, **weights})


def _run(
    folder: Path, claims: Sequence[Claim], target: Path, progress: Silent | None = None
) -> WalkedTensors:
    target.mkdir()
    ids = some_tokens(SAMPLES, LENGTH)
    worked = oneshot(FolderSource(folder), claims, ids, 0, target, progress or Silent())
    assert worked.dtype == "bfloat16"
    walked = WalkedTensors(target)
    copied = [claim.tensor.name for claim in claims if claim.scheme is None]
    assert set(worked.changed_16bit) == {name for name in copied if walked.changed(name) is not None}
    return walked


def _by_the_library(folder: Path, claims: Sequence[Claim], recipe: list[Any]) -> PreTrainedModel:
    """The library called as its documentation shows, its result packed in place by compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot as library

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = some_tokens(SAMPLES, LENGTH).tolist()
    library(
        model=model,
        processor=load_tokenizer(folder),
        recipe=recipe,
        dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows]),
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
    )
    for module in model.modules():
        compress_module(module)
    return model


@pytest.mark.filterwarnings("ignore")  # the library's own, of which the stage says nothing
@pytest.mark.parametrize("scheme", ["nvfp4a16", INT4], ids=["nvfp4a16", "int4"])
def test_gptq_is_the_librarys(folder: Path, tmp_path: Path, scheme: Any, capfd: Any) -> None:
    """Bit for bit what the library makes of all linear layers; nothing is printed."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    claims = _claims(folder, scheme, {"GPTQModifier": {"dampening_frac": 0.02}})
    capfd.readouterr()
    walked = _run(folder, claims, tmp_path / "ours")
    assert capfd.readouterr().out == ""
    chosen = next(claim.scheme for claim in claims if claim.scheme is not None)
    group = chosen.ct_scheme(["Linear"])
    theirs = _by_the_library(
        folder,
        claims,
        [GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"], dampening_frac=0.02)],
    ).state_dict()
    quantized = [claim for claim in claims if claim.scheme is not None]
    assert len(quantized) == 14
    for claim in quantized:
        module = claim.role.parts[0].module
        for local, tensor in walked.local(module).items():
            expected = theirs[f"{module}.{local}"]
            assert tensor.shape == expected.shape
            assert torch.equal(tensor.float(), expected.float()), f"{module}.{local}"
        assert 0.0 < walked.error(module).squared_error < 0.2 * walked.error(module).squared_norm
    assert walked.changed("model.norm.weight") is None
    assert walked.changed("model.embed_tokens.weight") is None


def _decoded(folder: Path, claims: Sequence[Claim], walked: WalkedTensors) -> PreTrainedModel:
    """The source with what the stage stored in the place of its tensors."""
    model = load_source_model(FolderSource(folder), torch.float32)
    parameters = dict(model.named_parameters())
    for claim in claims:
        changed = walked.changed(claim.tensor.name) if claim.scheme is None else None
        if claim.scheme is not None:
            [part] = claim.role.parts
            changed = claim.scheme.decode(walked.local(part.module), part.out_features, part.in_features)
        if changed is not None:
            parameters[claim.tensor.name].data = changed.float()
    return model


@torch.no_grad()
def _miss(folder: Path, model: PreTrainedModel) -> float:
    """Relative squared difference of the logits from the source's."""
    source = load_source_model(FolderSource(folder), torch.float32)
    ids = some_tokens(4, LENGTH)
    exact, found = source(ids).logits, model(ids).logits
    return float((found - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(
    ("modifiers", "norms", "ends"),
    [
        (["SmoothQuantModifier", "GPTQModifier"], {"input_layernorm", "post_attention_layernorm"}, False),
        ([{"SmoothQuantModifier": {"smoothing_strength": 0.7}}], None, False),
        (["SpinQuantModifier"], {"input_layernorm", "post_attention_layernorm", "norm"}, True),
    ],
    ids=["smooth+gptq", "smooth", "spin"],
)
def test_transforms_change_what_stays_in_16_bit(
    folder: Path, tmp_path: Path, modifiers: list[Any], norms: set[str] | None, ends: bool
) -> None:
    """Norms, and where they are rotated embedding and head, are stored; the model computes what it did.

    8-bit weights add about 1e-4 to the squared error of the logits, bfloat16 about as much; a fold that is
    left out changes them wholly.
    """
    claims = _claims(folder, "int8", *modifiers)
    walked = _run(folder, claims, tmp_path / "ours")
    names = [claim.tensor.name for claim in claims if claim.scheme is None]
    changed = {name for name in names if walked.changed(name) is not None}
    leaves = {name.split(".")[-2] for name in changed}
    expected = norms or {"input_layernorm", "post_attention_layernorm"}
    assert leaves == (expected | {"embed_tokens", "lm_head"} if ends else expected)
    model = _decoded(folder, claims, walked)
    miss = _miss(folder, model)
    assert miss < 1e-3
    # One norm as it was: far off.
    name = "model.layers.1.input_layernorm.weight"
    dict(model.named_parameters())[name].data = load_file(folder / "model.safetensors")[name].float()
    assert _miss(folder, model) > 5 * miss
    for receipt in all_receipts(tmp_path / "ours"):
        for error in receipt["errors"]:
            # Against what was rounded, not against the source: 8-bit rounding.
            assert error["squared_error"] < 1e-3 * error["squared_norm"]
            assert error["solver"] == "llmcompressor"
            assert error["tokens"] == SAMPLES * LENGTH


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_static", "fp8_dynamic", "mxfp4", "int8"])
def test_every_layout(folder: Path, tmp_path: Path, scheme: str) -> None:
    """The library's plain rounding fits each scheme's layout, input scales included; rules may mix them."""
    rules = [{"match": "*.down_proj", "scheme": INT4, "solver": _solver("QuantizationModifier")}]
    claims = _claims(folder, scheme, "QuantizationModifier", rules=rules)
    heard = _Heard()
    walked = _run(folder, claims, tmp_path / "ours", heard)
    for claim in claims:
        for part in claim.role.parts if claim.scheme else ():
            error = walked.error(part.module)
            assert 0.0 < error.squared_error < 0.05 * error.squared_norm
            assert error.scheme == claim.scheme.label if claim.scheme else None
    assert heard.warnings == []


@pytest.mark.parametrize("modifier", ["QuantizationModifier", "GPTQModifier"])
def test_fused_matrices_share_their_scale(folder: Path, tmp_path: Path, modifier: str) -> None:
    """The library gives q, k and v an FP8 scale each; stored is the largest, as an engine would have it."""
    walked = _run(folder, _claims(folder, "fp8_static", modifier), tmp_path / "ours")
    for names in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        stored = [walked.local(f"model.layers.0.{name}") for name in names]
        assert len({float(tensors["weight_scale"]) for tensors in stored}) == 1
        # Its largest weight takes the largest code, as it would not under a scale of its neighbours.
        assert max(float(tensors["weight"].float().abs().max()) for tensors in stored) == 448.0
        assert len({float(tensors["input_scale"]) for tensors in stored}) == 1


def test_recipe_from_end_to_end(folder: Path, tmp_path: Path, capfd: Any) -> None:
    """Runs with the stage in the walk's place, is reloaded, measured and exported; done once, not again."""
    texts = {name: tmp_path / f"{name}.txt" for name in ("shown", "measured")}
    texts["shown"].write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    texts["measured"].write_text("The quick brown fox jumps over the lazy dog. " * 40)
    weights = (
        "{scheme: nvfp4a16, solver: {kind: llmcompressor, modifiers: [SmoothQuantModifier, GPTQModifier]}}"
    )
    rest = (
        f"calibration: {{datasets: [{{path: '{texts['shown']}'}}], num_samples: 6, sequence_length: 64}}\n"
        f"evaluate: {{text: '{texts['measured']}', tokens: 256, context: 64}}\n"
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, weights, rest)
    capfd.readouterr()
    result = compressor.run(recipe, output=tmp_path / "out" / "result")
    assert capfd.readouterr().out == ""
    stages = [stage.name for stage in result.report.stages]
    assert stages == ["oneshot", "stream", "assemble", "evaluate"]
    assert result.report.calibration is not None
    assert result.report.calibration.tokens == 6 * 64
    assert result.report.quality is not None
    assert 0.0 < result.report.quality.kl.mean < 0.25
    exported, source = load_file(result.output / "model.safetensors"), load_file(folder / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(exported[norm], source[norm])
    checks = check_structure(result.output, Silent())
    checks += check_source_values(result.output, FolderSource(folder), Silent())
    weights = next(check for check in checks if check.name == "weights")
    assert weights.status == "passed"
    assert not any(check.status in ("failed", "skipped") for check in checks)
    again = compressor.run(
        recipe, output=tmp_path / "elsewhere", workspace=tmp_path / "out/.compress-workspace"
    )
    assert all(stage.resumed for stage in again.report.stages)


def _solver(*modifiers: Any) -> dict[str, Any]:
    return {"kind": "llmcompressor", "modifiers": list(modifiers)}


def test_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    """Unknown options and values, AWQ without an accelerator: one sentence each, before a weight is read."""
    source = FolderSource(folder)
    check_oneshot(source, _claims(folder, "nvfp4a16", "GPTQModifier"))
    for modifier, told in (
        ({"GPTQModifier": {"dampening": 0.1}}, "dampening"),
        ({"GPTQModifier": {"block_size": "many"}}, "block_size"),
        ({"SpinQuantModifier": {"randomize": True}}, "randomize"),
        ("AWQModifier", "accelerator"),
    ):
        with pytest.raises(UserError, match=told):
            check_oneshot(source, _claims(folder, "nvfp4a16", modifier))


def test_failure_inside_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library raises is one sentence, and the next run is not the worse for it."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("first line\nsecond")

    with monkeypatch.context() as patched:
        patched.setattr(GPTQModifier, "compress_modules", fail)
        with pytest.raises(UserError, match="llm-compressor failed: RuntimeError: first line"):
            _run(folder, _claims(folder, INT4, "GPTQModifier"), tmp_path / "bad")
    assert not list((tmp_path / "bad").iterdir())
    _run(folder, _claims(folder, INT4, "GPTQModifier"), tmp_path / "good")


def test_layers_that_a_modifier_does_not_know(folder: Path, tmp_path: Path) -> None:
    """The advice is about what the library could not find."""
    mappings = [[["re:.*nope"], "re:.*input_layernorm"]]
    claims = _claims(folder, INT4, {"SmoothQuantModifier": {"mappings": mappings}}, "GPTQModifier")
    with pytest.raises(UserError, match="resolving mappings") as caught:
        _run(folder, claims, tmp_path / "bad")
    assert "`mappings`" in caught.value.fix


def test_experts(tmp_path: Path) -> None:
    """Fused experts are taken apart by the library: checked against the checkpoint, every one calibrated."""
    config = Qwen3MoeConfig(
        **tokens_of_bytes(),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    folder = tiny_model(tmp_path / "model", Qwen3MoeForCausalLM, config, torch.bfloat16)
    claims = _claims(folder, "nvfp4", "QuantizationModifier")
    check_oneshot(FolderSource(folder), claims)
    walked = _run(folder, claims, tmp_path / "ours")
    experts = [part for claim in claims for part in claim.role.parts if ".experts." in part.module]
    assert len(experts) == 2 * 4 * 3
    for part in experts:
        error = walked.error(part.module)
        assert 0.0 < error.squared_error < 0.05 * error.squared_norm
        assert float(walked.local(part.module)["input_global_scale"]) > 0.0


def test_experts_of_a_text_model_alone(tmp_path: Path) -> None:
    """Llama 4's, of which the library looks for the config of the whole."""
    folder = tiny_llama4(tmp_path / "model", experts=2)
    claims = _claims(folder, "nvfp4a16", "GPTQModifier")
    walked = _run(folder, claims, tmp_path / "ours")
    experts = [part for claim in claims for part in claim.role.parts if ".experts." in part.module]
    assert len({part.expert for part in experts}) == 2
    for part in experts:
        error = walked.error(part.module)
        assert 0.0 < error.squared_error < 0.1 * error.squared_norm


def test_experts_that_it_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library stumbles over, and what to do."""
    from llmcompressor.modeling.moe import linearize

    def fail(model: PreTrainedModel) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(linearize, "linearize_moe", fail)
    folder = tiny_llama4(tmp_path / "model", experts=2)
    claims = _claims(folder, "nvfp4a16", "QuantizationModifier")
    with pytest.raises(CheckpointError, match="cannot take the experts apart: AttributeError") as caught:
        _run(folder, claims, tmp_path / "ours")
    assert "use a solver of this tool" in caught.value.fix


def test_starved_scale_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of uninitialized memory never reaches a file."""
    claims = _claims(folder, "nvfp4", "QuantizationModifier")
    packed = OneshotModel._packed

    def starved(self: OneshotModel, *args: Any) -> dict[str, torch.Tensor]:
        return packed(self, *args) | {"input_global_scale": torch.tensor([4e31])}

    monkeypatch.setattr(OneshotModel, "_packed", starved)
    with pytest.raises(CheckpointError, match="values that no model has"):
        _run(folder, claims, tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*.safetensors"))


@pytest.mark.slow
def test_autoround(folder: Path, tmp_path: Path) -> None:
    """Its result comes out in the schemes' layouts, NVFP4 by the name of its preset."""
    options = {"iters": 2, "enable_torch_compile": False}
    for name, scheme in (("int4", INT4), ("nvfp4", "nvfp4")):
        claims = _claims(folder, scheme, {"AutoRoundModifier": options})
        walked = _run(folder, claims, tmp_path / name)
        for claim in claims:
            for part in claim.role.parts if claim.scheme else ():
                error = walked.error(part.module)
                assert 0.0 < error.squared_error < 0.05 * error.squared_norm
