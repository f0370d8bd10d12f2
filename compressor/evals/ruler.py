"""RULER's tasks, which make their own data, as lm-eval words and scores them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from compressor.errors import UserError
from compressor.evals.harness import HFLM, TaskManager, evaluate, ruler_module
from compressor.evals.long_record import RulerScore
from compressor.evals.long_spec import check_ruler, missing_packages
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

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
    prepare = ruler_module("prepare_niah")
    haystack, keys, values = _NIAH[task]
    made: list[dict[str, Any]] = prepare.generate_samples(
        prepare.get_haystack(type_haystack=haystack),
        TOKENIZER=tokenizer,
        max_seq_length=tokens,
        template=ruler_module("niah_utils").TEMPLATE,
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
    utils = ruler_module("vt_utils")
    generate_input_output, make = utils.generate_input_output, utils.sys_vartrack_w_noise_random
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
    cwe_utils = ruler_module("cwe_utils")
    with _seeded(0):
        shortest = "".join(cwe_utils.generate_input_output(10, tokens)[:2])
        _check_fits(tokenizer, shortest, _RULER_ANSWERS["ruler_cwe"][0], tokens)
    cwe_utils.RNG.seed(seed)  # of the module, which each sample moves on
    made: list[dict[str, Any]] = cwe_utils.sys_word_pair_random(
        num_samples=count, max_seq_length=tokens, tokenizer=tokenizer
    )
    return made


def _frequent_words(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[dict[str, Any]]:
    utils = ruler_module("fwe_utils")
    _check_fits(tokenizer, utils.TEMPLATE, _RULER_ANSWERS["ruler_fwe"][0], tokens)
    made: list[dict[str, Any]] = utils.sys_kwext(
        tokenizer=tokenizer, max_seq_length=tokens, num_samples=count
    )
    return made


def _ruler_task(task: str, tokens: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's description of the task, with samples of our own."""
    from datasets import Dataset

    common_utils = ruler_module("common_utils")
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
