"""The two ends of a language model, embeddings and output head: when they are one, what may be stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from compressor.model.families.naming import LM_HEADS, leaf, text_config
from compressor.spec import Role, TensorHeader


def tied(config: dict[str, Any], headers: Iterable[str]) -> bool:
    """Whether the output head is the input embedding.

    ``tie_word_embeddings`` decides where config.json has it, the text config's before the outer one (when it
    is true an engine ignores a stored head); without the key, a checkpoint that stores no head must be tied.
    ``headers``: the tensor names.
    """
    for found in (text_config(config).get("tie_word_embeddings"), config.get("tie_word_embeddings")):
        if isinstance(found, bool):
            return found
    return not any(
        name.endswith(".weight") and leaf(name.removesuffix(".weight")) in LM_HEADS for name in headers
    )


class Storage(Protocol):
    """What must be known of a weight scheme here: its name and the tensors that it writes."""

    @property
    def label(self) -> str:
        """The scheme's conventional name."""
        ...

    def outputs(self, module: str, out_features: int, in_features: int) -> tuple[TensorHeader, ...]:
        """The tensors written for one matrix."""
        ...


def embedding_problem(role: Role, scheme: Storage, *, tied: bool) -> str | None:
    """Why vLLM 0.32 could not load an embedding or output head stored so, or None.

    A head is loaded as any linear layer. An embedding is looked up from packed integers only
    (compressed_tensors.py ``get_quant_method``; its kernel has no zero points). A tied pair is one tensor
    that would have to be both, and the lookup method has no matrix product.

    Args:
        role: of the tensor; ``linear`` and ``other`` have no problem here.
        scheme: how it would be stored.
        tied: whether embedding and head are one tensor (``tied`` of the checkpoint).
    """
    if role.kind not in ("embedding", "lm_head"):
        return None
    if tied:
        return (
            f"the embedding and the output head are one tensor, which engines cannot read as {scheme.label}: "
            "leave both in 16 bit"
        )
    if role.kind == "embedding" and not _packed_integers(role, scheme):
        return (
            f"engines look embeddings up from symmetric weight-only integers only, not from {scheme.label}: "
            "leave it in 16 bit or use weight-only INT8 or INT4"
        )
    return None


def _packed_integers(role: Role, scheme: Storage) -> bool:
    """Whether the scheme writes ``pack-quantized`` without zero points: int32 words, no zero-point tensor."""
    written = {
        output.name.rpartition(".")[2]: output.dtype
        for part in role.parts
        for output in scheme.outputs(part.module, part.out_features, part.in_features)
    }
    return written.get("weight_packed") == "I32" and "weight_zero_point" not in written
