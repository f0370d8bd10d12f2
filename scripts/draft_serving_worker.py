"""One configuration for scripts/draft_serving.py, in vLLM's own environment; imports nothing of this package.

``draft_serving_worker.py ENGINE.json``: vllm.LLM's arguments. A line of JSON is written when it is loaded,
then one for each that is read: ``ids`` (prompts), ``concurrency``, ``new`` (tokens) -> ``wall_s``, ``ids``
(what was written), ``counts``: [drafts, accepted at each place], of each request at concurrency 1, else of
all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# What others print goes to the log.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

began = time.monotonic()
llm = vllm.LLM(**json.loads(Path(sys.argv[1]).read_text()))
engine = llm.llm_engine


def counted() -> list[int]:
    """Proposals so far, and how many stayed up to each place."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafts = metrics.get("vllm:spec_decode_num_drafts")
    accepted = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return [drafts.value if drafts else 0, *(accepted.values if accepted else [])]


def served(prompts: list[list[int]], concurrency: int, new: int) -> list[list[int]]:
    """What is written after each; a request that ends makes room for the next."""
    asked = vllm.SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    written: dict[str, list[int]] = {}
    sent = 0
    while len(written) < len(prompts):
        while sent < len(prompts) and sent - len(written) < concurrency:
            engine.add_request(str(sent), {"prompt_token_ids": prompts[sent]}, asked)
            sent += 1
        written |= {out.request_id: list(out.outputs[0].token_ids) for out in engine.step() if out.finished}
    while engine.has_unfinished_requests():
        engine.step()
    return [written[str(number)] for number in range(len(prompts))]


def measured(prompts: list[list[int]], concurrency: int, new: int) -> dict[str, object]:
    """See above; nothing but requests is timed."""
    wall_s, ids, counts = 0.0, [], []
    for part in [[prompt] for prompt in prompts] if concurrency == 1 else [prompts]:
        before, at = counted(), time.monotonic()
        ids += served(part, concurrency, new)
        wall_s += time.monotonic() - at
        counts.append([after - first for first, after in zip(before, counted(), strict=True)])
    return {"wall_s": wall_s, "ids": ids, "counts": counts}


config = engine.vllm_config
facts = {
    "vllm": vllm.__version__,
    "torch": torch.__version__,
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    "dtype": str(config.model_config.dtype).removeprefix("torch."),
    "compiled": int(config.compilation_config.mode or 0),
    "graphs": getattr(config.compilation_config.cudagraph_mode, "name", None),
    "start_s": time.monotonic() - began,
}
print(json.dumps(facts), file=answers, flush=True)
for line in sys.stdin:
    told = json.loads(line)
    print(json.dumps(measured(told["ids"], told["concurrency"], told["new"])), file=answers, flush=True)
