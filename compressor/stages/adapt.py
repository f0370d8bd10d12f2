"""Before everything that is calibrated: low-rank adapters trained on long documents.

LoRA (arXiv:2106.09685) beside the projections of attention and, where asked for, norms and embeddings,
without which a model learns little of longer contexts (LongLoRA, arXiv:2309.12307, table 2). One sequence at
a time, so many to a step of ``trainer.Trainer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.adapted import write_adapted
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.progress import Progress
from compressor.stages.adapt_files import write_adapter
from compressor.stages.adapt_memory import recomputes
from compressor.stages.trainer import ENDS, Schedule, Trainer
from compressor.stages.trainer_files import Progressed, forget_state

if TYPE_CHECKING:
    import torch

    from compressor.stages.adapt_model import AdaptedModel
    from compressor.stages.adapt_retrieval import Retrieval
    from compressor.stages.adapt_texts import Sequences

# What the answers' mean loss counts beside the mean of all tokens.
ANSWER_WEIGHT = 0.2
_WIDTH = {"float32": 4, "bfloat16": 2}


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
    schedule = Schedule("adapt", "adapters", spec.steps, spec.warmup_steps, spec.save_every)
    trainer = Trainer(schedule, folder, progress)
    trainer.check_shared(spec.sequences, "adapters.tokens_per_step")
    steps = _Steps(spec, shown.ids_NT, retrieval, trainer)
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
    done, resumed = steps.run(model)
    losses = done.curves["loss"]
    answers = [
        round(loss, 5) if asked else None
        for loss, asked in zip(done.curves["answers"], done.curves["asked"], strict=True)
    ]
    changed: list[str] = []
    if trainer.writes:
        if spec.merge:
            changed = model.changed
            write_adapted(folder, source.headers, changed, model.merged())
        else:
            write_adapter(folder, model.adapters(), spec.alpha, spec.base)
        forget_state(folder)
    trainer.wait()
    ends = min(ENDS, spec.steps)
    facts = {
        "steps": spec.steps,
        "tokens": spec.steps * spec.sequences * spec.sequence_length,
        "sequence_length": spec.sequence_length,
        "losses": [round(loss, 5) for loss in losses],
        "loss_before": sum(losses[:ends]) / ends,
        "loss_after": sum(losses[-ends:]) / ends,
        "answers": answers,
        "rank": spec.rank,
        "trained_parameters": sum(parameter.numel() for parameter in model.trained.values()),
        "layers": len(model.layers),
        "targets": sorted({path.rpartition(".")[2] for path in model.layers}),
        "direct": len(model.direct),
        "documents": shown.documents,
        "sequences": len(shown.ids_NT),
        "joined": shown.joined,
        "recomputed": steps.recomputed,
        "seconds": round(done.seconds, 1),
        "changed": changed,
    }
    return {"resumed": resumed, "adapt": facts}


class _Steps:
    """The gradient of each step, sequence by sequence."""

    def __init__(
        self, spec: AdaptSpec, ids_NT: torch.Tensor, retrieval: Retrieval | None, trainer: Trainer
    ) -> None:
        from compressor.stages.training import row_order

        self._spec, self._ids_NT, self._retrieval, self._trainer = spec, ids_NT, retrieval, trainer
        self._order = row_order(len(ids_NT), spec.steps * spec.sequences, spec.seed)
        self.recomputed = False

    def run(self, model: AdaptedModel) -> tuple[Progressed, bool]:
        """All steps; how they went, and whether an earlier run had begun."""
        from compressor.stages.adapt_loss import SequenceLoss

        spec, trainer = self._spec, self._trainer
        optimizer = self._optimizer(model)
        length, width = spec.sequence_length, _WIDTH[spec.dtype]
        self.recomputed = recomputes(model.config, length, width, trainer.device.type)
        if self.recomputed:
            model.recompute_blocks()
        with model.autocast():
            loss_of = SequenceLoss(model.whole.model, model.dtype)
        prepared = trainer.prepared(loss_of)
        return trainer.run(model.trained, optimizer, lambda step: self._backward(prepared, model, step))

    def _backward(self, loss_of: Any, model: AdaptedModel, step: int) -> dict[str, float]:
        """Leaves the gradient of the step's loss with the parameters.

        Returns ``loss``: the mean negative log-likelihood of its tokens; ``asked``: 1 where it asks for
        hidden facts, else 0; ``answers``: the same mean of the answers, 0 without.
        """
        spec, trainer = self._spec, self._trainer
        first = step * spec.sequences
        numbers = trainer.share(range(first, first + spec.sequences))
        # Each sequence's first token is not predicted. Processes' gradients are averaged.
        tokens = spec.sequence_length - 1
        share = trainer.processes / (spec.sequences * tokens)
        total, answered, asked = 0.0, 0.0, 0
        for number in numbers:
            ids_BT, weight_BT = self._sequence(number)
            wait = nullcontext() if number == numbers[-1] else trainer.apart(loss_of)
            # On the way back too: blocks that are recomputed must find the kernels that ran before.
            with wait, _fused_attention(trainer.device):
                with model.autocast():
                    loss, plain = loss_of(ids_BT, weight_BT)
                trainer.backward(loss * share)
            total += float(plain) * share
            if weight_BT is not None:
                answered += float(loss.detach() - plain) / (ANSWER_WEIGHT * tokens)
                asked += 1
        answered, asked_mean = trainer.mean(answered), trainer.mean(asked)
        return {
            "loss": trainer.mean(total),
            "asked": float(asked_mean > 0),
            "answers": answered / asked_mean if asked_mean else 0.0,
        }

    def _sequence(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids [1, T] of the ``number``-th sequence, and weights of its tokens where they differ."""
        ids_T, answer_T = self._ids_NT[self._order[number]].long(), None
        device = self._trainer.device
        if self._retrieval is not None:
            ids_T, answer_T = self._retrieval.hide(ids_T, number)
        if answer_T is None:
            return ids_T[None].to(device), None
        # The answers' mean counts ``ANSWER_WEIGHT`` beside the mean of all tokens.
        extra = ANSWER_WEIGHT * (len(ids_T) - 1) / int(answer_T.sum())
        return ids_T[None].to(device), (1 + extra * answer_T.float())[None].to(device)

    def _optimizer(self, model: AdaptedModel) -> torch.optim.Optimizer:
        direct = {id(parameter) for parameter in model.direct.values()}
        adapters = [parameter for parameter in model.trained.values() if id(parameter) not in direct]
        groups = [(adapters, self._spec.learning_rate)]
        if direct:
            groups.append(([*model.direct.values()], self._spec.direct_learning_rate))
        return self._trainer.optimizer(groups)


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
