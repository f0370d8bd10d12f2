"""compressed-tensors: the dialect that schemes speak themselves, described by its own library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.checkpoint.hf_config import quantization_config
from compressor.dialects.base import Description, Dialect, Modules
from compressor.model.names import expert_patterns
from compressor.schemes.base import Scheme
from compressor.spec import LinearPart, TensorHeader

if TYPE_CHECKING:
    import torch


class CompressedTensors(Dialect):
    """vLLM, SGLang, transformers and TGI read it."""

    name = "compressed-tensors"

    def problem(self, scheme: Scheme) -> str | None:
        """None: a scheme is described by this library (``Scheme.ct_scheme``)."""
        return None

    def outputs(self, scheme: Scheme, part: LinearPart, *, dtype: str) -> tuple[TensorHeader, ...]:
        """See ``Dialect.outputs``."""
        return scheme.outputs(part.module, part.out_features, part.in_features, dtype=dtype)

    def spell(self, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are."""
        return tensors

    def describe(self, modules: Modules) -> Description:
        """``quantization_config`` as ``checkpoint.hf_config`` builds it; no further files."""
        # vLLM maps the names that a checkpoint has, plain ones only; transformers matches its own modules'.
        config = quantization_config(
            {scheme: modules.with_aliases(names) for scheme, names in modules.by_scheme.items()},
            modules.with_aliases(modules.left_16bit),
            modules.ends,
            exact=modules.renamed,
            # vLLM may rename plain names of experts to others than it asks for (gpt_oss.py: down_proj).
            ignored=[
                entry
                for exact in ((True, False) if modules.renamed else (False,))
                for entry in expert_patterns(modules.fused_experts, exact=exact)
            ],
        )
        return Description(config, {})

    def kv_scales(self, attention: str) -> tuple[str, str]:
        """``k_scale`` and ``v_scale`` of the module itself."""
        return f"{attention}.k_scale", f"{attention}.v_scale"

    def with_fp8_cache(self, described: Description, attentions: Sequence[str]) -> Description:
        """``kv_cache_scheme``: symmetric 8-bit floating point, static, one scale a tensor."""
        from compressed_tensors.quantization import QuantizationArgs

        scheme = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
        config = {**described.quantization_config, "kv_cache_scheme": scheme.model_dump(mode="json")}
        return Description(config, described.files)
