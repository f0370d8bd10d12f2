"""Blocks learned in the walk: nearer to the source on held-out tokens, resumed as a whole, or left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.checkpoint.folder import FolderSource
from compressor.numerics.row_weights import row_weights
from compressor.progress import Silent
from compressor.stages.receipts import BlockError, all_receipts
from compressor.stages.walk import WalkSpec, walk
from compressor.stages.walked import WalkedTensors, layer_name
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama, tiny_llama4

from .walking import SPEC, claims_of, some_tokens

ROWS, LENGTH = 24, 32
HELD = ROWS // 8


class _Told(Silent):
    """Keeps warnings; may interrupt at the ``stop``-th word from the training of block 1."""

    def __init__(self, stop: int = 0) -> None:
        self.warnings: list[str] = []
        self._left = stop

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, amount: int, note: str = "") -> None:
        if note.startswith("model.layers.1: step"):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks in fp32."""
    return tiny_llama(tmp_path_factory.mktemp("learn") / "model", layers=2, dtype=torch.float32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama 4 with experts in both blocks."""
    return tiny_llama4(tmp_path_factory.mktemp("learn-moe") / "model", experts=4)


def _learned(start: str = "rtn", steps: int = 40, **options: Any) -> dict[str, Any]:
    return {"kind": "learned", "start": start, "steps": steps, **options}


def _walk(
    model: Path,
    weights: dict[str, Any],
    target: Path,
    spec: WalkSpec = SPEC,
    progress: Silent | None = None,
    rows: int = ROWS,
) -> list[BlockError]:
    target.mkdir(exist_ok=True)
    source = FolderSource(model)
    walk(source, claims_of(source, weights), some_tokens(rows, LENGTH), spec, target, progress or Silent())
    return [BlockError(**found["block"]) for found in all_receipts(target) if "block" in found]


def _hashes(target: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(target.glob("layer-*.safetensors"))}


def _solvers(target: Path, index: int) -> set[str]:
    return {error["solver"] for error in all_receipts(target)[index]["errors"]}


@pytest.mark.parametrize(
    "scheme",
    [
        "nvfp4a16",
        "nvfp4",
        {"kind": "int4", "group_size": 32},
        {"kind": "int4", "group_size": 32, "symmetric": False},
        "mxfp4",
        "fp8_dynamic",
        "fp8_static",
    ],
    ids=str,
)
def test_blocks_come_nearer(folder: Path, tmp_path: Path, scheme: Any) -> None:
    """Of every family of schemes, with inputs that engines round and without."""
    blocks = _walk(folder, {"scheme": scheme, "solver": _learned()}, tmp_path / "walk")
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    for index, block in enumerate(blocks):
        assert block.tokens == HELD * LENGTH
        assert block.before is not None
        assert block.after is not None
        assert block.after <= block.before
        assert _solvers(tmp_path / "walk", index) == ({"learned"} if block.is_better else {"rtn"})
    assert any(block.is_better for block in blocks)


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_errors_are_those_of_the_block(folder: Path, tmp_path: Path, start: str) -> None:
    """Of block 0, before and after, measured again with transformers' model and hooks.

    The start solvers' own walk gives the values before. 1e-5: sums of a few thousand squares in fp32.
    """
    scheme = {"kind": "int4", "group_size": 32}
    block, _ = _walk(folder, {"scheme": scheme, "solver": _learned(start)}, tmp_path / "learned")
    _walk(folder, {"scheme": scheme, "solver": start}, tmp_path / "start")
    claims = claims_of(FolderSource(folder), {"scheme": scheme, "solver": start})
    for target, error in (("start", block.before), ("learned", block.after)):
        walked = WalkedTensors(tmp_path / target)
        values = {}
        for claim in claims:
            for part in claim.role.parts if claim.scheme is not None else ():
                if ".layers.0." in part.module and claim.scheme is not None:
                    tensors = walked.local(part.module)
                    values[part.module] = claim.scheme.decode(tensors, part.out_features, part.in_features)
        assert _block_error(folder, values) == pytest.approx(error, rel=1e-5)


@torch.no_grad()
def _block_error(folder: Path, values: dict[str, torch.Tensor]) -> float:
    """Relative error of block 0's output with other weights, on the last rows, batch by batch."""
    outputs = []
    for changed in ({}, values):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for module, weight_OI in changed.items():
            model.get_submodule(module).weight.copy_(weight_OI)
        states: list[torch.Tensor] = []
        model.model.layers[0].register_forward_hook(lambda _, __, made, states=states: states.append(made))
        for ids in torch.split(some_tokens(ROWS, LENGTH), 2):
            model(ids, use_cache=False)
        outputs.append(states)
    error = norm = 0.0
    for number, (target, made) in enumerate(zip(*outputs, strict=True)):
        weight_BT = row_weights(target.flatten(0, 1)).view(target.shape[:2])
        for row in range(2):
            if 2 * number + row >= ROWS - HELD:
                error += float(((made - target)[row].square().sum(-1) * weight_BT[row]).sum())
                norm += float((target[row].square().sum(-1) * weight_BT[row]).sum())
    return error / norm


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_experts_are_learned_together(moe: Path, tmp_path: Path, start: str) -> None:
    """Through the routed forward, with rounded inputs; same bytes wherever states wait."""
    weights = {"scheme": "nvfp4", "solver": _learned(start)}
    blocks = _walk(moe, weights, tmp_path / "one")
    assert all(block.after is not None and block.tokens for block in blocks)
    if start == "rtn":
        assert any(block.is_better for block in blocks)
    spec = replace(SPEC, states="disk", keep_inputs=False)
    assert _walk(moe, weights, tmp_path / "two", spec) == blocks
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_block_is_learned_anew(folder: Path, tmp_path: Path, stop: int) -> None:
    """Bit-identical, receipts and all; the finished block is not touched."""
    weights = {"scheme": "nvfp4a16", "solver": _learned()}
    whole = _walk(folder, weights, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, weights, tmp_path / "part", progress=_Told(stop))
    assert list(_hashes(tmp_path / "part")) == [layer_name(0)]
    assert _walk(folder, weights, tmp_path / "part") == whole
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "whole")
    assert all_receipts(tmp_path / "part") == all_receipts(tmp_path / "whole")


