"""Costs of options: against a whole model with autograd, against the KL divergence itself, and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.model.load import load_source_model
from compressor.planner.budgeted import BudgetPlan
from compressor.progress import Silent
from compressor.solvers import parse_solver
from compressor.stages.budget_spec import SensitivityJob
from compressor.stages.budget_values import quantized
from compressor.stages.sensitivity import cache_name, measured_costs, sensitivity_stage
from compressor.stages.tokens import calibration_tokens
from tests.tiny import tiny_llama

ROWS, LENGTH = 16, 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three blocks."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, layers=3, hidden=64, intermediate=128)


@pytest.fixture(scope="module")
def job(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SensitivityJob:
    """All groups of it, in fp32, with a format of the KV cache."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "shown.txt").write_text("".join(f"{n} wizards jump over {n * n} boxes. " for n in range(400)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {source}}}\n"
        "weights: {scheme: auto, budget: {bits_per_target_weight: 6}, candidates: [nvfp4a16, int8, copy]}\n"
        f"calibration: {{datasets: [{{path: {folder / 'shown.txt'}}}], num_samples: {ROWS}, "
        f"sequence_length: {LENGTH}}}\nevaluate: null\n"
    )
    budget = compressor.plan(recipe, output=folder / "out").budget
    assert isinstance(budget, BudgetPlan)
    walk = replace(budget.job.walk, dtype="float32", batch_tokens=2 * LENGTH)
    return replace(budget.job, walk=walk, caches=("bf16", "fp8_per_token_head", "int4_per_token_head"))


@pytest.fixture(scope="module")
def folder(source: Path, job: SensitivityJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished stage."""
    folder = tmp_path_factory.mktemp("stage")
    sensitivity_stage(FolderSource(source), job, folder, Silent())
    return folder


def _changed(source: Path, job: SensitivityJob, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Group -> weight's name -> values under an option, solved without any stage."""
    given, solver = FolderSource(source), parse_solver("rtn")
    found = {}
    for group in job.groups:
        option = next(option for option in group.options if option.name == name)
        assert option.scheme is not None
        claims = quantized(group, option, solver)
        importance = None
        norm = claims[0].role.input_norm
        if norm is not None:
            moment = given.read(norm.tensor).float() ** 2
            importance = moment.clamp(min=1e-3 * float(moment.max()))
        weights = [given.read(claim.tensor.name) for claim in claims]
        together = [weights] if option.scheme.shares_tensor_scale else [[weight] for weight in weights]
        solved = [
            result.tensors
            for matrices in together
            for result in solver.solve(matrices, option.scheme, importance)
        ]
        found[group.name] = {
            claim.tensor.name: option.scheme.decode(tensors, *claim.tensor.shape)
            for claim, tensors in zip(claims, solved, strict=True)
        }
    return found


def test_costs_are_those_of_autograd_on_the_whole_model(
    source: Path, job: SensitivityJob, folder: Path
) -> None:
    """The same labels, gradients at the layers' outputs, and changes there, without tape or blocks."""
    model = load_source_model(FolderSource(source), torch.float32)
    ids = calibration_tokens(FolderSource(source), job.calibration, folder, Silent()).ids_NT[: job.heard]
    draw = torch.Generator().manual_seed(job.seed)
    layers, seen = model.model.layers, {}

    def keep(index: int, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        assert isinstance(tensor, torch.Tensor)
        if tensor.requires_grad:
            tensor.retain_grad()
        seen[index] = tensor

    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, index=index: keep(index, output))
    outputs, gradients = [], []
    for row in ids:
        logits = model(row[None], use_cache=False).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        outputs.append({index: tensor.detach() for index, tensor in seen.items()})
        gradients.append({index: tensor.grad for index, tensor in seen.items()})
    parameters, costs = dict(model.named_parameters()), measured_costs(folder)
    for name in ("nvfp4a16", "int8"):
        for group, weights in _changed(source, job, name).items():
            index = int(group.split(".")[2])
            before = {weight: parameters[weight].data for weight in weights}
            for weight, values in weights.items():
                parameters[weight].data = values
            total = 0.0
            with torch.no_grad():
                for row, kept, gradient in zip(ids, outputs, gradients, strict=True):
                    model(row[None], use_cache=False)
                    moved = ((seen[index] - kept[index]) * gradient[index]).sum(-1)
                    total += float(moved.square().sum())
            for weight, values in before.items():
                parameters[weight].data = values
            found = costs[group]
            assert found is not None
            # Sums of fp32 in another order.
            assert found[name] == pytest.approx(0.5 * total / ids.numel(), rel=1e-3)


def test_costs_rank_groups_as_the_divergence_does(source: Path, job: SensitivityJob, folder: Path) -> None:
    """Each group alone in NVFP4: cost against KL(source || changed) on other text, no tape in between."""
    model = load_source_model(FolderSource(source), torch.float32)
    ids = calibration_tokens(FolderSource(source), job.calibration, folder, Silent()).ids_NT[job.heard :]
    parameters, costs = dict(model.named_parameters()), measured_costs(folder)
    predicted, measured = [], []
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.log_softmax(-1)
        for group, weights in _changed(source, job, "nvfp4a16").items():
            before = {weight: parameters[weight].data for weight in weights}
            for weight, values in weights.items():
                parameters[weight].data = values
            other = model(ids, use_cache=False).logits.log_softmax(-1)
            measured.append(float((plain.exp() * (plain - other)).sum(-1).mean()))
            for weight, values in before.items():
                parameters[weight].data = values
            found = costs[group]
            assert found is not None
            predicted.append(found["nvfp4a16"])
    # 256 drawn labels: the sums agree to some tens of percent, groups differ by more than tenfold.
    assert max(measured) > 10 * min(measured)
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.9
    assert 0.5 < sum(predicted) / sum(measured) < 2.0


def test_caches_cost_more_the_fewer_bits_they_have(job: SensitivityJob, folder: Path) -> None:
    """Of every block; 16 bit costs nothing."""
    costs = measured_costs(folder)
    for layer in range(3):
        found = costs[cache_name(layer)]
        assert found is not None
        assert found["int4_per_token_head"] > found["fp8_per_token_head"] > found["bf16"] == 0


class _Interrupting(Silent):
    """Stops when a block's options are tried."""

    def __init__(self, block: str) -> None:
        self._block, self._stage = block, ""

    def start(self, stage: str, total: int, unit: object, done: int = 0) -> None:
        self._stage = stage

    def advance(self, amount: int, note: str = "") -> None:
        if (self._stage, note) == ("options", self._block):
            raise KeyboardInterrupt


@pytest.mark.parametrize("states", ["host", "disk"])
def test_goes_on_where_it_was_stopped(
    states: str, source: Path, job: SensitivityJob, folder: Path, tmp_path: Path
) -> None:
    """With the same costs; hidden states on the disk change nothing and leave nothing."""
    assert states in ("host", "disk")
    asked = replace(job, walk=replace(job.walk, states=states))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        sensitivity_stage(FolderSource(source), asked, tmp_path, _Interrupting("model.layers.1"))
    done = sorted(path.name for path in tmp_path.glob("costs-*.json"))
    assert done == ["costs-00001.json", "costs-00002.json"]
    facts = sensitivity_stage(FolderSource(source), asked, tmp_path, Silent())
    assert facts["resumed"]
    assert measured_costs(tmp_path) == measured_costs(folder)
    assert not list(tmp_path.glob("*.tmp*"))
