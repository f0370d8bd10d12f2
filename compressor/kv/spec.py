"""What is asked of the KV cache, as stages are told it. Importing this does not import torch: for plans."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.kv.base import Tier
from compressor.kv.formats import FORMATS

AUTO = "auto"


@dataclass(frozen=True)
class KvSpec:
    """How the cache of a model is to be stored.

    Attributes:
        format: a name of ``kv.formats.FORMATS`` for every layer that can hold it, or ``auto``: chosen layer
            by layer under ``budget_bytes_per_token``.
        tier: who must be able to serve the choice. ``vllm``: one format and a list of skipped layers;
            ``own``: any format in each layer; ``research``: fitted codecs.
        budget_bytes_per_token: what one token may take in all full-attention layers and KV heads together, as
            stored, scales and norms and layers kept in 16 bit included; None where ``format`` decides.
        fold: whether what can be folded into weights is.
        calibrate: whether scales and codecs are fitted to texts.
        sink_tokens: the first tokens of a sequence stay in 16 bit (own cache only); not part of the budget,
            because their bytes do not grow.
        recent_tokens: so do the last ones.
        unpaged: formats that vLLM does not start with for this model; not chosen for tier ``vllm``.
    """

    format: str
    tier: Tier
    budget_bytes_per_token: int | None = None
    fold: bool = True
    calibrate: bool = True
    sink_tokens: int = 0
    recent_tokens: int = 0
    unpaged: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether formats are chosen, or codecs fitted, by errors on texts."""
        return self.format == AUTO or FORMATS[self.format].make is None
