"""A dialect: how a checkpoint SPELLS what schemes store: tensor names and shapes, and the engine's config.

Importing a dialect must not import torch: the plan asks it for every tensor's header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.checkpoint.kept import KeptScheme
from compressor.schemes.base import Scheme
from compressor.spec import LinearPart, TensorHeader

if TYPE_CHECKING:
    import torch

DialectName = Literal["compressed-tensors", "modelopt"]


@dataclass(frozen=True)
class Modules:
    """Every module of a checkpoint that an engine could take for quantized, and what became of it.

    Attributes:
        by_scheme: scheme -> the modules stored so.
        left_16bit: linear modules that are not quantized, output head, routers and towers included.
        embeddings: embeddings that are not quantized.
        ends: which of the quantized modules are embeddings or output heads.
        aliases: module -> its names in transformers, where it renames those of checkpoints.
        fused_experts: tensors of experts that are copied as they are, all experts in one.
        renamed: whether engines rename modules on loading, as they do where there are towers.
    """

    by_scheme: Mapping[Scheme | KeptScheme, Sequence[str]]
    left_16bit: Sequence[str]
    embeddings: Sequence[str] = ()
    ends: frozenset[str] = frozenset()
    fused_experts: Sequence[str] = ()
    renamed: bool = False
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def with_aliases(self, modules: Sequence[str]) -> list[str]:
        """The modules by all of their names."""
        return [*modules, *(alias for module in modules for alias in self.aliases.get(module, ()))]


@dataclass(frozen=True)
class Description:
    """What a dialect writes beside the tensors.

    Attributes:
        quantization_config: that entry of config.json.
        files: further JSON files by name.
    """

    quantization_config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]


class Dialect(ABC):
    """Base of all dialects; they have no state."""

    name: ClassVar[DialectName]

    @abstractmethod
    def problem(self, scheme: Scheme) -> str | None:
        """Why the dialect cannot hold what the scheme stores (a clause), or None."""

    @abstractmethod
    def outputs(self, scheme: Scheme, part: LinearPart, *, dtype: str) -> tuple[TensorHeader, ...]:
        """The exact tensors written for one matrix; ``dtype`` is the source's, by its safetensors name."""

    @abstractmethod
    def spell(self, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Local name -> tensor as ``outputs`` lists them, from those of ``scheme.encode``."""

    @abstractmethod
    def describe(self, modules: Modules) -> Description:
        """The config of a checkpoint that holds these modules."""

    @abstractmethod
    def kv_scales(self, attention: str) -> tuple[str, str]:
        """Names of the static scales of keys and of values of an attention module."""

    @abstractmethod
    def with_fp8_cache(self, described: Description, attentions: Sequence[str]) -> Description:
        """The description of a checkpoint that has such scales for these attention modules."""

    def warnings(self, modules: Modules) -> list[str]:
        """What engines are known not to load of it, for the plan."""
        return []