def test_only_what_asks_for_it_is_learned(folder: Path, tmp_path: Path) -> None:
    """Other matrices of the block keep their solver's values, blocks without any have no error."""
    scheme = {"kind": "int4", "group_size": 32}
    rules = [
        {"match": "*.layers.1.*_proj", "scheme": "nvfp4a16", "solver": "rtn"},
        {"match": "*.down_proj", "scheme": scheme, "solver": "rtn"},
    ]
    (block,) = _walk(folder, {"scheme": scheme, "solver": _learned(), "rules": rules}, tmp_path / "walk")
    assert block.is_better
    by_module = {
        error["module"]: error for found in all_receipts(tmp_path / "walk") for error in found["errors"]
    }
    learned = {module for module, error in by_module.items() if error["solver"] == "learned"}
    assert len(learned) == 6
    assert all(".layers.0." in module and "down_proj" not in module for module in learned)
    source = FolderSource(folder)
    claims = {claim.tensor.name: claim for claim in claims_of(source, {"scheme": scheme, "solver": "rtn"})}
    walked = WalkedTensors(tmp_path / "walk")
    for module in sorted(learned):
        claim = claims[f"{module}.weight"]
        assert claim.scheme is not None
        weight_OI = source.read(claim.tensor.name).float()
        decoded_OI = claim.scheme.decode(walked.local(module), *weight_OI.shape)
        expected = float((decoded_OI - weight_OI).double().square().sum())
        # the weight's error is that of what is stored, not of the start
        assert by_module[module]["squared_error"] == pytest.approx(expected, rel=1e-9)


def test_blocks_that_cannot_be_learned_are_named(folder: Path, tmp_path: Path) -> None:
    """Too little memory, or nothing to hold out: the start stays, with a warning, after a resume as well."""
    weights = {"scheme": "nvfp4a16", "solver": _learned()}
    _walk(folder, {"scheme": "nvfp4a16", "solver": "rtn"}, tmp_path / "rtn")
    for name, spec, rows, reason in (
        ("small", replace(SPEC, unlearned=(0, 1)), ROWS, "that would take 0.0 GB"),
        ("one", SPEC, 1, "two calibration sequences"),
    ):
        for _ in range(2):
            told = _Told()
            blocks = _walk(folder, weights, tmp_path / name, spec, told, rows)
            (warning,) = told.warnings
            assert reason in warning
            assert "model.layers.0, model.layers.1" in warning
            assert all(block.before is None and block.skipped for block in blocks)
    assert _solvers(tmp_path / "small", 0) == {"rtn"}
    stored = WalkedTensors(tmp_path / "small")
    expected = WalkedTensors(tmp_path / "rtn")
    module = "model.layers.1.mlp.down_proj"
    for local, tensor in expected.local(module).items():
        assert torch.equal(stored.local(module)[local].view(torch.uint8), tensor.view(torch.uint8))


def test_what_is_learned_depends_on_the_seed(folder: Path, tmp_path: Path) -> None:
    """And on nothing else."""
    found = []
    for name, seed in (("one", 0), ("two", 1), ("three", 0)):
        weights = {"scheme": "mxfp4", "solver": _learned(seed=seed)}
        _walk(folder, weights, tmp_path / name)
        found.append(_hashes(tmp_path / name))
    assert found[0] == found[2] != found[1]
