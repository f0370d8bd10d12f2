"""Smoothing inside the walk: less error where channels stand out, consistent folds, resume, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from compressor.checkpoint.folder import FolderSource
from compressor.model import foldings
from compressor.model.foldings import Fold, find_folds
from compressor.model.hidden import HiddenStates
from compressor.model.names import part_view
from compressor.model.tape import Tape
from compressor.progress import Silent
from compressor.stages import smooth_trial, smoothing
from compressor.stages.base import Claim
from compressor.stages.importance import norm_importance
from compressor.stages.jobs import Job
from compressor.stages.receipts import all_receipts
from compressor.stages.smooth_trial import Trial, hear
from compressor.stages.smoothing import Smoother
from compressor.stages.walk import WalkSpec, walk
from compressor.stages.walked import WalkedTensors, layer_name, smoothing_name
from compressor.workspace import file_sha256
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama, tiny_llama4, tiny_model, tokens_of_bytes

from .walking import SPEC, claims_of, some_tokens

SMOOTH = {"kind": "smooth"}
# Channels of the hidden states, and so of the norms' outputs, that are larger than all others.
OUTLIERS = (3, 17, 40)
FACTOR = 100.0
# Of the values of attention.
CLIP = 6.0


class _Stopping(Silent):
    """Interrupts the walk when the ``after``-th group of matrices is solved."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bf16 whose hidden states have channels that stand out."""
    return _planted(tiny_llama(tmp_path_factory.mktemp("smoothing") / "model", layers=3))


def _planted(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, list(OUTLIERS)] *= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _walk(
    folder: Path,
    weights: dict[str, Any],
    target: Path,
    spec: WalkSpec = SPEC,
    progress: Silent | None = None,
) -> list[Claim]:
    target.mkdir(exist_ok=True)
    source = FolderSource(folder)
    claims = claims_of(source, weights)
    walk(source, claims, some_tokens(5, 32), spec, target, progress or Silent())
    return claims


def _hashes(target: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(target.glob("layer-*.safetensors"))}


def _inputs(target: Path) -> list[dict[str, Any]]:
    return [found for receipt in all_receipts(target) for found in receipt["smoothing"]["inputs"]]


