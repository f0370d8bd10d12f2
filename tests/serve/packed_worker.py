"""Runs in the engine's environment: a model with a plan of its KV cache, scored and continued.

    python packed_worker.py MODEL PROMPTS.json OUT.json

PROMPTS.json: ``prompts``, lists of tokens; ``new``, tokens to make; ``engine``, arguments of ``vllm.LLM``.
OUT.json: the backend and the shape of each layer's cache; for each prompt its tokens' log-probabilities, the
tokens generated greedily and their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, asked_at: str, out_at: str) -> None:
    """Loads the model, generates, writes."""
    from vllm import LLM, SamplingParams

    asked = json.loads(Path(asked_at).read_text())
    llm = LLM(model, **asked["engine"])
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = {
        name: [type(layer.impl).__name__, layer.attn_backend.__name__, list(layer.kv_cache.shape)]
        for name, layer in layers.items()
        if hasattr(layer, "impl")
    }
    sampling = SamplingParams(
        temperature=0,
        max_tokens=asked["new"],
        ignore_eos=True,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
    )
    found = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False
    )
    results = []
    for prompt, answer in zip(asked["prompts"], found, strict=True):
        made = answer.outputs[0]
        results.append(
            {
                "prompt": [
                    scores[token].logprob
                    for token, scores in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
                ],
                "tokens": list(made.token_ids),
                "logprobs": [
                    scores[token].logprob for token, scores in zip(made.token_ids, made.logprobs, strict=True)
                ],
            }
        )
    Path(out_at).write_text(json.dumps({"caches": caches, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
