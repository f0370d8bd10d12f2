"""lm-eval tasks that run offline: from shipped items, and RULER's, which make their own data.

The only file that names ``lm_eval``, slow to import.

Legend: B sequences of a batch, T tokens of the longest, P scored positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from compressor.data import shipped_root
from compressor.errors import CheckpointError, UserError
from compressor.evals.base import TaskResult
from compressor.evals.head import plain_head
from compressor.evals.long_record import RulerScore
from compressor.evals.long_spec import check_ruler, missing_packages
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


# How lm-eval's YAML files of RULER (tasks/ruler) differ: most tokens of an answer, and what is before the
# words that an answer begins with.
_RULER_ANSWERS = {
    "niah_single_1": (128, " "),
    "niah_multikey_2": (128, " "),
    "niah_multikey_3": (128, " "),
    "ruler_vt": (30, " "),
    "ruler_cwe": (120, "\n\n"),
    "ruler_fwe": (50, " "),
}
_NIAH = {
    "niah_single_1": ("repeat", "words", "numbers"),
    "niah_multikey_2": ("needle", "words", "numbers"),
    "niah_multikey_3": ("needle", "uuids", "uuids"),
}


def run_ruler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    tokens: int,
    limit: int,
    seed: int,
    whose: str,
    progress: Progress,
) -> RulerScore:
    """The model on a RULER task (arXiv 2404.06654) as lm-eval words and scores it: greedy, no chat template.

    lm-eval would make 500 samples, whatever the limit, with a tokenizer that it loads by name and trusts:
    here its functions make ``limit`` of them, with the model's own.

    Args:
        model: on its device, in the dtype to compute in; no length is refused that it computes.
        tokenizer: the model's.
        task: of ``long_spec.RULER_TASKS``.
        tokens: the most that a prompt and its answer may have.
        limit: how many samples.
        seed: of the samples: the same for source and result.
        whose: ``source`` or ``result``, for progress.
        progress: told the samples done.

    Raises:
        UserError: the task cannot be run, or a sample does not fit in ``tokens``.
    """
    if reason := check_ruler(task):
        raise UserError(reason)
    if missing := missing_packages(task):
        raise UserError(f"{task} needs the package {', '.join(missing)}, which is not installed")
    progress.start(f"{task} {tokens:,} ({whose})", limit, "items")
    with quiet():
        samples = ruler_samples(task, tokenizer, tokens=tokens, count=limit, seed=seed)
        manager = TaskManager(include_defaults=False)
        described = manager.load([_ruler_task(task, tokens, samples)])
        answerer = _Answerer(model, tokenizer, tokens, progress)
        found = evaluate(lm=answerer, task_dict=described, bootstrap_iters=0)
    progress.finish()
    scores = [sample[str(tokens)] for sample in found["samples"][task]]
    return RulerScore(task=task, tokens=tokens, samples=len(scores), score=sum(scores) / len(scores))


def ruler_samples(
    task: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """``count`` samples as lm-eval's functions make them of a seed.

    Raises:
        UserError: none fits in ``tokens``.
    """
    with _offline(), _seeded(seed), redirect_stdout(StringIO()):
        try:
            if task in _NIAH:
                return _niah(task, tokenizer, tokens, count)
            if task == "ruler_vt":
                return _variables(tokenizer, tokens, count)
            if task == "ruler_cwe":
                return _common_words(tokenizer, tokens, count, seed)
            return _frequent_words(tokenizer, tokens, count)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{task}: no sample of {tokens} tokens can be made: {error}") from error


def _niah(task: str, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    haystack, keys, values = _NIAH[task]
    made: list[dict[str, Any]] = generate_samples(
        get_haystack(type_haystack=haystack),
        TOKENIZER=tokenizer,
        max_seq_length=tokens,
        template=TEMPLATE,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v=values,
        num_samples=count,
    )
    return made


def _check_fits(tokenizer: PreTrainedTokenizerBase, text: str, more: int, most: int) -> None:
    """Of the smallest sample: lm-eval tries for ever where it does not fit; names and words differ a little.

    Raises:
        ValueError: it does not, or hardly.
    """
    needed = round(1.1 * (len(tokenizer(text).input_ids) + more))
    if needed > most:
        raise ValueError(f"the shortest one takes about {needed} tokens of {most}")


def _variables(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.vt_utils import generate_input_output
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random as make

    answer, of_example = _RULER_ANSWERS["ruler_vt"][0], 500
    with _seeded(0):
        _check_fits(tokenizer, generate_input_output(5, 1, 4, is_icl=True)[0], answer, of_example)
        _check_fits(tokenizer, generate_input_output(10, 1, 4)[0], answer + of_example, tokens)
    (example,) = make(tokenizer=tokenizer, num_samples=1, max_seq_length=of_example, incremental=5)
    made: list[dict[str, Any]] = make(
        tokenizer=tokenizer, num_samples=count, max_seq_length=tokens, icl_example=example
    )
    return made


def _common_words(
    tokenizer: PreTrainedTokenizerBase, tokens: int, count: int, seed: int
) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler import cwe_utils

    with _seeded(0):
        shortest = "".join(cwe_utils.generate_input_output(10, tokens)[:2])
        _check_fits(tokenizer, shortest, _RULER_ANSWERS["ruler_cwe"][0], tokens)
    cwe_utils.RNG.seed(seed)  # of the module, which each sample moves on
    made: list[dict[str, Any]] = cwe_utils.sys_word_pair_random(
        num_samples=count, max_seq_length=tokens, tokenizer=tokenizer
    )
    return made


def _frequent_words(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.fwe_utils import TEMPLATE, sys_kwext

    _check_fits(tokenizer, TEMPLATE, _RULER_ANSWERS["ruler_fwe"][0], tokens)
    made: list[dict[str, Any]] = sys_kwext(tokenizer=tokenizer, max_seq_length=tokens, num_samples=count)
    return made


def _ruler_task(task: str, tokens: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's description of the task, with samples of our own."""
    from datasets import Dataset
    from lm_eval.tasks.ruler import common_utils

    longest, delimiter = _RULER_ANSWERS[task]

    def dataset(**_: object) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(samples)}

    # Samples of one length have -1 for lm-eval's default length.
    lengths = dict.fromkeys((str(tokens), *map(str, common_utils.DEFAULT_SEQ_LENGTHS)))
    return {
        "task": task,
        "dataset_path": "",
        "dataset_name": "",
        "custom_dataset": dataset,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "target_delimiter": delimiter,
        "process_results": common_utils.process_results,
        "metric_list": [
            {"metric": length, "aggregation": common_utils.aggregate_metrics, "higher_is_better": True}
            for length in lengths
        ],
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "max_gen_toks": longest, "until": []},
        "repeats": 1,
        "metadata": {"version": 1.0},
    }


@contextmanager
def _offline() -> Iterator[None]:
    """Importing RULER's functions would fetch a tokenizer of sentences, for haystacks not made here."""
    import nltk

    with patch.object(nltk, "download"):
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """RULER draws from the generators of ``random`` and numpy, which go on afterwards as if it had not."""
    import numpy as np

    plain, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)


class _Answerer(HFLM):  # type: ignore[misc]
    """lm-eval's model for transformers, one prompt at a time, which it must not cut at the trained length."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, progress: Progress
    ) -> None:
        # Prompts may be a few tokens longer than asked for: RULER counts some of them without their answer.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2 * tokens)
        self._progress = progress

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = super()._model_generate(*args, **kwargs)
        self._progress.advance(1)
        return made
