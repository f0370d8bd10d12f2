"""lm-eval tasks on a model: from shipped items, or by any name that lm-eval knows, with items from the Hub.

Legend: B sequences of a batch, T tokens of the longest, P scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from compressor.data import shipped_root
from compressor.errors import CheckpointError, UserError
from compressor.evals.answers import Answers
from compressor.evals.base import SHIPPED_TASKS
from compressor.evals.harness import HFLM, VERSION, TaskManager, evaluate
from compressor.evals.head import plain_head
from compressor.evals.task_record import TaskResult
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

BATCH_TOKENS = 2048
LOGIT_BYTES = 256 * 2**20

# (context and continuation as text, context ids, continuation ids), as HFLM makes it.
Request = tuple[tuple[str, str], list[int], list[int]]
# Log-likelihood of the continuation in nats, and whether it is what greedy decoding gives.
Answer = tuple[float, bool]


def check_task(name: str, *, where: str = "") -> None:
    """Refuses a task that neither ships nor is one of lm-eval's; reads no items.

    Raises:
        UserError: naming those that are spelled alike.
    """
    if name in SHIPPED_TASKS or name in (known := _known().all_tasks):
        return
    near = difflib.get_close_matches(name, [*SHIPPED_TASKS, *known], n=4)
    raise UserError(
        f"unknown task {name!r}; shipped: {', '.join(SHIPPED_TASKS)}",
        where=where,
        fix=f"name it as lm-eval does{': ' + ', '.join(near) if near else ''}",
    )


def load_task(name: str, hub: Path) -> dict[str, Any]:
    """The task as lm-eval's ``evaluate`` takes it, its items read: those that do not ship from the Hub.

    Args:
        name: of a shipped task, or lm-eval's name of a task, group or tag.
        hub: folder that items are fetched to.

    Raises:
        UserError: no such task, its items cannot be fetched, or it runs code from the Hub or of the model's.
    """
    check_task(name)
    manager = _shipped(name) if name in SHIPPED_TASKS else _known()
    try:
        with quiet(), _fetched_to(hub), _no_fetched_code():
            found: dict[str, Any] = manager.load([name])
    except Exception as error:  # whatever the Hub's client, the network or a task's own code raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the task {name} cannot be prepared: {why}",
            fix=f"check the connection, or use a shipped task: {', '.join(SHIPPED_TASKS)}",
        ) from error
    if any(getattr(task, "UNSAFE_CODE", False) for task in found["tasks"].values()):
        raise UserError(f"the task {name} runs code that the model writes, which is not done here")
    return found


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, int | None],
    *,
    whose: str,
    progress: Progress,
    hub: Path,
    seeds: Sequence[int] = (0,),
    answers: Answers | None = None,
) -> dict[str, TaskResult]:
    """The model on each task as lm-eval runs it by default, without chat template.

    Args:
        model: on its device, in the dtype to compute in.
        tokenizer: the model's.
        tasks: task -> how many of its items to use (of each of a group's tasks), None for all.
        whose: ``source`` or ``result``, for progress and errors.
        progress: told the requests done.
        hub: folder that items of tasks which do not ship are fetched to.
        seeds: of few-shot examples and of sampled answers; only tasks that draw are run with each of them.
        answers: what the model answered before, or None to ask it always.

    Raises:
        CheckpointError: a log-likelihood is NaN.
        UserError: an unknown task, or one whose items cannot be fetched or asked.
    """
    results = {}
    for name, limit in tasks.items():
        scorer = _scorer(model, tokenizer, f"{name} ({whose})", progress, answers)
        runs = []
        for seed in seeds:
            described = load_task(name, hub)
            draws = _seed(described["tasks"].values(), seed)
            scorer.seed = seed if draws else None
            runs.append(_run(name, scorer, described, limit))
            if not draws:
                break
        results[name] = _averaged(runs)
    return results


def _scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    progress: Progress,
    answers: Answers | None,
) -> _Scorer:
    with quiet():
        return _Scorer(model, tokenizer, label, progress, answers)


def _run(name: str, scorer: _Scorer, described: dict[str, Any], limit: int | None) -> TaskResult:
    """One pass over the items; those of a group's tasks one after another."""
    try:
        with quiet(), _no_fetched_code():
            found = evaluate(lm=scorer, task_dict=described, limit=limit, bootstrap_iters=0)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        if name in SHIPPED_TASKS or isinstance(error, UserError):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the task {name} cannot be run here: {why}") from error
    scores: dict[str, list[float]] = {}
    lower: set[str] = set()
    for task, samples in found["samples"].items():
        better = described["tasks"][task].higher_is_better()
        first = samples[0]["filter"]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            # Filters read the same answers in other ways; the first is the task's own order.
            if sample["filter"] != first:
                continue
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], int | float):
                    scores.setdefault(metric, []).append(float(value))
                    lower |= set() if better.get(metric, True) else {metric}
    items = max(map(len, scores.values()), default=0)
    # Only what every item has can be compared in pairs.
    whole = {metric: tuple(values) for metric, values in scores.items() if len(values) == items}
    if not whole:
        raise UserError(f"the task {name} has no figure of single items, so that nothing can be compared")
    return TaskResult(name, whole, frozenset(lower & whole.keys()))


