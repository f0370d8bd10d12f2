"""Before everything that is calibrated: low-rank adapters trained on long documents.

LoRA (arXiv:2106.09685) beside the projections of attention and, where asked for, norms and embeddings,
without which a model learns little of longer contexts (LongLoRA, arXiv:2309.12307, table 2). AdamW
(arXiv:1711.05101) with a linear warm-up, then a cosine; one sequence at a time, so many to a step. State is
saved as it goes: a killed run goes on with it, on the CPU to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.adapted import write_adapted
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.progress import Progress
from compressor.stages.adapt_files import STATE_NAME, Progressed, load_state, save_state, write_adapter
from compressor.stages.adapt_memory import recomputes

if TYPE_CHECKING:
    import torch

    from compressor.stages.adapt_model import AdaptedModel
    from compressor.stages.adapt_retrieval import Retrieval
    from compressor.stages.adapt_texts import Sequences

# What the answers' mean loss counts beside the mean of all tokens.
ANSWER_WEIGHT = 0.2
_BETAS = (0.9, 0.95)
_MOST_NORM = 1.0
# The cosine ends at this share of the highest rate.
_LAST_RATE = 0.1
_WIDTH = {"float32": 4, "bfloat16": 2}
# Steps whose mean loss stands for the beginning and for the end.
_ENDS = 10


@dataclass(frozen=True)
class AdaptSpec:
    """What is trained, on what, and how.

    Attributes:
        documents: the texts.
        sequence_length: tokens of a sequence.
        steps: of the optimizer.
        sequences: of a step.
        rank: of the adapters.
        alpha: their outputs are multiplied by ``alpha / rank``.
        targets: leaf names of the layers that get one; empty for the projections of attention.
        norms: whether the weights of norms are trained.
        embeddings: whether the input embedding is, and with it a tied head.
        learning_rate: the highest, of adapters.
        direct_learning_rate: the highest, of norms and embeddings.
        warmup_steps: until the highest is reached.
        save_every: steps after which the state is saved.
        seed: of the adapters' first values, and of the order of the texts.
        merge: whether the adapters go into the weights; else they are written beside them.
        base: how the result is called, for adapters beside it.
        dtype: of the frozen weights and of matrix products.
        retrieval: share of the sequences that hold made-up facts and questions after them.
    """

    documents: tuple[DatasetSpec, ...]
    sequence_length: int
    steps: int
    sequences: int
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ()
    norms: bool = False
    embeddings: bool = False
    learning_rate: float = 2e-4
    direct_learning_rate: float = 2e-5
    warmup_steps: int = 20
    save_every: int = 50
    seed: int = 0
    merge: bool = True
    base: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    retrieval: float = 0.0

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able, for the stage's key: all that its result depends on besides the source."""
        told = {
            name: value for name, value in asdict(self).items() if name not in ("documents", "save_every")
        }
        return {**told, "documents": [dict(dataset.content) for dataset in self.documents]}


