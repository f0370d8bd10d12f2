"""The whole evaluation of one pair of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from compressor.device import device_name, fast_dtype, pick_device
from compressor.errors import UserError
from compressor.evals.base import SHIPPED_TASKS, EvalResult, EvalSpec, TaskComparison, compare_tasks
from compressor.evals.text import compare_on_text, tokens_from_text
from compressor.model.load import LoadedCheckpoint, set_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress


def evaluate_pair(
    source_model: PreTrainedModel,
    result: LoadedCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvalSpec,
    progress: Progress,
) -> EvalResult:
    """Measures the result against its source.

    The text is scored in float32, so that the figures are the weights' and not the arithmetic's; tasks in
    ``fast_dtype()``, the same for both models. The models are moved and cast in place and stay so.

    Raises:
        UserError: an unknown task, an unusable text.
        CheckpointError: models that do not fit together or give NaN.
    """
    import torch

    check_tasks(spec.tasks)
    device = pick_device()
    ids_T = tokens_from_text(tokenizer, spec.text, spec.tokens)
    for model in (source_model, result.model):
        set_dtype(model, torch.float32).to(device)
    text = compare_on_text(
        source_model,
        result.model,
        ids_T,
        context=spec.context,
        progress=progress,
        first=leading_token(tokenizer),
        seed=spec.seed,
    )
    task_dtype = fast_dtype(device)
    return EvalResult(
        text=text,
        text_label=spec.text_label,
        tasks=_compare_tasks(source_model, result.model, tokenizer, spec.tasks, task_dtype, progress),
        text_dtype="float32",
        task_dtype=str(task_dtype).removeprefix("torch."),
        device=device_name(),
        loaded_via=result.via,
        activations_simulated=result.activations_simulated,
    )


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuses tasks that are not shipped; needs no model.

    Raises:
        UserError: naming the task and the known ones.
    """
    for task in tasks:
        if task not in SHIPPED_TASKS:
            raise UserError(f"unknown task {task!r}", fix=f"shipped tasks: {', '.join(SHIPPED_TASKS)}")


def _compare_tasks(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, int | None],
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[TaskComparison, ...]:
    if not tasks:
        return ()
    # lm-eval takes seconds to import.
    from compressor.evals.tasks import run_tasks

    both = [
        run_tasks(set_dtype(model, dtype), tokenizer, tasks, whose=whose, progress=progress)
        for whose, model in (("source", source_model), ("result", result_model))
    ]
    return tuple(compare_tasks(both[0][task], both[1][task]) for task in tasks)


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The ``<bos>`` that the tokenizer puts before every text, or None if it puts none."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    first: int | None = tokenizer.bos_token_id
    # A tokenizer may make nothing at all of a text.
    return first if first is not None and ids[:1] == [first] else None
