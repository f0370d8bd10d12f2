"""Good checkpoints of every format, dialect and maker, each made once by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import compressor
from tests.e2e.cases import write_recipe
from tests.model.compressed import FORMATS, compress_folder, int4
from tests.tiny import tiny_llama, tiny_llama4

from .corrupt import Tensors, edit_config, rewrite
from .made import ALGORITHMS, llm_compressor, modelopt

RECIPES = {
    "nvfp4a16": "{scheme: nvfp4a16}",
    "mxfp4": "{scheme: mxfp4}",
    "fp8_dynamic": "{scheme: fp8_dynamic}",
    "fp8_block": "{scheme: fp8_block}",
    "int4": "{scheme: {kind: int4, group_size: 32}}",
    "int4_asym": "{scheme: {kind: int4, group_size: 64, symmetric: false}}",
    "int8": "{scheme: int8}",
    "int8_dynamic": "{scheme: {kind: int8, activations: dynamic}}",
    "mixed": "{scheme: nvfp4a16, rules: [{match: '*.down_proj.weight', scheme: fp8_dynamic}]}",
    "head": "{scheme: int8, rules: [{match: lm_head.weight, scheme: int8}]}",
}
LIBRARY = {
    "library_fp8_kv": ("FP8", "tensor"),
    "library_kv_heads": (None, "attn_head"),
    "library_nvfp4": ("NVFP4", None),
}
MIXED = "MIXED_PRECISION"
# W8A16 is a preset of groups, but made by hand with a scale for each row.
HAND_MADE = tuple(preset for preset in FORMATS if preset != "W8A16")
GOOD = (
    *RECIPES,
    *LIBRARY,
    *(f"hand_{preset}" for preset in HAND_MADE),
    *(f"modelopt_{algo}" for algo in (*ALGORITHMS, MIXED, "kv")),
    *("embedding", "dense", "shards", "tied", "moe", "tied_int8", "moe_nvfp4", "moe_left", "moe_fused"),
)


def zoo(root: Path) -> Callable[[str], Path]:
    """Gives the folder of a name in ``GOOD``, made under ``root`` when it is first asked for.

    Whoever changes a folder must copy it first.
    """
    dense = tiny_llama(root / "dense", hidden=128, intermediate=256, heads=2, kv_heads=2)
    makers: dict[str, Callable[[Path], object]] = {
        "dense": partial(shutil.copytree, dense),
        "shards": lambda folder: tiny_llama(folder, hidden=128, intermediate=256, shards=3),
        "tied": lambda folder: tiny_llama(folder, tie=True),
        "moe": lambda folder: tiny_llama4(folder, moe_step=2),
        "tied_int8": lambda folder: _run(tiny_llama(root / "tied", tie=True), RECIPES["int8"], folder),
        "moe_nvfp4": lambda folder: _run(tiny_llama4(root / "moe", shards=2), RECIPES["nvfp4a16"], folder),
        "moe_left": lambda folder: _run(
            tiny_llama4(root / "moe2"), "{scheme: nvfp4a16, ignore: ['*.layers.1.*experts*']}", folder
        ),
        "moe_fused": lambda folder: _fused(tiny_llama4(root / "moe3"), folder),
        "embedding": partial(_embedding, dense),
        "modelopt_kv": lambda folder: modelopt(dense, folder, "FP8", kv=True),
    }
    for name, weights in RECIPES.items():
        makers[name] = partial(_run, dense, weights)
    for name, how in LIBRARY.items():
        makers[name] = partial(_library, dense, how)
    for preset in HAND_MADE:
        makers[f"hand_{preset}"] = partial(_by_hand, dense, preset)
    for algo in (*ALGORITHMS, MIXED):
        makers[f"modelopt_{algo}"] = partial(_modelopt, dense, algo)

    def make(name: str) -> Path:
        folder = root / f"made-{name}"
        if not folder.exists():
            makers[name](folder)
        return folder

    return make


def _run(source: Path, weights: str, folder: Path) -> None:
    recipe = write_recipe(folder.with_suffix(".yaml"), source, weights)
    compressor.run(recipe, output=folder)


def _library(source: Path, how: tuple[str | None, str | None], folder: Path) -> None:
    llm_compressor(source, folder, *how)


def _by_hand(source: Path, preset: str, folder: Path) -> None:
    compress_folder(source, folder, preset)


def _embedding(source: Path, folder: Path) -> None:
    """The embedding in INT4 as well, named as a target since it is no linear layer."""
    compress_folder(source, folder, "W4A16")
    made, _ = int4(256, 128, symmetric=True)
    stored = {f"model.embed_tokens.{local}": tensor for local, tensor in made.items()}
    rewrite(folder, lambda tensors: _without_embedding(tensors) | stored)
    edit_config(
        folder,
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["targets"].append(
            "model.embed_tokens"
        ),
    )


def _without_embedding(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}


def _fused(source: Path, folder: Path) -> None:
    """All but the experts in FP8; those stay in one 16-bit tensor, ignored by the names of engines."""
    compress_folder(source, folder, "FP8_DYNAMIC")
    experts = [f"re:model\\.layers\\.{layer}\\.feed_forward\\.experts\\..*$" for layer in range(2)]
    edit_config(folder, lambda config: config["quantization_config"]["ignore"].extend(experts))


def _modelopt(source: Path, algo: str, folder: Path) -> None:
    modelopt(source, folder, algo)
