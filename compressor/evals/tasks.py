"""lm-eval tasks that run offline from shipped items. The only file that names ``lm_eval``, slow to import.

Legend: B sequences of a batch, T tokens of the longest, P scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from compressor.data import shipped_root
from compressor.errors import CheckpointError
from compressor.evals.base import TaskResult
from compressor.evals.head import plain_head
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

# Importing it warns and logs.
with quiet():
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

BATCH_TOKENS = 2048
LOGIT_BYTES = 256 * 2**20

# (context and continuation as text, context ids, continuation ids), as HFLM makes it.
Request = tuple[tuple[str, str], list[int], list[int]]
# Log-likelihood of the continuation in nats, and whether it is what greedy decoding gives.
Answer = tuple[float, bool]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, int | None],
    *,
    whose: str,
    progress: Progress,
) -> dict[str, TaskResult]:
    """The model on each task, zero-shot and without chat template, as lm-eval runs it by default.

    Args:
        model: on its device, in the dtype to compute in.
        tokenizer: the model's.
        tasks: shipped task (``SHIPPED_TASKS``) -> how many of its items to use, None for all.
        whose: ``source`` or ``result``, for progress and errors.
        progress: told the requests done.

    Raises:
        CheckpointError: a log-likelihood is NaN.
    """
    results = {}
    for name, limit in tasks.items():
        folder = shipped_root() / "calibration" / name
        with quiet():
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            scorer = _Scorer(model, tokenizer, f"{name} ({whose})", progress)
            found = evaluate(lm=scorer, task_dict=manager.load([name]), limit=limit, bootstrap_iters=0)
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = samples[0]["metrics"]
        correct = {metric: tuple(bool(sample[metric]) for sample in samples) for metric in metrics}
        results[name] = TaskResult(name, correct)
    return results


class _Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's model for transformers, but the vocabulary is projected only where it is scored.

    Same numbers as HFLM in the same dtype with ``softmax_dtype="float32"``; on a small model with a large
    vocabulary most of HFLM's time goes to logits of the context and of the padding, which it drops.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, progress: Progress
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32")
        self._label = label
        self._progress = progress

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        import torch

        self._progress.start(self._label, len(requests), "items")
        probe_T = torch.tensor(requests[0][1] + requests[0][2])
        if plain_head(self.model, probe_T):
            answers = self._score_in_batches(requests)
        else:
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        self._progress.finish()
        if any(total != total for total, _ in answers):
            raise CheckpointError(
                f"{self._label}: log-likelihoods are NaN",
                fix="its weights or scales are broken, or it needs a wider dtype",
            )
        return answers

    def _score_in_batches(self, requests: list[Request]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(requests)
        for batch in _batches([len(ctx) + len(cont) for _, ctx, cont in requests]):
            for index, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                answers[index] = answer
            self._progress.advance(len(batch))
        return [answer for answer in answers if answer is not None]

    def _score(self, requests: list[Request]) -> Iterator[Answer]:
        """One batch, padded on the right: causal models look left only, so no mask is needed."""
        import torch

        conts = [cont for _, _, cont in requests]
        # The last token is predicted, never read; too long requests lose tokens on the left, as in HFLM.
        rows = [(ctx + cont)[-(self.max_length + 1) : -1] for _, ctx, cont in requests]
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        with torch.inference_mode():
            hidden_BTD = self.model.get_decoder()(ids_BT, use_cache=False)[0]
            hidden_PD = torch.cat(
                [
                    hidden[len(row) - len(cont) : len(row)]
                    for hidden, row, cont in zip(hidden_BTD, rows, conts, strict=True)
                ]
            )
            target_P = torch.tensor([token for cont in conts for token in cont], device=self.device)
            logprob_P, greedy_P = self._score_positions(hidden_PD, target_P)
        sizes = [len(cont) for cont in conts]
        for logprob, greedy in zip(torch.split(logprob_P, sizes), torch.split(greedy_P, sizes), strict=True):
            yield float(logprob.double().sum()), bool(greedy.all())

    def _score_positions(
        self, hidden_PD: torch.Tensor, target_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [P] of each target, and whether it is the likeliest token [P]."""
        import torch

        head = self.model.get_output_embeddings()
        chunk = max(1, LOGIT_BYTES // (2 * 4 * head.weight.shape[0]))
        logprobs, greedy = [], []
        for hidden, target in zip(torch.split(hidden_PD, chunk), torch.split(target_P, chunk), strict=True):
            logprob_PV = head(hidden).log_softmax(-1, dtype=torch.float32)
            logprobs.append(logprob_PV.gather(1, target[:, None])[:, 0])
            greedy.append(logprob_PV.argmax(-1) == target)
        return torch.cat(logprobs), torch.cat(greedy)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by falling length, in batches of at most ``BATCH_TOKENS`` padded tokens (or one sequence)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        take = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:take]
        order = order[take:]
