"""Checks of names, dtypes and shapes: every tensor that config and model need is there, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from compressor.model.families.naming import fuse_group
from compressor.verify.structure.contents import Contents
from compressor.verify.structure.expected import EXPERTS, LINEAR, Expected, is_aside
from compressor.verify.structure.findings import Findings
from compressor.verify.structure.kv_scales import is_kv_scale
from compressor.verify.structure.layouts import CODE_DTYPES, MARKERS
from compressor.verify.structure.modules import Module
from compressor.verify.structure.quant_config import QuantConfig

# Scales of experts that stay in one 3-D tensor (ModelOpt's Llama 4).
_FUSED_SCALE = re.compile(r"_(weight_scale|weight_scale_2|input_scale)$")


def check_group_sizes(modules: Sequence[Module], found: Findings) -> None:
    """Adds where the number of scales in a row contradicts the config's group size."""
    for module in modules:
        layout, scale = module.layout, module.tensors.get("weight_scale")
        if layout is None or scale is None or layout.rows != 1 or not layout.columns:
            continue
        codes = module.tensors.get(layout.codes)
        logical = layout.logical(codes) if codes else None
        if logical is None or len(scale.shape) != 2:
            continue
        columns, groups = logical[1], scale.shape[1]
        if groups and groups != layout.grid(*logical)[1] and columns % groups == 0:
            found.add(
                f"{groups} scales for {columns} columns are groups of {columns // groups}, not of "
                f"{layout.columns} as config.json says: correct its group_size",
                f"{module.name}.weight_scale",
            )


def check_tensors(
    stored: Contents, expected: Expected, modules: Sequence[Module], quant: QuantConfig, found: Findings
) -> None:
    """Adds what is missing, left over, or quantized where the config says otherwise."""
    for module in modules:
        _check_module(module, quant, found)
    _check_fusions(modules, found)
    quantized = {module.name for module in modules if module.quantized}
    if expected.model:
        _check_missing(stored, expected, quantized, found)
        _check_extra(stored, expected, modules, quant, found)
    _check_fused(stored, expected, quant, found)


def check_shapes(stored: Contents, expected: Expected, modules: Sequence[Module], found: Findings) -> None:
    """Adds tensors whose dtype or shape does not follow from the model and the format."""
    quantized = set()
    for module in modules:
        if not module.quantized or module.layout is None:
            continue
        quantized.add(f"{module.name}.weight")
        logical = module.logical()
        if logical is None:
            _add_codes_fault(module, found)
            continue
        for local, slot in module.layout.slots(*logical).items():
            header = module.tensors.get(local)
            fault = slot.fault(header) if header else None
            if fault:
                found.add(
                    f"{fault}, which {module.layout.label} needs for a matrix of {list(logical)}: "
                    "export the checkpoint again",
                    f"{module.name}.{local}",
                )
    for name, shape in expected.shapes.items():
        header = stored.headers.get(name)
        if header is None or name in quantized or header.dtype in CODE_DTYPES:
            continue
        if header.shape != shape:
            found.add(
                f"{list(header.shape)} instead of {list(shape)}, the shape in {expected.model}: config.json"
                " and weights are not of one model",
                name,
            )


def _add_codes_fault(module: Module, found: Findings) -> None:
    layout = module.layout
    assert layout is not None, "only quantized modules have codes"
    codes = module.tensors.get(layout.codes)
    if codes is not None:
        found.add(
            f"{codes.dtype} {list(codes.shape)} are no codes of {layout.label}: export the checkpoint again",
            f"{module.name}.{layout.codes}",
        )


def _check_module(module: Module, quant: QuantConfig, found: Findings) -> None:
    """One module against what the config says of it."""
    layout = module.layout
    if layout is None:
        if module.quantized:
            _add_unclaimed(module, quant, found)
        return
    if not module.quantized:
        if "weight" in module.tensors:
            found.add(
                f"not quantized, though config.json says that it is ({layout.label}): name it in the ignore "
                "list, or engines look for its scales",
                module.name,
            )
        return
    slots = layout.slots(*(module.logical() or (0, 0)))
    for local, slot in slots.items():
        if slot.required and local not in module.tensors:
            found.add(
                f"missing, though config.json says that the module is stored as {layout.label}: export the "
                "checkpoint again, or correct config.json",
                f"{module.name}.{local}",
            )
    for local in module.tensors:
        if local not in slots and (local in MARKERS or local == "weight"):
            found.add(
                f"no tensor of {layout.label}: correct the format in config.json", f"{module.name}.{local}"
            )