@torch.no_grad()
def _result(folder: Path, claims: list[Claim], target: Path) -> PreTrainedModel:
    """The whole model with what the walk stored, inputs rounded as an engine rounds them."""
    walked = WalkedTensors(target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for claim in claims:
        changed = walked.changed(claim.tensor.name)
        if claim.scheme is None:
            if changed is not None:
                model.get_parameter(claim.tensor.name).copy_(changed)
            continue
        part, scheme = claim.role.parts[0], claim.scheme
        tensors = walked.local(part.module)
        module = model.get_submodule(part.module)
        module.weight.copy_(scheme.decode(tensors, part.out_features, part.in_features))
        if scheme.rounds_inputs:
            module.register_forward_pre_hook(
                lambda _, args, scheme=scheme, tensors=tensors: (
                    scheme.round_inputs(args[0].flatten(0, -2), tensors).view(args[0].shape),
                )
            )
    return model


@torch.no_grad()
def _divergence(folder: Path, claims: list[Claim], target: Path) -> float:
    """Squared error of the logits over their square, on tokens that the walk did not see."""
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(9))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    logits = _result(folder, claims, target)(ids).logits
    return float((logits - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("scheme", ["nvfp4a16", "nvfp4", "fp8_static"])
def test_channels_that_stand_out(scheme: str, folder: Path, tmp_path: Path) -> None:
    """Smoothing lowers the error of the matrices that read them, and of the model's logits."""
    plain = _walk(folder, {"scheme": scheme}, tmp_path / "rtn")
    smooth = _walk(folder, {"scheme": scheme, "solver": SMOOTH}, tmp_path / "smooth")
    looked_at = _inputs(tmp_path / "smooth")
    assert len(looked_at) == 12
    sums = [[sum(pair[i] for pair in found["errors"].values()) for i in (0, 1)] for found in looked_at]
    assert all(after <= before for before, after in sums)
    before, after = (sum(column) for column in zip(*sums, strict=True))
    # E4M3 has as many digits for small values as for large ones: there is little to gain.
    assert after < {"nvfp4a16": 0.93, "nvfp4": 0.85, "fp8_static": 1.0}[scheme] * before
    if scheme != "fp8_static":
        made = ((plain, tmp_path / "rtn"), (smooth, tmp_path / "smooth"))
        errors = [_divergence(folder, *each) for each in made]
        assert errors[1] < 0.95 * errors[0]


def test_errors_are_those_of_a_slow_second_measurement(folder: Path, tmp_path: Path) -> None:
    """Of one norm: its output heard in the whole model, all rows, weights decoded.

    The walk looks at 512 rows at most, here all 160, none of which is longer than others; sums are in another
    order.
    """
    claims = _walk(folder, {"scheme": "nvfp4a16", "solver": SMOOTH}, tmp_path)
    found = next(each for each in _inputs(tmp_path) if "norm" in each["made_by"] and each["ratio"])
    walked, source = WalkedTensors(tmp_path), FolderSource(folder)
    scale_K = walked.changed(smoothing_name(found["made_by"]))
    assert scale_K is not None
    heard: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    norm = model.get_submodule(found["made_by"].removesuffix(".weight"))
    norm.register_forward_hook(lambda _m, _a, made: heard.append(made.flatten(0, 1)))
    with torch.no_grad():
        model(some_tokens(5, 32))
    x_RI = heard[0]
    by_module = {claim.role.parts[0].module: claim for claim in claims if claim.scheme is not None}
    for module, (_, after) in found["errors"].items():
        claim = by_module[module]
        if module.endswith(("v_proj", "up_proj")):
            continue  # their rows were scaled as well
        part, scheme = claim.role.parts[0], claim.scheme
        assert scheme is not None
        decoded_OI = scheme.decode(walked.local(module), part.out_features, part.in_features)
        wanted = x_RI @ source.read(f"{module}.weight").float().T
        error = float(((x_RI / scale_K) @ decoded_OI.T - wanted).square().sum() / wanted.square().sum())
        assert error == pytest.approx(after, rel=1e-3)


def test_folds_are_consistent(folder: Path, tmp_path: Path) -> None:
    """Stored in INT8, the model computes what the source does: every reader has its norm's exact ratio."""
    claims = _walk(folder, {"scheme": "int8", "solver": {**SMOOTH, "then": "gptq"}}, tmp_path)
    plain = _walk(folder, {"scheme": "int8", "solver": "gptq"}, tmp_path / "plain")
    assert any(found["ratio"] for found in _inputs(tmp_path))
    assert _divergence(folder, claims, tmp_path) < 1.5 * _divergence(folder, plain, tmp_path / "plain") < 1e-2
    walked, source = WalkedTensors(tmp_path), FolderSource(folder)
    for found in _inputs(tmp_path):
        new = walked.changed(found["made_by"])
        scale_K = walked.changed(smoothing_name(found["made_by"]))
        if "norm" not in found["made_by"] or found["ratio"] is None:
            assert new is None
            continue
        assert new is not None
        assert scale_K is not None
        old = source.read(found["made_by"])
        assert new.dtype == old.dtype == torch.bfloat16
        assert torch.equal(scale_K, (old.double() / new.double()).float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_rounded(dtype: Literal["float32", "bfloat16"], folder: Path, tmp_path: Path) -> None:
    """The source's weights times the scales in fp32, whatever the walk computes in; columns weighed by the
    norm that is stored."""
    spec = replace(SPEC, dtype=dtype)
    claims = _walk(folder, {"scheme": "nvfp4a16", "solver": SMOOTH}, tmp_path, spec)
    walked, source = WalkedTensors(tmp_path), FolderSource(folder)
    by_module = {claim.role.parts[0].module: claim for claim in claims if claim.scheme is not None}
    module = "model.layers.2.mlp.gate_proj"
    claim, other = by_module[module], by_module["model.layers.2.mlp.up_proj"]
    norm = "model.layers.2.post_attention_layernorm.weight"
    new, scale_K = walked.changed(norm), walked.changed(smoothing_name(norm))
    rows_K = walked.changed(smoothing_name(other.tensor.name))
    assert new is not None
    assert scale_K is not None
    assert claim.scheme is not None
    importance_I = norm_importance(source, claim.role.input_norm, 64, {norm: new})
    weights = [source.read(found.tensor.name).float() * scale_K for found in (claim, other)]
    if rows_K is not None:
        weights[1] = weights[1] / rows_K[:, None]
    fitted = claim.scheme.fit(weights, search="full", importance_I=importance_I)
    expected = claim.scheme.encode(weights[0], fitted[0])
    for name, tensor in walked.local(module).items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))


def test_learning_aims_at_the_scaled_weights_in_fp32(folder: Path, tmp_path: Path) -> None:
    """In a bf16 walk too: the stored errors are those of the source's weights times the scales."""
    learned = {"kind": "learned", "steps": 8, "learning_rate": 1e-4}
    weights = {"scheme": "int8", "solver": {**SMOOTH, "then": learned}}
    claims = _walk(folder, weights, tmp_path, replace(SPEC, dtype="bfloat16"))
    walked, source = WalkedTensors(tmp_path), FolderSource(folder)
    receipt = all_receipts(tmp_path)[0]
    by_module = {claim.role.parts[0].module: claim for claim in claims if claim.scheme is not None}
    scale_K = walked.changed(smoothing_name("model.layers.0.post_attention_layernorm.weight"))
    assert scale_K is not None
    module = "model.layers.0.mlp.gate_proj"
    (found,) = (error for error in receipt["errors"] if error["module"] == module)
    claim = by_module[module]
    assert claim.scheme is not None
    weight_OI = source.read(f"{module}.weight").float() * scale_K
    decoded_OI = claim.scheme.decode(walked.local(module), *weight_OI.shape)
    if found["solver"].endswith("learned"):
        # what the twin holds is rounded to bf16
        decoded_OI = decoded_OI.to(torch.bfloat16).float()
    expected = float((decoded_OI - weight_OI).double().square().sum())
    assert found["squared_error"] == pytest.approx(expected, rel=1e-5)
    assert found["squared_norm"] == pytest.approx(float(weight_OI.double().square().sum()), rel=1e-6)


def test_clamp_that_only_real_tokens_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that random rows let pass is dropped with a note where the block clamps what is scaled.

    All tokens share a direction that some value channels read: their values, some 9, are clamped, and those
    that random rows make are not. Divided by a scale, the former are not clamped either.
    """
    monkeypatch.setattr(foldings, "_EXPONENTS", (-1, 1))
    config = OlmoConfig(
        **tokens_of_bytes(),
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        clip_qkv=CLIP,
    )
    folder = tiny_model(tmp_path / "model", OlmoForCausalLM, config, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    shared_H = torch.randn(64, generator=torch.Generator().manual_seed(5))
    shared_H = (shared_H - shared_H.mean()) / (shared_H - shared_H.mean()).norm()
    embedding = tensors["model.embed_tokens.weight"].float()
    embedding = embedding + 4 * embedding.norm(dim=1, keepdim=True).mean() * shared_H
    tensors["model.embed_tokens.weight"] = embedding.bfloat16()
    tensors["model.layers.0.self_attn.v_proj.weight"][::8] = (1.2 * shared_H).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    errors = {}
    for name, solver in (("rtn", "rtn"), ("smooth", SMOOTH)):
        weights = {"scheme": {"kind": "int4", "group_size": 32}, "solver": solver}
        claims = _walk(folder, weights, tmp_path / name)
        errors[name] = _divergence(folder, claims, tmp_path / name)
    found = {each["made_by"].split(".")[-2]: each for each in _inputs(tmp_path / "smooth")}
    assert found["v_proj"]["note"] == "the block computes something else with it"
    assert found["v_proj"]["ratio"] is None
    assert all(before == after for before, after in found["v_proj"]["errors"].values())
    assert found["up_proj"]["ratio"] is not None
    assert errors["smooth"] < 1.5 * errors["rtn"]


def test_input_given_by_keyword(folder: Path) -> None:
    """A matrix that its block calls with keywords is heard as well."""
    source = FolderSource(folder)
    states = HiddenStates(torch.device("cpu"))
    ids = some_tokens(2, 8)
    tape = Tape.record(
        source, [ids], dtype=torch.float32, device=torch.device("cpu"), states=states, small=ids
    )
    block = tape.load(0)
    folds = find_folds(tape, block)
    with torch.no_grad():
        plain = hear(tape, block, folds, states, 1)
        mlp: Any = block.module.get_submodule("mlp")
        mlp.forward = lambda x: mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        keyword = hear(tape, block, folds, states, 1)
    assert [fold.ear for fold in folds][-1] == "mlp.down_proj"
    assert all(torch.equal(one.size_I, other.size_I) for one, other in zip(plain, keyword, strict=True))


def test_16_bit_tensors_are_not_read_for_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only F16 can be too small for scaled values: of BF16, nothing is read to know that."""
    source = FolderSource(folder)
    claims = claims_of(source, {"scheme": "nvfp4a16", "solver": SMOOTH})
    ids = some_tokens(2, 8)
    cpu = torch.device("cpu")
    tape = Tape.record(source, [ids], dtype=torch.float32, device=cpu, states=HiddenStates(cpu), small=ids)
    block = tape.load(0)
    solved = {part.module: (claim, part) for claim in claims if claim.scheme for part in claim.role.parts}
    smoother = Smoother(source, tape, block, None, {claim.tensor.name: claim for claim in claims}, solved)
    read: list[str] = []
    monkeypatch.setattr(source, "read", read.append)
    assert [smoother._refusal(fold) for fold in find_folds(tape, block)] == [None] * 4
    assert read == []


@pytest.mark.parametrize("keep_inputs", [True, False])
@pytest.mark.parametrize("then", ["rtn", "gptq"])
def test_killed_walk_goes_on(then: str, keep_inputs: bool, folder: Path, tmp_path: Path) -> None:
    """Stopped in any block, with or without kept inputs: the same bytes and receipts."""
    weights = {"scheme": "nvfp4", "solver": {**SMOOTH, "then": then}}
    spec = replace(SPEC, keep_inputs=keep_inputs)
    _walk(folder, weights, tmp_path / "whole", spec)
    for after in (1, 7):
        with pytest.raises(KeyboardInterrupt):
            _walk(folder, weights, tmp_path / "part", spec, _Stopping(after))
    assert (tmp_path / "part" / f"{layer_name(0)}.json").exists()
    _walk(folder, weights, tmp_path / "part", spec)
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "whole")
    assert all_receipts(tmp_path / "part") == all_receipts(tmp_path / "whole")


