"""Rows, hidden states and the trainer of draft heads, with a head of one matrix."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.drafts.base import LAST
from compressor.drafts.native import NativeHead
from compressor.errors import UserError
from compressor.progress import Silent
from compressor.stages.drafts_hidden import TargetStates
from compressor.stages.drafts_rows import DraftRows, RowSets, row_sets, write_on
from compressor.stages.drafts_spec import RowsSpec, TrainSpec
from compressor.stages.drafts_train import HeadTrainer, Trained
from tests.drafts.native_models import opened
from tests.drafts.toy import ToyHead
from tests.tiny import EOS_ID, tiny_llama, tiny_llama4

PROMPT, NEW = 12, 20
TRAIN = TrainSpec(
    steps=30, batch=4, learning_rate=3e-3, warmup_steps=2, unroll=3, cache_bytes=0, patience=None,
    save_every=10, seed=0, dtype="float32",
)  # fmt: skip


def _rows(**changes: Any) -> RowsSpec:
    datasets = (DatasetSpec("a"), DatasetSpec("b"))
    calibration = CalibrationSpec(datasets, num_samples=10, sequence_length=PROMPT)
    spec = RowsSpec(calibration, rows=24, held_out=4, new_tokens=NEW, temperature=1.0, seed=3, at_once=8)
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random Llama of three blocks, in fp32."""
    folder = tiny_llama(tmp_path_factory.mktemp("target"), layers=3, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """Ten prompts."""
    return torch.randint(250, (10, PROMPT), generator=torch.Generator().manual_seed(1))


class _Stopping(Silent):
    """Interrupts a stage after so many of its items."""

    def __init__(self, stage: str, after: int) -> None:
        self._stage, self._left, self._counts = stage, after, False

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._counts = stage == self._stage

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= self._counts
        if self._left == 0:
            raise KeyboardInterrupt


def _sets(model: Any, texts: torch.Tensor, folder: Path, **changes: Any) -> RowSets:
    return row_sets(texts, _rows(**changes), model, (EOS_ID,), folder, Silent())


def test_what_is_written_at_temperature_0_is_the_argmax(model: Any, texts: torch.Tensor) -> None:
    """Against whole passes without a cache."""
    ids_BT = write_on(model, texts[:3], _rows(temperature=0.0, new_tokens=5), 0)
    assert torch.equal(ids_BT[:, :PROMPT], texts[:3])
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
    assert torch.equal(ids_BT[:, PROMPT:], logits_BTV[:, PROMPT - 1 : -1].argmax(-1))


def test_what_is_written_follows_the_temperature(model: Any, texts: torch.Tensor) -> None:
    """First new tokens of many copies of a prompt are distributed as the model says, sharpened."""
    copies, temperature = 4000, 0.5
    spec = _rows(temperature=temperature, new_tokens=1)
    first = write_on(model, texts[:1].expand(copies, -1), spec, 7)[:, -1]
    with torch.no_grad():
        wanted_V = torch.softmax(model(texts[:1]).logits[0, -1] / temperature, -1)
    found_V = torch.bincount(first, minlength=len(wanted_V)) / copies
    # Half the L1 distance of two samples of this size and these distributions is about sqrt(V / (2 pi n)).
    assert (found_V - wanted_V).abs().sum() / 2 < 0.15
    assert (torch.softmax(model(texts[:1]).logits[0, -1], -1) - found_V).abs().sum() / 2 > 0.2


def test_rows_resume_to_the_same(model: Any, texts: torch.Tensor, tmp_path: Path) -> None:
    """A killed run goes on behind the last finished batch; another seed writes other texts."""
    whole = _sets(model, texts, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        row_sets(texts, _rows(), model, (EOS_ID,), tmp_path / "killed", _Stopping("draft texts", 2))
    files = sorted((tmp_path / "killed" / "rows").iterdir())
    times = {file.name: file.stat().st_mtime_ns for file in files}
    assert len(files) == 2
    resumed = _sets(model, texts, tmp_path / "killed")
    assert torch.equal(whole.trained.ids_NT, resumed.trained.ids_NT)
    assert all((tmp_path / "killed" / "rows" / name).stat().st_mtime_ns == at for name, at in times.items())
    other = _sets(model, texts, tmp_path / "other", seed=4)
    assert not torch.equal(whole.held_out.ids_NT, other.held_out.ids_NT)


def test_held_out_prompts_are_not_trained_on(model: Any, texts: torch.Tensor, tmp_path: Path) -> None:
    """Prompts are used in turn, those that are measured on never; the dataset of each row is known."""
    sets = _sets(model, texts, tmp_path)
    held = {tuple(row) for row in sets.held_out.ids_NT[:, :PROMPT].tolist()}
    shown = {tuple(row) for row in sets.trained.ids_NT[:, :PROMPT].tolist()}
    assert held == {tuple(row) for row in texts[:4].tolist()}
    assert shown == {tuple(row) for row in texts[4:].tolist()}
    assert sets.held_out.datasets_N.tolist() == [0, 1, 0, 1]


def test_texts_as_they_are(model: Any, texts: torch.Tensor, tmp_path: Path) -> None:
    """Without new tokens the rows are the texts, and nothing is kept on the disk."""
    sets = _sets(model, texts, tmp_path, new_tokens=0, rows=6)
    assert torch.equal(sets.trained.ids_NT, texts[4:])
    assert (sets.written, sets.looping) == (0, 0)
    assert not any(tmp_path.iterdir())


def test_loops_and_ends(
    model: Any, texts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that run in circles are left out; what follows an end of text counts for nothing."""
    written = torch.arange(24 + 4)[:, None] * 7 % 200 + torch.arange(NEW)[None]
    written[5] = 9  # a circle
    written[6, 4] = EOS_ID
    written[7, 2:] = EOS_ID  # a circle, but of ends
    monkeypatch.setattr(
        "compressor.stages.drafts_rows.write_on",
        lambda _model, prompts, _spec, _seed: torch.cat([prompts, written], dim=1),
    )
    sets = _sets(model, texts, tmp_path, at_once=28)
    assert sets.looping == 1
    assert len(sets.trained) == 23
    assert sets.trained.lengths_N[:4].tolist() == [PROMPT + NEW, PROMPT + 5, PROMPT + 3, PROMPT + NEW]
    assert sets.trained.counted(torch.tensor([1])).sum() == PROMPT + 5
    assert sets.written == 25 * NEW + 5 + 3


def test_only_loops(model: Any, texts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing left is a fault that names what helps."""
    monkeypatch.setattr(
        "compressor.stages.drafts_rows.write_on",
        lambda _model, prompts, _spec, _seed: torch.nn.functional.pad(prompts, (0, NEW), value=1),
    )
    with pytest.raises(UserError, match="run in circles") as fault:
        _sets(model, texts, tmp_path)
    assert fault.value.where == "drafts.train.temperature"


def _states(model: Any, rows: DraftRows, folder: Path, most: int = 0) -> TargetStates:
    states = TargetStates(model, (1,), rows, folder, most)
    states.keep(Silent())
    return states


def test_states_are_the_models(model: Any, texts: torch.Tensor, tmp_path: Path) -> None:
    """Against transformers' own hidden states; those from the disk are the same bits as computed ones."""
    rows = _sets(model, texts, tmp_path).trained
    computed = _states(model, rows, tmp_path)
    some = _states(model, rows, tmp_path, most=5 * computed.row_bytes + 1)
    assert (computed.kept, some.kept) == (0, 5)
    assert len([*(tmp_path / "hidden").iterdir()]) == 5
    numbers = torch.tensor([7, 2, 11, 4])
    (one,), (other,) = list(computed.pieces(numbers)), list(some.pieces(numbers))
    found = model(rows.ids_NT[numbers], output_hidden_states=True).hidden_states
    for layer, wanted in ((1, found[1]), (LAST, found[-1])):
        # Rows beside one another: other kernels of the same products.
        assert torch.allclose(one.hidden[layer], wanted, atol=1e-5)
        assert torch.equal(one.hidden[layer], other.hidden[layer])
    assert torch.equal(one.ids_BT, rows.ids_NT[numbers])


def test_states_of_llama_4(texts: torch.Tensor, tmp_path: Path) -> None:
    """Which transformers says is its own decoder."""
    folder = tiny_llama4(tmp_path / "target", dtype=torch.float32)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    rows = _sets(target, texts, tmp_path).trained
    (found,) = _states(target, rows, tmp_path).pieces(torch.tensor([1, 0]))
    wanted = target(rows.ids_NT[[1, 0]], output_hidden_states=True).hidden_states
    assert torch.allclose(found.hidden[1], wanted[1], atol=1e-5)
    assert torch.allclose(found.hidden[LAST], wanted[-1], atol=1e-5)


def _trained(model: Any, sets: RowSets, folder: Path, spec: TrainSpec = TRAIN, progress: Any = None) -> Any:
    head = ToyHead(model)
    folder.mkdir(exist_ok=True)
    shown = TargetStates(model, head.layers, sets.trained, folder, spec.cache_bytes)
    held_out = TargetStates(model, head.layers, sets.held_out, folder)
    done = HeadTrainer(head, spec, shown, held_out, folder, progress or Silent()).run()
    return done, head.trained["mixed"].detach().clone()


@pytest.fixture(scope="module")
def sets(model: Any, texts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> RowSets:
    """Rows that the model wrote."""
    return _sets(model, texts, tmp_path_factory.mktemp("rows"))


def test_training_helps_and_is_told(model: Any, sets: RowSets, tmp_path: Path) -> None:
    """The loss falls on rows that were not trained on; every step has its figures."""
    done, _ = _trained(model, sets, tmp_path / "a")
    assert isinstance(done, Trained)
    assert done.after.loss < 0.9 * done.before.loss
    assert len(done.curves["loss"]) == len(done.curves["length"]) == done.steps == 30
    assert done.curves["held_out_step"] == [10, 20, 30]
    assert done.after.loss == min(done.curves["held_out_loss"])
    assert done.after.length == pytest.approx(1 + sum(done.after.accepted))
    assert done.after.places == 4 * (PROMPT + NEW - 3)
    assert list(done.after.accepted) == sorted(done.after.accepted, reverse=True)


@pytest.mark.parametrize("after", [7, 10, 23])
def test_a_killed_run_ends_bit_identical(model: Any, sets: RowSets, tmp_path: Path, after: int) -> None:
    """Whatever the step that it was killed in; kept states change nothing either."""
    whole, values = _trained(model, sets, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _trained(model, sets, tmp_path / "killed", progress=_Stopping("draft", after))
    resumed, same = _trained(model, sets, tmp_path / "killed", replace(TRAIN, cache_bytes=1 << 16))
    assert resumed.resumed == (after > 10)
    assert torch.equal(values, same)
    assert resumed.curves == whole.curves
    assert resumed.after == whole.after


def test_the_best_stays_and_patience_ends(model: Any, sets: RowSets, tmp_path: Path) -> None:
    """A rate that ruins the head: its first values stay, and training ends after so many measurements."""
    spec = replace(TRAIN, learning_rate=1.0, warmup_steps=1, patience=2, save_every=5)
    done, values = _trained(model, sets, tmp_path / "a", spec)
    assert (done.steps, done.best_step) == (10, 0)
    assert done.after == done.before
    assert torch.equal(values, ToyHead(model).trained["mixed"])
    again, _ = _trained(model, sets, tmp_path / "a", spec)
    assert again.steps == 10
    assert again.resumed


def test_no_steps_only_measure(model: Any, sets: RowSets, tmp_path: Path) -> None:
    """A head that is taken as it is."""
    done, _ = _trained(model, sets, tmp_path / "a", replace(TRAIN, steps=0))
    assert done.before == done.after
    assert (done.steps, done.curves) == (0, {})


def test_rows_without_a_place_teach_nothing(tmp_path: Path) -> None:
    """Texts that end at once: a step of them has no loss to descend, and is none to fail at."""
    _, target, layer = opened("glm4_moe", tmp_path / "model")
    ids_NT = torch.randint(250, (4, PROMPT), generator=torch.Generator().manual_seed(2))
    sets = [DraftRows(ids_NT, torch.full((4,), length), torch.zeros(4).long()) for length in (2, PROMPT)]
    head, spec = NativeHead(layer), replace(TRAIN, steps=2, save_every=2)
    shown, held_out = (TargetStates(target, head.layers, rows, tmp_path) for rows in sets)
    done = HeadTrainer(head, spec, shown, held_out, tmp_path, Silent()).run()
    assert done.curves["loss"] == [0, 0]
    assert done.after == done.before


def _in_process(rank: int, folder: Path, port: int) -> None:
    """One of two processes that train the same head."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    target = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    target.requires_grad_(False).eval()
    texts = torch.randint(250, (10, PROMPT), generator=torch.Generator().manual_seed(1))
    sets = _sets(target, texts, folder / f"rows{rank}")
    _, values = _trained(target, sets, folder / "two", replace(TRAIN, steps=10))
    write_tensors(folder / f"values{rank}.safetensors", {"mixed": values})


@pytest.mark.slow
def test_two_processes_train_what_one_trains(texts: torch.Tensor, tmp_path: Path) -> None:
    """Each takes half of a step's rows; both end alike, and as one process does but for rounding."""
    tiny_llama(tmp_path / "model", layers=3, dtype=torch.float32)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    target.requires_grad_(False).eval()
    sets = _sets(target, texts, tmp_path / "rows")
    _, alone = _trained(target, sets, tmp_path / "one", replace(TRAIN, steps=10))
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_process, args=(tmp_path, port), nprocs=2)
    found = [load_file(tmp_path / f"values{rank}.safetensors")["mixed"] for rank in range(2)]
    assert torch.equal(*found)
    # Sums of gradients in another order, through ten steps of a rate of 3e-3.
    assert torch.allclose(found[0], alone, atol=1e-5)
