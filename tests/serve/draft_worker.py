"""For the interpreter that has vLLM: greedy tokens with and without a checkpoint's own prediction layer.

``draft_worker.py MODEL DRAFTED_TOKENS`` (0: none) prints a line of JSON: ``tokens``, the number ``drafted``,
and ``quantized``, the modules of the prediction layer that vLLM took for quantized.
"""

from __future__ import annotations

import json
import os
import sys

PROMPTS = [list(range(5, 60)), list(range(90, 40, -1))]


def main(model: str, drafted: int) -> None:
    """Loads the model, generates, prints."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    import vllm

    more = {"speculative_config": {"method": "mtp", "num_speculative_tokens": drafted}} if drafted else {}
    llm = vllm.LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2,
        disable_log_stats=False,
        enable_prefix_caching=False,
        **more,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    print(
        json.dumps(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in made],
                "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
                "quantized": _quantized(llm) if drafted else [],
            }
        )
    )


def _quantized(llm: object) -> list[str]:
    engine = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    worker = engine.model_executor.driver_worker
    drafter = getattr(worker, "worker", worker).model_runner.drafter.model
    methods = {name: getattr(module, "quant_method", None) for name, module in drafter.named_modules()}
    return [
        name
        for name, method in methods.items()
        if method is not None and not type(method).__name__.startswith("Unquantized") and ".attn" not in name
    ]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
