"""Paired comparison of tasks, and the JSON that scripts read."""

from __future__ import annotations

import json
from math import isclose, sqrt
from statistics import stdev

import pytest

from compressor.data import shipped_root
from compressor.evals.base import SHIPPED_TASKS, EvalResult, TextResult
from compressor.evals.task_record import TaskResult, compare_tasks

TEXT = TextResult(
    perplexity_source=20.0,
    perplexity_result=25.0,
    increase=0.25,
    increase_ci95=(0.2, 0.3),
    kl_mean=0.1,
    kl_p999=2.5,
    top1_agreement=0.75,
    tokens=4096,
    scored_tokens=4092,
    context=1024,
    windows=4,
)


def _task(bits: str) -> TaskResult:
    return TaskResult("piqa", {"acc": tuple(bit == "1" for bit in bits)})


def test_difference_and_its_error_are_paired() -> None:
    """The standard error is that of the mean of per-item differences, as the statistics module has it."""
    source, result = "1111100000", "1100011110"
    figures = compare_tasks(_task(source), _task(result)).metrics["acc"]
    differences = [int(after) - int(before) for before, after in zip(source, result, strict=True)]
    assert (figures.source, figures.result, figures.n) == (0.5, 0.6, 10)
    assert isclose(figures.difference, 0.1)
    assert isclose(figures.stderr, stdev(differences) / sqrt(10))
    assert (figures.lost, figures.gained) == (3, 4)


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    # scipy.stats.binomtest(lost, lost + gained).pvalue, scipy 1.17.1
    [(0, 0, 1.0), (3, 4, 1.0), (10, 2, 0.03857421875), (700, 600, 0.0060157938610449), (0, 5, 0.0625)],
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int, p_value: float) -> None:
    """Golden values; large counts neither overflow nor take time."""
    source = "1" * lost + "0" * gained + "1"
    result = "0" * lost + "1" * gained + "1"
    figures = compare_tasks(_task(source), _task(result)).metrics["acc"]
    assert isclose(figures.p_value, p_value, rel_tol=1e-9)


def test_json_has_the_contracted_keys() -> None:
    """Scripts read these keys; the rest says how it was measured, and all of it is JSON."""
    tasks = (compare_tasks(_task("110"), _task("100")),)
    result = EvalResult(TEXT, "held.jsonl", tasks, "float32", "bfloat16", "a CPU", "transformers", None)
    read = json.loads(json.dumps(result.to_json()))
    assert read["perplexity"] == {
        "source": 20.0,
        "result": 25.0,
        "increase": 0.25,
        "increase_ci95": [0.2, 0.3],
    }
    assert read["kl"] == {"mean": 0.1, "p999": 2.5, "mean_ci95": None}
    assert (read["top1_agreement"], read["tokens"]) == (0.75, 4096)
    assert read["tasks"]["piqa"]["acc"]["lost"] == 1
    assert read["text"] == "held.jsonl"


def test_shipped_tasks_are_the_folders_with_a_yaml() -> None:
    """The list that plans check against is what lies in calibration/."""
    folders = (shipped_root() / "calibration").glob("*/*.yaml")
    assert sorted(path.stem for path in folders if path.stem == path.parent.name) == sorted(SHIPPED_TASKS)
