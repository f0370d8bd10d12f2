"""Structure: names, shapes, dtypes, config and scales of a checkpoint, from its files; no model is loaded.

Read as engines read them: compressed-tensors 0.19 and ModelOpt configs, the parameters of the model's own
class in transformers, fused layers as vLLM 0.32 fuses them.
"""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CheckpointError
from compressor.model.load import refuse_fetched_kernels
from compressor.progress import Progress
from compressor.verify.base import Check
from compressor.verify.structure.config import NotChecked, read_quant_config
from compressor.verify.structure.contents import Contents, open_contents, told
from compressor.verify.structure.expected import Expected, expected_tensors
from compressor.verify.structure.findings import Findings, skipped
from compressor.verify.structure.kv_scales import check_kv_cache
from compressor.verify.structure.modules import Module, known_modules
from compressor.verify.structure.quant_config import QuantConfig
from compressor.verify.structure.ranges import check_scales
from compressor.verify.structure.side_files import check_files, check_tokenizer
from compressor.verify.structure.tensors import check_group_sizes, check_shapes, check_tensors

_OF_WEIGHTS = ("tensors", "shapes", "scales", "kv_cache")


def check_structure(folder: Path, progress: Progress) -> list[Check]:
    """Every check that needs the files alone, in this order: ``files``, ``config``, ``tensors``, ``shapes``,
    ``scales``, ``kv_cache``, ``tokenizer``, ``manifest``.

    Memory stays at one tensor. What cannot be judged because an earlier check failed is ``skipped``.

    Raises:
        CheckpointError: there is no such folder, or a file became unreadable meanwhile.
    """
    stored, files = open_contents(folder)
    shards = len(set(stored.homes.values()))
    return [
        files.result(f"{len(stored.headers):,} tensors in {shards:,} file(s)"),
        *_check_weights(stored, progress),
        check_tokenizer(stored),
        check_files(stored, progress),
    ]


def _check_weights(stored: Contents, progress: Progress) -> list[Check]:
    """The checks of config and weights."""
    if stored.config is None or not stored.complete:
        what = "config.json" if stored.config is None else "the weight files"
        return [skipped(name, f"{what} cannot be read, see files") for name in ("config", *_OF_WEIGHTS)]
    config = Findings("config")
    try:
        # vLLM's fallback builds models with transformers, which would fetch and run such code.
        refuse_fetched_kernels(stored.config, "")
    except CheckpointError as error:
        config.add(told(error))
    try:
        quant = read_quant_config(stored, config)
    except NotChecked as error:
        return [skipped(name, str(error)) for name in ("config", *_OF_WEIGHTS)]
    if quant is None:
        reason = "how the weights are stored is unclear, see config"
        return [config.result(""), *(skipped(name, reason) for name in _OF_WEIGHTS)]
    expected = expected_tensors(stored.config, stored.headers)
    modules = known_modules(stored, expected, quant)
    check_group_sizes(modules, config)
    return [config.result(quant.label), *_check_tensors(stored, expected, modules, quant, progress)]


def _check_tensors(
    stored: Contents, expected: Expected, modules: list[Module], quant: QuantConfig, progress: Progress
) -> list[Check]:
    tensors, shapes, scales = Findings("tensors"), Findings("shapes"), Findings("scales")
    check_tensors(stored, expected, modules, quant, tensors)
    check_shapes(stored, expected, modules, shapes)
    count, matrices = check_scales(stored, modules, progress, scales)
    sane = f"{count:,} scales of {matrices:,} matrices are finite and of the size that models have"
    how = f"those of {expected.model}" if expected.model else f"told apart by name: {expected.inferred}"
    if expected.inferred:
        progress.warn(f"linear layers are {how}")
    return [
        tensors.result(f"{matrices:,} matrices quantized, as config.json says; layers {how}"),
        shapes.result("every shape follows from the config and the model" if expected.model else how),
        scales.result(sane if matrices else "no quantized weights, no scales"),
        check_kv_cache(stored, quant),
    ]
