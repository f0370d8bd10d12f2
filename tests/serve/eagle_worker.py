"""For the interpreter that has vLLM: greedy tokens, and how many of a draft's each position got accepted.

``eagle_worker.py ASKED.json OUT.json``: ``model``, ``prompts`` (token ids), ``new`` (tokens), ``speculative``
(vLLM's ``speculative_config``, or null) -> ``tokens``, ``drafts``, ``accepted`` (by position).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(asked: Path, out: Path) -> None:
    """Loads the model, generates, writes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import vllm

    told = json.loads(asked.read_text(encoding="utf-8"))
    more = {"speculative_config": told["speculative"]} if told["speculative"] else {}
    llm = vllm.LLM(
        told["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=told["longest"],
        max_num_seqs=4,
        disable_log_stats=False,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **more,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=told["new"], ignore_eos=True, detokenize=False)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in told["prompts"]], sampling)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafts = metrics.get("vllm:spec_decode_num_drafts")
    accepted = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in made],
        "drafts": drafts.value if drafts else 0,
        "accepted": list(accepted.values) if accepted else [],
    }
    out.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