def adapt_stage(source: Source, spec: AdaptSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Trains, and leaves ``adapted.tensors``, or ``adapter/``, in ``folder``.

    Returns:
        ``resumed``; ``adapt``: ``steps``, ``tokens``, ``sequence_length``, ``losses`` (of each step, nats a
        token), ``loss_before`` and ``loss_after`` (means of the first and of the last steps), ``answers``
        (losses of hidden facts' answers in each step, None in one that asks for none), ``rank``,
        ``trained_parameters``, ``layers`` (with an adapter), ``targets`` (their leaf names), ``direct``
        (norms and embeddings that are trained as they are), ``documents`` (read), ``sequences`` (different
        ones), ``joined`` (of these, put together from several documents), ``recomputed`` (whether blocks were
        computed twice), ``seconds``, ``changed`` (names of the source's tensors that are others now).

    Raises:
        CheckpointError: the model cannot be loaded, trained or written back.
        UserError: a text cannot be read or is too short; the loss is not finite; the disk is full.
    """
    from compressor.stages.adapt_texts import adapter_sequences

    shown = adapter_sequences(
        source,
        spec.documents,
        length=spec.sequence_length,
        count=spec.steps * spec.sequences,
        seed=spec.seed,
        folder=folder,
        progress=progress,
    )
    wanted = spec.steps * spec.sequences
    if len(shown.ids_NT) < wanted:
        progress.warn(
            f"adapters: the documents make {len(shown.ids_NT)} sequences of {spec.sequence_length:,} tokens; "
            f"to train on {wanted}, each is shown {wanted / len(shown.ids_NT):.1f} times"
        )
    return adapt(source, shown, spec, folder, progress)


def adapt(
    source: Source, shown: Sequences, spec: AdaptSpec, folder: Path, progress: Progress
) -> dict[str, Any]:
    """``adapt_stage`` on sequences that were made before."""
    import torch

    from compressor.stages.adapt_model import AdaptedModel
    from compressor.stages.adapt_retrieval import Retrieval
    from compressor.stages.tokens import source_tokenizer

    retrieval = None
    if spec.retrieval:
        retrieval = Retrieval(source_tokenizer(source, folder), spec.retrieval, spec.seed)
    trainer = _Trainer(spec, shown.ids_NT, retrieval, folder, progress)
    model = AdaptedModel(
        source,
        rank=spec.rank,
        alpha=spec.alpha,
        targets=spec.targets,
        norms=spec.norms,
        embeddings=spec.embeddings,
        seed=spec.seed,
        dtype=getattr(torch, spec.dtype),
        device=trainer.device,
    )
    done, resumed = trainer.run(model)
    changed: list[str] = []
    if trainer.writes:
        if spec.merge:
            changed = model.changed
            write_adapted(folder, source.headers, changed, model.merged())
        else:
            write_adapter(folder, model.adapters(), spec.alpha, spec.base)
        (folder / STATE_NAME).unlink(missing_ok=True)
    trainer.wait()
    ends = min(_ENDS, spec.steps)
    facts = {
        "steps": spec.steps,
        "tokens": spec.steps * spec.sequences * spec.sequence_length,
        "sequence_length": spec.sequence_length,
        "losses": [round(loss, 5) for loss in done.losses],
        "loss_before": sum(done.losses[:ends]) / ends,
        "loss_after": sum(done.losses[-ends:]) / ends,
        "answers": [None if loss is None else round(loss, 5) for loss in done.answers],
        "rank": spec.rank,
        "trained_parameters": sum(parameter.numel() for parameter in model.trained.values()),
        "layers": len(model.layers),
        "targets": sorted({path.rpartition(".")[2] for path in model.layers}),
        "direct": len(model.direct),
        "documents": shown.documents,
        "sequences": len(shown.ids_NT),
        "joined": shown.joined,
        "recomputed": trainer.recomputed,
        "seconds": round(done.seconds, 1),
        "changed": changed,
    }
    return {"resumed": resumed, "adapt": facts}


def rate_share(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate in step 0, 1, ...: a linear rise, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + cos(pi * passed))


class _Trainer:
    """The optimizer's loop, in one process or in several that accelerate has started."""

    def __init__(
        self,
        spec: AdaptSpec,
        ids_NT: torch.Tensor,
        retrieval: Retrieval | None,
        folder: Path,
        progress: Progress,
    ) -> None:
        from accelerate import Accelerator

        from compressor.stages.training import row_order

        self._spec, self._ids_NT, self._folder, self._progress = spec, ids_NT, folder, progress
        self._retrieval = retrieval
        self._accelerator = Accelerator(mixed_precision="no")
        self._order = row_order(len(ids_NT), spec.steps * spec.sequences, spec.seed)
        self.recomputed = False
        if spec.sequences % self._accelerator.num_processes:
            raise UserError(
                f"a step of {spec.sequences} sequences cannot be shared among "
                f"{self._accelerator.num_processes} processes",
                where="adapters.tokens_per_step",
                fix="make it that many sequences, or a multiple",
            )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self._accelerator.device
        return device

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self._accelerator.is_main_process)

    def wait(self) -> None:
        """Until all processes have come here."""
        self._accelerator.wait_for_everyone()

    def run(self, model: AdaptedModel) -> tuple[Progressed, bool]:
        """All steps; how they went, and whether an earlier run had begun."""
        import torch

        from compressor.stages.adapt_loss import SequenceLoss

        spec, trained = self._spec, model.trained
        optimizer = self._optimizer(model)
        found = load_state(self._folder, trained, optimizer)
        done = found or Progressed()
        self.recomputed = recomputes(model.config, spec.sequence_length, _WIDTH[spec.dtype], self.device.type)
        if self.recomputed:
            model.recompute_blocks()
        with model.autocast():
            loss_of = SequenceLoss(model.whole.model, model.dtype)
        loss_of = self._accelerator.prepare_model(loss_of)
        self._progress.start("adapt", spec.steps, "items", done=done.step)
        before, started = done.seconds, time.monotonic()
        while done.step < spec.steps:
            share = rate_share(done.step, spec.steps, spec.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * share
            loss, answers = self._backward(loss_of, model, done.step)
            if not isfinite(loss):
                raise UserError(
                    f"the loss is {loss} in step {done.step + 1}",
                    where="adapters.learning_rate",
                    fix="lower it, or raise warmup_steps",
                )
            for parameter in trained.values():
                if parameter.grad is None:
                    # A layer that no token came through, such as an expert: its moments are saved, too.
                    parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(trained.values(), _MOST_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done.step += 1
            done.losses.append(loss)
            done.answers.append(answers)
            done.seconds = before + time.monotonic() - started
            recent = done.losses[-_ENDS:]
            self._progress.advance(1, note=f"loss {sum(recent) / len(recent):.4f}")
            if done.step % spec.save_every == 0 or done.step == spec.steps:
                self._save(trained, optimizer, done)
        self._progress.finish(resumed=found is not None and found.step == spec.steps)
        return done, found is not None

    def _backward(self, loss_of: Any, model: AdaptedModel, step: int) -> tuple[float, float | None]:
        """Leaves the gradient of the step's loss with the parameters.

        Returns the mean negative log-likelihood of its tokens, and that of answers where it asks for some.
        """
        spec, processes = self._spec, self._accelerator.num_processes
        first = step * spec.sequences
        numbers = range(first, first + spec.sequences)[self._accelerator.process_index :: processes]
        # Each sequence's first token is not predicted. Processes' gradients are averaged.
        tokens = spec.sequence_length - 1
        share = processes / (spec.sequences * tokens)
        total, answered, asked = 0.0, 0.0, 0
        for number in numbers:
            ids_BT, weight_BT = self._sequence(number)
            wait = nullcontext() if number == numbers[-1] else self._accelerator.no_sync(loss_of)
            # On the way back too: blocks that are recomputed must find the kernels that ran before.
            with wait, _fused_attention(self.device):
                with model.autocast():
                    loss, plain = loss_of(ids_BT, weight_BT)
                self._accelerator.backward(loss * share)
            total += float(plain) * share
            if weight_BT is not None:
                answered += float(loss.detach() - plain) / (ANSWER_WEIGHT * tokens)
                asked += 1
        answered, asked_mean = self._mean(answered), self._mean(asked)
        return self._mean(total), answered / asked_mean if asked_mean else None

    def _sequence(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids [1, T] of the ``number``-th sequence, and weights of its tokens where they differ."""
        ids_T, answer_T = self._ids_NT[self._order[number]].long(), None
        if self._retrieval is not None:
            ids_T, answer_T = self._retrieval.hide(ids_T, number)
        if answer_T is None:
            return ids_T[None].to(self.device), None
        # The answers' mean counts ``ANSWER_WEIGHT`` beside the mean of all tokens.
        extra = ANSWER_WEIGHT * (len(ids_T) - 1) / int(answer_T.sum())
        return ids_T[None].to(self.device), (1 + extra * answer_T.float())[None].to(self.device)

    def _mean(self, value: float) -> float:
        """Over all processes."""
        import torch

        if self._accelerator.num_processes == 1:
            return value
        return float(self._accelerator.reduce(torch.tensor(float(value), device=self.device), "mean"))

    def _optimizer(self, model: AdaptedModel) -> torch.optim.Optimizer:
        import torch

        direct = {id(parameter) for parameter in model.direct.values()}
        adapters = [parameter for parameter in model.trained.values() if id(parameter) not in direct]
        groups: list[dict[str, Any]] = [{"params": adapters, "highest": self._spec.learning_rate}]
        if direct:
            groups.append({"params": [*model.direct.values()], "highest": self._spec.direct_learning_rate})
        # Without weight decay: what is trained is small, or would be pulled to zero from where it was.
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=1.0, betas=_BETAS, weight_decay=0.0, fused=fused)

    def _save(self, trained: Mapping[str, Any], optimizer: torch.optim.Optimizer, done: Progressed) -> None:
        if self.writes:
            save_state(self._folder, trained, optimizer, done)


@contextmanager
def _fused_attention(device: torch.device) -> Iterator[None]:
    """On an accelerator only kernels of attention that never hold scores of all pairs of tokens.

    Raises:
        UserError: none of them takes this model; or the memory does not hold a sequence.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    fused = device.type == "cuda"
    try:
        with sdpa_kernel(kinds, set_priority=True) if fused else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the accelerator's memory does not hold a sequence on its way through the model",
            where="adapters.sequence_length",
            fix="lower it, or use an accelerator with more memory",
        ) from error
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise UserError(
            "no kernel computes this model's attention without scores of all pairs of tokens",
            where="adapters",
            fix="leave the section out",
        ) from error
