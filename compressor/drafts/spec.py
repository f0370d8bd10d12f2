"""What is asked of a draft, as stages are told it. Importing this does not import torch: for plans."""

from __future__ import annotations

from typing import Literal

# ``native``: prediction layers that the checkpoint has; ``eagle3``: a trained head; ``draft_model``: a
# smaller model of the same vocabulary.
Kind = Literal["native", "eagle3", "draft_model"]
# Logits that exist at once while a new head is trained: 32 MB or 1 GB in fp32.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**28}