def test_experts_and_their_router(tmp_path: Path) -> None:
    """All that read a norm before experts are scaled; what stays in 16 bit by powers of two, exactly."""
    folder = _planted(tiny_llama4(tmp_path / "model", experts=4))
    _walk(folder, {"scheme": "nvfp4", "solver": SMOOTH}, tmp_path / "walk")
    walked, source = WalkedTensors(tmp_path / "walk"), FolderSource(folder)
    moved = [found for found in _inputs(tmp_path / "walk") if "post_attention" in found["made_by"]]
    assert any(found["ratio"] for found in moved)
    for found in moved:
        if found["ratio"] is None:
            continue
        assert len(found["errors"]) == 10, "gate and up of the shared expert and of four others"
        (router,) = (name for name in found["readers"] if "router" in name)
        scale_K = walked.changed(smoothing_name(found["made_by"]))
        assert scale_K is not None
        assert torch.equal(scale_K.log2(), scale_K.log2().round())
        new = walked.changed(router)
        assert new is not None
        assert torch.equal(new, (source.read(router).float() * scale_K).to(torch.bfloat16))
        assert torch.equal(new.float(), source.read(router).float() * scale_K)


def test_experts_are_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check has errors of all experts, and keeps the outputs of no more than one group at a time."""
    made: list[int] = []

    class Spy(Trial):
        def __init__(self, fold: Fold, jobs: Sequence[Job], *rest: Any) -> None:
            made.append(len(jobs))
            super().__init__(fold, jobs, *rest)

    monkeypatch.setattr(smooth_trial, "MOST_EXPERTS", 2)
    monkeypatch.setattr(smoothing, "Trial", Spy)
    folder = tiny_llama4(tmp_path / "model", experts=4)
    _walk(folder, {"scheme": "int8", "solver": SMOOTH}, tmp_path / "walk")
    found = [each for each in _inputs(tmp_path / "walk") if "post_attention" in each["made_by"]]
    assert [len(each["errors"]) for each in found] == [10, 10]
    assert max(made) <= 4, "two matrices of the shared expert, and of two others"


class _Warned(Silent):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def test_experts_without_tokens(tmp_path: Path) -> None:
    """Are topped up and warned of as without smoothing; smoothing's own errors are in its facts alone."""
    config = Qwen3MoeConfig(
        **tokens_of_bytes(),
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=1,
    )
    folder = tiny_model(tmp_path / "model", Qwen3MoeForCausalLM, config, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[1], gate[2:] = -gate[0], 0  # the first or the second wins over all others
    tensors["model.embed_tokens.weight"][:, [3, 17]] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told: dict[str, _Warned] = {}
    errors: dict[str, dict[str, dict[str, Any]]] = {}
    for solver in ("gptq", "smooth+gptq", "smooth"):
        told[solver] = _Warned()
        _walk(folder, {"scheme": "nvfp4a16", "solver": solver}, tmp_path / solver, progress=told[solver])
        (receipt,) = all_receipts(tmp_path / solver)
        errors[solver] = {error["module"]: error for error in receipt["errors"]}
    assert any(found["ratio"] for found in _inputs(tmp_path / "smooth+gptq"))
    plain, smoothed = errors["gptq"], errors["smooth+gptq"]
    unheard = {module for module, error in plain.items() if error["tokens"] == 0}
    assert len(unheard) == 6
    assert {module for module, error in smoothed.items() if error["tokens"] == 0} == unheard
    for module in unheard:
        for error in (plain[module], smoothed[module]):
            assert error["topped_up"] == 4, "32 / 8"
            assert error["output_error"] <= error["rtn_output_error"]
    assert len(told["gptq"].said) == 1
    assert told["smooth+gptq"].said == told["gptq"].said
    for error in errors["smooth"].values():
        assert error["output_error"] is None
        assert error["rtn_output_error"] is None
        assert error["tokens"] is None
    assert {error["solver"] for error in errors["smooth"].values()} >= {"smooth"}


@pytest.mark.parametrize(
    ("weights", "made_by", "told"),
    [
        ({"rules": [{"match": "*.v_proj", "scheme": "int8", "solver": "rtn"}]}, "input_layernorm", "another"),
        ({"rules": [{"match": "*.down_proj", "scheme": "int8", "solver": "gptq"}]}, "mlp.up_proj", None),
        ({"ignore": ["*.layers.0.*"]}, "input_layernorm", None),
    ],
)
def test_left_alone(
    weights: dict[str, Any], made_by: str, told: str | None, folder: Path, tmp_path: Path
) -> None:
    """Inputs that some reader's rule keeps from being smoothed: a note, or nothing where nobody asked."""
    _walk(folder, {"scheme": "int8", "solver": SMOOTH, **weights}, tmp_path)
    receipts = all_receipts(tmp_path)
    inputs = receipts[0].get("smoothing", {"inputs": []})["inputs"]
    found = [found for found in inputs if found["made_by"] == f"model.layers.0.{made_by}.weight"]
    if told is None:
        assert found == []
        return
    assert told in found[0]["note"]
    assert found[0]["ratio"] is None


def test_16_bit_experts_are_left_alone(tmp_path: Path) -> None:
    """Experts in one 3-D tensor that stays in 16 bit keep their input as it is."""
    folder = tiny_llama4(tmp_path / "model", experts=4)
    _walk(folder, {"scheme": "nvfp4a16", "solver": SMOOTH, "ignore": ["*.experts.*"]}, tmp_path / "walk")
    found = [found for found in _inputs(tmp_path / "walk") if "post_attention" in found["made_by"]]
    assert len(found) == 2
    assert all("stays in 16 bit" in each["note"] for each in found)


@pytest.mark.parametrize("name", ["gemma2", "stablelm", "qwen3_next", "phi3"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Norms that add one, norms with biases, linear attention, fused matrices: INT8 computes the same.

    Against the same walk without smoothing, whose error is INT8's own.
    """
    folder = FAMILIES[name](tmp_path / "model")
    errors = []
    for solver in ("rtn", SMOOTH):
        target = tmp_path / str(solver)[:5]
        claims = _walk(folder, {"scheme": "int8", "solver": solver}, target)
        errors.append(_shards_divergence(folder, claims, target, tmp_path / f"{target.name}-made"))
    assert any(found["ratio"] for found in _inputs(tmp_path / str(SMOOTH)[:5]))
    assert errors[1] < 2.5 * errors[0] < 1e-2


@torch.no_grad()
def _shards_divergence(folder: Path, claims: list[Claim], target: Path, made: Path) -> float:
    """As ``_divergence``, with decoded matrices in a copy of the source's folder."""
    shutil.copytree(folder, made)
    walked, tensors = WalkedTensors(target), load_file(folder / "model.safetensors")
    for claim in claims:
        tensor = tensors[claim.tensor.name]
        changed = walked.changed(claim.tensor.name) if claim.scheme is None else None
        if changed is not None:
            tensor.copy_(changed)
        for part in claim.role.parts if claim.scheme is not None else ():
            if part.module in walked:
                assert claim.scheme is not None
                decoded_OI = claim.scheme.decode(
                    walked.local(part.module), part.out_features, part.in_features
                )
                part_view(tensor, part).copy_(decoded_OI)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(9))
    wanted, logits = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
        for path in (folder, made)
    )
    return float((logits - wanted).square().sum() / wanted.square().sum())