def _averaged(runs: Sequence[TaskResult]) -> TaskResult:
    """The same items asked several times: of each item the mean."""
    first = runs[0]
    if len(runs) == 1:
        return first
    scores = {
        metric: tuple(
            sum(values) / len(runs) for values in zip(*(run.scores[metric] for run in runs), strict=True)
        )
        for metric in first.scores
    }
    return TaskResult(first.name, scores, first.lower_is_better, seeds=len(runs))


def _seed(tasks: Iterable[Any], seed: int) -> bool:
    """Whether any of them draws few-shot examples or samples answers; it is seeded here."""
    import torch

    draws = False
    for task in tasks:
        if task.config.num_fewshot:
            task.set_fewshot_seed(seed=seed)
            draws = True
        draws |= bool((task.config.generation_kwargs or {}).get("do_sample"))
    torch.manual_seed(seed)
    return draws


@cache
def _known() -> Any:
    """Everything that lm-eval names; indexing takes seconds."""
    with quiet():
        return TaskManager()


def _shipped(name: str) -> Any:
    with quiet():
        folder = shipped_root() / "calibration" / name
        return TaskManager(include_path=str(folder), include_defaults=False)


@contextmanager
def _fetched_to(hub: Path) -> Iterator[None]:
    """lm-eval asks ``datasets`` for items without saying where they go."""
    import datasets
    from huggingface_hub import constants

    with (
        patch.object(datasets.config, "HF_DATASETS_CACHE", hub / "datasets"),
        patch.object(constants, "HF_HUB_CACHE", str(hub)),
    ):
        yield


@contextmanager
def _no_fetched_code() -> Iterator[None]:
    """Metrics that tasks load by name are Python files of the Hub, which are run as they are imported."""
    if find_spec("evaluate") is None:
        yield
        return

    def refused(path: str, *_: Any, **__: Any) -> None:
        raise UserError(f"its metric {path} is code from the Hub, which is not run here")

    with patch.object(import_module("evaluate.loading"), "evaluation_module_factory", refused):
        yield


class _Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's model for transformers, but the vocabulary is projected only where it is scored.

    Same numbers as HFLM in the same dtype with ``softmax_dtype="float32"``; on a small model with a large
    vocabulary most of HFLM's time goes to logits of the context and of the padding, which it drops.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: str,
        progress: Progress,
        answers: Answers | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32")
        self._label = label
        self._progress = progress
        self._answers = answers
        # Of sampled answers; None where nothing is drawn.
        self.seed: int | None = None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        # As the model reads it: the same words are other tokens to another tokenizer.
        asked = [[self.tok_encode(request.args[0]), *request.args[:2]] for request in requests]
        self._progress.start(self._label, len(requests), "items")
        made: list[str] = self._kept(
            "generate",
            [self.seed, asked],
            lambda: super(_Scorer, self).generate_until(requests, disable_tqdm=True),
        )
        self._progress.finish()
        return made

    def _kept(self, kind: str, asked: Any, compute: Callable[[], list[Any]]) -> list[Any]:
        if self._answers is None:
            return compute()
        # What lm-eval puts in the place of what a task leaves open differs by version.
        return self._answers.kept(f"{kind} of lm-eval {VERSION}", asked, compute)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        asked = [[context, continuation] for _, context, continuation in requests]
        self._progress.start(self._label, len(requests), "items")
        found = self._kept("loglikelihood", asked, lambda: self._loglikelihoods(requests))
        answers = [(float(total), bool(greedy)) for total, greedy in found]
        self._progress.finish()
        if any(total != total for total, _ in answers):
            raise CheckpointError(
                f"{self._label}: log-likelihoods are NaN",
                fix="its weights or scales are broken, or it needs a wider dtype",
            )
        return answers

    def _loglikelihoods(self, requests: list[Request]) -> list[Answer]:
        import torch

        probe_T = torch.tensor(requests[0][1] + requests[0][2])
        if plain_head(self.model, probe_T):
            return self._score_in_batches(requests)
        answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
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
