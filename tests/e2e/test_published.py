"""Checkpoints named as published, end to end: every expert quantized, prediction layers carried, reloaded.

The reference of the reloaded model is the source with weights that are decoded here, from the stored codes
and the formats' definitions, and put into transformers' model matrix by matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.load import load_source_model
from compressor.progress import Silent
from compressor.stages.evaluate import reload
from tests.model.published import PUBLISHED

from .cases import content, write_recipe

TEXT = "Five wizards quickly jump over my boxed vintage. " * 40
# One scheme without data, and gptq in one that asks for the inputs of every matrix as well.
WEIGHTS = {"stream": "{scheme: nvfp4a16}", "walk": "{scheme: {kind: int8}, solver: gptq}"}
EXPERT = re.compile(r"\.experts\.")
PACKED = ".weight_packed"
BEHIND_THE_LAST = ("glm4_moe", "deepseek_v3")
FP4_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and its tiny model."""
    return request.param, PUBLISHED[request.param](tmp_path_factory.mktemp(request.param) / "model")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def is_draft(family: str, name: str) -> bool:
    """Whether a tensor is one of the prediction layer."""
    return name.startswith("mtp.") or (family in BEHIND_THE_LAST and ".layers.2." in name)


def decoded(module: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix of a module, fp32: E2M1 codes times block and global scale, or integers times row scales."""
    scale = tensors[f"{module}.weight_scale"].float()
    if f"{module}.weight_global_scale" not in tensors:
        packed_OW = tensors[f"{module}.weight_packed"]
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        bytes_OWB = (packed_OW[..., None] >> torch.tensor([0, 8, 16, 24])) & 255
        return (bytes_OWB.reshape(rows, -1)[:, :columns].float() - 128) * scale
    packed_OI = tensors[f"{module}.weight_packed"]
    codes_OI = torch.stack([packed_OI & 15, packed_OI >> 4], -1).flatten(1).int()
    values_OI = FP4_E2M1[codes_OI & 7] * torch.where(codes_OI > 7, -1.0, 1.0)
    block_OG = scale / tensors[f"{module}.weight_global_scale"].float()
    # The library rounds what it decodes of NVFP4 to bfloat16.
    return (values_OI * block_OG.repeat_interleave(16, dim=1)).bfloat16().float()


def reference(source: FolderSource, result: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The source's model with every quantized matrix replaced: experts' by their place in the parameter."""
    model = load_source_model(source, torch.float32)
    parameters = dict(model.named_parameters())
    modules = [name.removesuffix(PACKED) for name in result if name.endswith(PACKED)]
    halves = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
    with torch.no_grad():
        for module in modules:
            weight_OI = decoded(module, result)
            # As transformers 5.17 names modules in memory (conversion_mapping.py).
            path = module.replace("block_sparse_moe", "mlp").replace("model.language_model.", "model.")
            expert = re.match(r"(.*\.experts)\.(\d+)\.(\w+)$", path)
            if expert is None:
                parameters[f"{path}.weight"].copy_(weight_OI)
                continue
            kind = "gate_up_proj" if expert[3] in halves else "down_proj"
            place = parameters[f"{expert[1]}.{kind}"][int(expert[2])]
            start = halves.get(expert[3], 0) * len(weight_OI)
            place[start : start + len(weight_OI)].copy_(weight_OI)
    return model


def is_ignored(module: str, config: Mapping[str, Any]) -> bool:
    """As vLLM 0.32 matches a linear module (compressed_tensors/utils.py should_ignore_layer)."""
    return any(
        bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
        for entry in config["quantization_config"]["ignore"]
    )


@pytest.mark.parametrize("way", WEIGHTS)
def test_from_recipe_to_reloaded_checkpoint(published: tuple[str, Path], way: str, tmp_path: Path) -> None:
    """Claims, stream or walk with gptq, export, reload: the same logits; and the same files once more."""
    family, folder = published
    (tmp_path / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(tmp_path / "shown.txt"))
    rest = "evaluate: null\nexport: {max_shard_bytes: 40KB}"
    if way == "walk":
        rest += f"\ncalibration: {{datasets: [{{path: {shown}}}], num_samples: 6, sequence_length: 64}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, WEIGHTS[way], rest)
    made = compressor.run(recipe, output=tmp_path / "one" / "out")
    source, before, after = FolderSource(folder), stored(folder), stored(made.output)

    _check_files(folder, after, made.output)
    _check_carried(family, before, after, json.loads((made.output / "config.json").read_text()))
    if way == "walk":
        assert made.report.calibration is not None
        solved = {matrix.name: matrix.solver for matrix in made.report.calibration.matrices}
        assert solved.keys() == {name.removesuffix(PACKED) for name in after if name.endswith(PACKED)}
        assert "gptq" in solved.values()

    loaded = reload(made.output, source)
    ids = torch.arange(40).reshape(2, 20) * 5 % 250
    with torch.no_grad():
        found, expected = loaded.model(ids).logits, reference(source, after)(ids).logits
        plain = load_source_model(source, torch.float32)(ids).logits
    # fp32 on both sides from the same decoded values: nothing is left but the order of products.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - plain).norm()) > 1e-3 * float(plain.norm())

    if way == "walk":
        again = compressor.run(recipe, output=tmp_path / "two" / "out")
        assert content(again.output) == content(made.output)


class _Damaging(Silent):
    """Takes one tensor out of the shard that holds it when all shards are written."""

    def __init__(self, folder: Path, lost: str) -> None:
        self._folder, self._lost = folder, lost

    def finish(self, resumed: bool = False) -> None:
        for file in self._folder.rglob("*.safetensors"):
            tensors = load_file(file)
            if tensors.pop(self._lost, None) is not None:
                save_file(tensors, file)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("qwen3_5", "mtp.fc.weight"),
        ("qwen3_next", "mtp.layers.0.mlp.experts.3.up_proj.weight"),
        ("qwen3_next_fused", "mtp.layers.0.mlp.experts.down_proj"),
        ("glm4_moe", "model.layers.2.shared_head.norm.weight"),
        ("deepseek_v3", "model.layers.2.eh_proj.weight"),
    ],
)
def test_a_lost_prediction_tensor_fails_the_run(family: str, lost: str, tmp_path: Path) -> None:
    """A shard that has lost one on the way stops the run before anything is exported."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        PUBLISHED[family](tmp_path / "model"),
        "{scheme: nvfp4a16}",
        "evaluate: null",
    )
    output = tmp_path / "o" / "out"
    with pytest.raises(CheckpointError, match=f"not as the plan claimed them: {lost}"):
        compressor.run(recipe, output=output, progress=_Damaging(tmp_path / "o", lost))
    assert not output.exists()


def _check_files(folder: Path, after: Mapping[str, torch.Tensor], output: Path) -> None:
    """The index names every tensor; the source's config, the prediction layers' keys in it, is all there."""
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())


def _check_carried(
    family: str,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
) -> None:
    """Experts quantized, the rest bit for bit; the ignore list as an engine reads it."""
    quantized = {name.removesuffix(PACKED) for name in after if name.endswith(PACKED)}
    assert not any(is_ignored(module, config) for module in quantized)
    if family in ("jamba", "qwen3_5_moe"):  # whose names vLLM maps where they are plain
        patterns = {entry for entry in config["quantization_config"]["ignore"] if entry.startswith("re:")}
        assert patterns <= {r"re:mtp\.layers\.0\.mlp\.experts\..*$"}  # beside plain ones
    drafts = {name for name in before if is_draft(family, name)}
    assert bool(drafts) == (family not in ("mixtral", "qwen3_moe", "jamba"))
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if EXPERT.search(name) and name not in drafts:
            assert name not in after
            alone = [module]
            if tensor.dim() == 3:
                parent, _, kind = module.rpartition(".")
                halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                alone = [f"{parent}.{expert}.{half}" for expert in range(len(tensor)) for half in halves]
            assert quantized.issuperset(alone), name
        elif module not in quantized:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name
            if tensor.dim() == 2 and not name.endswith("model.embed_tokens.weight"):  # no Linear
                assert is_ignored(module, config), name
    for name in drafts:
        if before[name].dim() == 3:  # vLLM asks for the first expert's matrices
            first = name.rpartition(".")[0] + ".0"
            assert all(is_ignored(f"{first}.{kind}_proj", config) for kind in ("gate", "up", "down"))
