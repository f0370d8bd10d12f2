"""The whole evaluation of one pair of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.device import device_name, fast_dtype, pick_device
from compressor.evals.base import SHIPPED_TASKS, EvalResult, EvalSpec
from compressor.evals.generation import compare_continuations
from compressor.evals.speed import compare_speed
from compressor.evals.task_record import TaskComparison, compare_tasks
from compressor.evals.text import compare_on_text, read_passage
from compressor.model.load import LoadedCheckpoint, set_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.evals.answers import Answers
    from compressor.progress import Progress


def evaluate_pair(
    source_model: PreTrainedModel,
    result: LoadedCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvalSpec,
    progress: Progress,
    *,
    hub: Path,
    kept: Callable[[str], Answers | None] = lambda _: None,
) -> EvalResult:
    """Measures the result against its source.

    The text and its continuations are computed in float32, so that the figures are the weights' and not the
    arithmetic's; tasks and speed in ``fast_dtype()``, the same for both models. The models are moved and cast
    in place and stay so.

    ``hub``: folder that items of tasks which do not ship are fetched to. ``kept``: given a dtype and device,
    where the source's answers in it are kept, or None to ask it always.

    Raises:
        UserError: an unknown task, an unusable text.
        CheckpointError: models that do not fit together or give NaN.
    """
    import torch

    check_tasks(spec.tasks)
    device = pick_device()
    passage, first = read_passage(tokenizer, spec.text, spec.tokens), leading_token(tokenizer)
    for model in (source_model, result.model):
        set_dtype(model, torch.float32).to(device)
    text = compare_on_text(
        source_model,
        result.model,
        passage.ids_T,
        context=spec.context,
        progress=progress,
        first=first,
        seed=spec.seed,
        passage=passage,
    )
    generation = speed = None
    if spec.generation is not None:
        generation = compare_continuations(
            source_model, result.model, passage.ids_T, spec.generation, progress, first=first, seed=spec.seed
        )
    task_dtype = fast_dtype(device)
    answers = kept(f"{task_dtype} on {device.type} {device_name()}")
    tasks = _compare_tasks(source_model, result.model, tokenizer, spec, task_dtype, progress, hub, answers)
    if spec.speed is not None:
        for model in (source_model, result.model):
            set_dtype(model, task_dtype)
        speed = compare_speed(source_model, result.model, passage.ids_T, spec.speed, progress)
    return EvalResult(
        text=text,
        text_label=spec.text_label,
        tasks=tasks,
        text_dtype="float32",
        task_dtype=str(task_dtype).removeprefix("torch."),
        device=device_name(),
        loaded_via=result.via,
        activations_simulated=result.activations_simulated,
        generation=generation,
        speed=speed,
        seed=spec.seed,
    )


def check_tasks(tasks: Iterable[str], *, where: str = "") -> None:
    """Refuses tasks that neither ship nor are lm-eval's; needs no model. ``where``: of the first.

    Raises:
        UserError: naming the task and those spelled alike.
    """
    for number, task in enumerate(tasks):
        if task not in SHIPPED_TASKS:
            # lm-eval takes seconds to import, and to index its tasks.
            from compressor.evals.tasks import check_task

            check_task(task, where=f"{where}.{number}" if where else "")


def _compare_tasks(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvalSpec,
    dtype: torch.dtype,
    progress: Progress,
    hub: Path,
    answers: Answers | None,
) -> tuple[TaskComparison, ...]:
    if not spec.tasks:
        return ()
    # lm-eval takes seconds to import.
    from compressor.evals.tasks import run_tasks

    both = [
        run_tasks(
            set_dtype(model, dtype),
            tokenizer,
            spec.tasks,
            whose=whose,
            progress=progress,
            hub=hub,
            seeds=spec.seeds,
            answers=known,
        )
        for whose, model, known in (("source", source_model, answers), ("result", result_model, None))
    ]
    return tuple(compare_tasks(both[0][task], both[1][task], spec.seed) for task in spec.tasks)


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The ``<bos>`` that the tokenizer puts before every text, or None if it puts none."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    first: int | None = tokenizer.bos_token_id
    # A tokenizer may make nothing at all of a text.
    return first if first is not None and ids[:1] == [first] else None
