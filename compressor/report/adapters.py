"""What was trained on long documents, in a report."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.report.record import Count, Measure, Record
from compressor.report.words import counted, duration, number

ADAPTER_HEADS = ("steps", "loss", "loss of hidden facts' answers")
_ROWS = 8


class AdapterFacts(Record):
    """Adapters, and what was trained beside them.

    Attributes:
        rank: of the adapters.
        layers: matrices that have one.
        targets: their last names.
        norms: whether norms were trained.
        embeddings: whether the embedding was.
        trained: numbers that were.
        documents: named texts.
        read: documents read of them.
        sequences: different sequences.
        joined: of these, put together from documents that do not fill one.
        sequence_length: tokens of each.
        tokens: trained on, in all.
        retrieval: share of the sequences in which facts were hidden.
        losses: mean negative log-likelihood of each step, nats a token.
        answers: that of the answers to hidden facts in each step; None of a step that hid none.
        seconds: of training.
        merged: whether adapters are in the weights; else they lie in the folder ``adapter``.
        served_rank: vLLM's ``--max-lora-rank`` where they do.
        changed: the source's tensors that are others now.
    """

    rank: Count
    layers: Count
    targets: tuple[str, ...]
    norms: bool
    embeddings: bool
    trained: Count
    documents: tuple[str, ...]
    read: Count
    sequences: Count
    joined: Count
    sequence_length: Count
    tokens: Count
    retrieval: Measure
    losses: tuple[Measure, ...]
    answers: tuple[Measure | None, ...]
    seconds: Measure
    merged: bool
    served_rank: Count
    changed: tuple[str, ...]


def adapter_caption(facts: AdapterFacts) -> str:
    """One line: what was trained, on how much."""
    direct = " and ".join(name for name in ("norms", "embeddings") if getattr(facts, name))
    besides = f", and {direct}" if direct else ""
    return (
        f"Rank {facts.rank} beside {', '.join(facts.targets)}{besides}: {facts.trained:,} numbers "
        f"trained on {facts.tokens:,} tokens in sequences of {facts.sequence_length:,}, "
        f"{duration(facts.seconds)}"
    )


def adapter_rows(facts: AdapterFacts) -> list[tuple[str, str, str]]:
    """The mean loss of a few equal stretches of the training."""
    steps = len(facts.losses)
    count = min(_ROWS, steps)
    rows = []
    for part in range(count):
        begin, end = part * steps // count, (part + 1) * steps // count
        named = f"{end:,}" if begin + 1 == end else f"{begin + 1:,} to {end:,}"
        answers = [loss for loss in facts.answers[begin:end] if loss is not None]
        rows.append((named, _mean(facts.losses[begin:end]), _mean(answers)))
    return rows


def adapter_notes(facts: AdapterFacts) -> list[str]:
    """On what, how sequences were made, and where adapters are."""
    texts = ", ".join(facts.documents)
    joined = "."
    if facts.joined:
        joined = f"; documents, or ends of them, that do not fill a sequence are joined in {facts.joined:,}."
    notes = [
        f"Trained on {counted(facts.sequences, 'different sequence')} of {counted(facts.read, 'document')} "
        f"of {texts}{joined}"
    ]
    if facts.retrieval:
        notes.append(
            f"In {facts.retrieval:.0%} of the sequences made-up facts were hidden and asked for at the end, "
            "in wordings that no evaluation here uses; their answers count more."
        )
    if facts.merged:
        notes.append("Adapters are merged into the weights, before these were calibrated and quantized.")
    else:
        notes.append(
            "Adapters are not merged: they lie in the folder adapter, and quality was measured without them."
        )
    return notes


def _mean(values: Sequence[float]) -> str:
    return number(sum(values) / len(values), 4) if values else "-"