def _check_fusions(modules: Sequence[Module], found: Findings) -> None:
    """Matrices that engines concatenate must be stored alike (vLLM 0.32 ``should_ignore_layer``)."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        group = fuse_group(module.name)
        if group is not None and module.tensors:
            groups.setdefault(group, []).append(module)
    for members in groups.values():
        members.sort(key=lambda member: member.name)
        labels = dict.fromkeys(member.layout.label if member.layout else "16 bit" for member in members)
        if len(labels) > 1:
            found.add(
                f"stored as {' and '.join(labels)}, but engines fuse them into one matrix: store them alike",
                *(member.name for member in members),
            )


def _add_unclaimed(module: Module, quant: QuantConfig, found: Findings) -> None:
    entry = quant.ignored(module.name, module.classes)
    if entry is not None:
        sentence = "quantized, though the ignore list of config.json names it: remove that entry"
    else:
        sentence = "quantized, but config.json does not say so: name it in the targets of its group"
    found.add(f"{sentence}, or engines load its codes as weights", module.name)


def _check_missing(stored: Contents, expected: Expected, quantized: set[str], found: Findings) -> None:
    """Parameters of the model that nothing in the checkpoint fills."""
    one_by_one = {match["experts"] for name in stored.headers if (match := EXPERTS.match(name))}
    other_names: dict[str, list[str]] = {}
    for name, other in expected.tied.items():
        other_names.setdefault(name, []).append(other)
        other_names.setdefault(other, []).append(name)
    for name in expected.shapes:
        if _present(name, stored, quantized):
            continue
        if any(_present(other, stored, quantized) for other in other_names.get(name, ())):
            continue
        if expected.missing_ok and expected.missing_ok.search(name):
            continue
        if expected.fused.get(name):
            absent = [
                f"{part.module}.weight"
                for part in expected.fused[name]
                if not _present(f"{part.module}.weight", stored, quantized)
            ]
            # All of them: the tensor itself is what is missing.
            missing = [name] if len(absent) == len(expected.fused[name]) else absent
        else:
            missing = [] if name.rpartition(".")[0] in one_by_one else [name]
        if missing:
            found.add(f"missing; {expected.model} needs it: copy or export the checkpoint again", *missing)


def _present(name: str, stored: Contents, quantized: set[str]) -> bool:
    return name in stored.headers or (name.endswith(".weight") and name.removesuffix(".weight") in quantized)


def _check_extra(
    stored: Contents, expected: Expected, modules: Iterable[Module], quant: QuantConfig, found: Findings
) -> None:
    """Tensors that the model has no place for: engines stop at them, or drop them silently."""
    if quant.extras:
        return
    config = stored.config or {}
    placed = {
        module.name
        for module in modules
        if module.shape is not None or (EXPERTS.match(module.name) and _experts_of(module.name, expected))
    }
    for name in stored.headers:
        module, _, local = name.rpartition(".")
        if name in expected.shapes or is_kv_scale(name) or (module in placed and _local(local)):
            continue
        if _FUSED_SCALE.sub("", name) in expected.fused:
            continue
        if expected.unneeded and expected.unneeded.search(name):
            continue
        if is_aside(name, config):
            continue
        found.add(f"{expected.model} has no place for it: config.json and weights are not of one model", name)


def _local(local: str) -> bool:
    return local in MARKERS or local == "weight"


def _experts_of(module: str, expected: Expected) -> bool:
    """Whether the model keeps these experts in 3-D tensors whose layout no family knows."""
    match = EXPERTS.match(module)
    prefix = f"{match['experts']}." if match else ""
    return any(name.startswith(prefix) and not parts for name, parts in expected.fused.items())


def _check_fused(stored: Contents, expected: Expected, quant: QuantConfig, found: Findings) -> None:
    """Experts left in one 16-bit tensor, of which an engine would look for the scales one by one."""
    for name, parts in expected.fused.items():
        header = stored.headers.get(name)
        if header is None or not parts or header.dtype in CODE_DTYPES:
            continue
        layout = quant.layout(parts[0].module, LINEAR)
        if layout is not None:
            found.add(
                f"experts that are not quantized, though config.json says that they are ({layout.label}):"
                " name them in the ignore list one by one, as engines ask for them",
                name,
            )
