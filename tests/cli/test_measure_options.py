"""What the options of ``compress eval`` ask for, and how faults are told."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from compressor.cli.measure_options import Measures, measure_options
from compressor.errors import UserError
from compressor.evals.base import GenerationSpec, SpeedSpec


def _asked(*words: str) -> Measures:
    found: list[Measures] = []

    @click.command()
    @measure_options
    def command(measures: Measures) -> None:
        found.append(measures)

    done = CliRunner().invoke(command, words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return found[0]


def test_options_become_specs() -> None:
    """Tasks with and without limits, seeds, continuations, speed and gates; nothing where nothing is said."""
    assert not _asked()
    found = _asked(
        *("--task", "piqa", "--task", "arc_easy=20", "--task-seeds", "3,1", "--continuations", "8"),
        *("--continuation-tokens", "5", "--speed", "2", "--speed-batch", "4"),
        *("--gate", "perplexity<=3%", "--gate", "task:piqa >= 0.99@95%", "--gate", "kl<=0.05"),
    )
    assert dict(found.tasks) == {"piqa": None, "arc_easy": 20}
    assert found.seeds == (3, 1)
    assert found.generation == GenerationSpec(prompts=8, new_tokens=5)
    assert found.speed == SpeedSpec(runs=2, batch=4)
    gates = [(g.metric, g.max_increase, g.min_recovery, g.confidence) for g in found.gates]
    assert gates == [
        ("perplexity", 0.03, None, None),
        ("task:piqa", None, 0.99, 0.95),
        ("kl", 0.05, None, None),
    ]
    assert set(found.more) == {"tasks", "seeds", "generation", "speed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "piqa=0"), "no task"),
        (("--task", "=3"), "no task"),
        (("--task", "piqa=99999999999999999999"), "no task"),
        (("--task", "piqa=٣"), "no task"),
        (("--task-seeds", "1,1"), "no list of different seeds"),
        (("--task-seeds", "-1"), "no list of different seeds"),
        (("--speed-batch", "2"), "--speed-batch say how --speed measures"),
        (("--continuation-tokens", "2"), "say how --continuations measures"),
        (("--gate", "perplexity=3"), "no gate"),
        (("--gate", "perplexity<=three"), "neither a number nor a percentage"),
        (("--gate", "ppl<=3%"), "unknown metric 'ppl'"),
        (("--gate", "kl<=3%"), "kl is absolute"),
        (("--gate", "kl<=1@95"), "less than or equal to 0.999"),
        (("--gate", "kl<=nan"), "finite"),
    ],
)
def test_faults_name_the_option(words: tuple[str, ...], message: str) -> None:
    """One sentence, and an example."""
    with pytest.raises(UserError, match=message):
        _asked(*words)
