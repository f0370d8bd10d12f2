"""The modules of a checkpoint: what is stored of each, what it is in the model, how the config stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressor.model.families.naming import EMBEDDINGS, leaf
from compressor.spec import TensorHeader
from compressor.verify.structure.config import quantized_modules
from compressor.verify.structure.contents import Contents
from compressor.verify.structure.expected import LINEAR, Expected
from compressor.verify.structure.layouts import Layout
from compressor.verify.structure.quant_config import QuantConfig

_EMBEDDING = frozenset({"Embedding"})


@dataclass(frozen=True)
class Module:
    """One module that is quantized, or that could be.

    Attributes:
        name: in the checkpoint.
        tensors: local name -> header of what is stored of it.
        quantized: whether any of that is codes or scales.
        classes: names of its class and bases.
        shape: [out_features, in_features] by the model, or None where it does not say.
        layout: how the config stores it, or None for as it is.
    """

    name: str
    tensors: Mapping[str, TensorHeader]
    quantized: bool
    classes: frozenset[str]
    shape: tuple[int, int] | None
    layout: Layout | None

    def logical(self) -> tuple[int, int] | None:
        """[out_features, in_features] by the model, else by its codes; None if neither tells."""
        if self.shape is not None:
            return self.shape
        codes = self.tensors.get(self.layout.codes) if self.layout else None
        return self.layout.logical(codes) if self.layout and codes else None


def known_modules(stored: Contents, expected: Expected, quant: QuantConfig) -> list[Module]:
    """Every module that is quantized, and every linear layer and embedding of the model."""
    quantized = quantized_modules(stored)
    parts = {part.module: part for parts in expected.fused.values() for part in parts}
    written = {name for name in parts if f"{name}.weight" in stored.headers}
    modules = []
    for name in dict.fromkeys((*quantized, *expected.classes, *sorted(written))):
        classes = expected.classes.get(name) or (_EMBEDDING if leaf(name) in EMBEDDINGS else LINEAR)
        shape: tuple[int, ...] | None = expected.shapes.get(f"{name}.weight")
        if shape is None and name in parts:
            shape = (parts[name].out_features, parts[name].in_features)
        local = quantized.get(name, {"weight", "bias"})
        modules.append(
            Module(
                name=name,
                tensors={
                    one: stored.headers[f"{name}.{one}"]
                    for one in sorted(local)
                    if f"{name}.{one}" in stored.headers
                },
                quantized=name in quantized,
                classes=classes,
                shape=(shape[0], shape[1]) if shape is not None and len(shape) == 2 else None,
                layout=_layout(quant, [name, expected.aliases.get(name, name)], classes),
            )
        )
    return modules


def _layout(quant: QuantConfig, names: list[str], classes: frozenset[str]) -> Layout | None:
    """How a module of several names is stored: any of them may be ignored, and any targeted."""
    if any(quant.ignored(name, classes) is not None for name in names):
        return None
    return next((layout for name in names if (layout := quant.layout(name, classes)) is not None), None)
