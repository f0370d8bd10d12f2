"""One format for scripts/kv_serving.py, in vLLM's own environment; imports nothing of this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

task = json.loads(Path(sys.argv[1]).read_text())
ids_ST = task["ids"]
llm = LLM(
    task["model"],
    dtype=task["dtype"],
    kv_cache_dtype=task["format"],
    kv_cache_memory_bytes=task["kv_bytes"],
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=2 * len(ids_ST[0]),
    max_num_seqs=len(ids_ST),
    # One token of a prompt a step: every read is from the cache.
    enable_chunked_prefill=True,
    long_prefill_token_threshold=1,
    max_num_batched_tokens=max(2048, 2 * len(ids_ST[0])),
    enable_prefix_caching=False,
    seed=0,
)
prompts = [{"prompt_token_ids": ids} for ids in ids_ST]
asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
scored = [
    found[token].logprob
    for ids, answer in zip(ids_ST, llm.generate(prompts, asked, use_tqdm=False), strict=True)
    for token, found in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
]
Path(task["answer"]).write_text(json.dumps({"nll": -sum(scored) / len(scored), "scored": len(scored)}))
