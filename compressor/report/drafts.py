"""What proposes tokens for a result, in its report: how it was trained, and what it foretells."""

from __future__ import annotations

import json
from collections.abc import Sequence

from compressor.drafts.spec import Kind
from compressor.report.decoding import decoding_notes, decoding_rows
from compressor.report.record import Count, Measure, Ordered, Record
from compressor.report.words import duration, number, percent, size
from compressor.stages.drafts_spec import DRAFT_FOLDER

DRAFT_HEADS = ("steps", "loss", "tokens a pass")
HELD_OUT_HEADS = ("held-out texts", "tokens a pass before", "tokens a pass", "accepted by place")
_ROWS = 8
# The drafter that the draft is compared with (``stages.decode``).
_CONTROL = "repeat"
_METHODS: dict[Kind, str] = {"native": "mtp", "eagle3": "eagle3", "draft_model": "draft_model"}
_WHOSE: dict[Kind, str] = {
    "native": "The source's own prediction layer",
    "eagle3": "An EAGLE-3 head",
    "draft_model": "A smaller model of the same vocabulary",
}


class DraftMeasure(Record):
    """What a head foretells of held-out texts, each place of them a place to propose from.

    Attributes:
        loss: what is trained for, a place.
        losses: divergence from the result's own distribution at each token ahead, nats.
        accepted: share of the places where the result's likeliest tokens are foretold up to each.
        places: how many.
        length: tokens that one pass of the result is expected to give: 1 and the sum of ``accepted``.
    """

    loss: Measure
    losses: tuple[Measure, ...]
    accepted: tuple[Measure, ...]
    places: Count
    length: Measure


class DraftTraining(Record):
    """How a head was trained and measured.

    Attributes:
        texts: names of the datasets.
        rows: different rows.
        held_out_rows: further ones to measure on.
        sequence_length: tokens of a row.
        written: tokens of them that the result wrote itself.
        temperature: that it wrote at; None where it wrote nothing.
        looping: rows that were left out, because they ran in circles.
        parameters: numbers of the head.
        planned_steps: 0 where it was only measured.
        steps: that were made; fewer where none of the last measurements was better.
        best_step: whose values are kept; 0 for the first ones.
        batch: rows of a step.
        before: of the first values.
        after: of those that are kept.
        by_text: dataset -> the same of its rows.
        losses: of each step, what is trained for.
        lengths: of each step, tokens a pass.
        held_out_steps: after which held-out rows were measured.
        held_out_losses: what was found.
        held_out_lengths: the same, tokens a pass.
        seconds: of training.
    """

    texts: tuple[str, ...]
    rows: Count
    held_out_rows: Count
    sequence_length: Count
    written: Count
    temperature: Measure | None
    looping: Count
    parameters: Count
    planned_steps: Count
    steps: Count
    best_step: Count
    batch: Count
    before: DraftMeasure
    after: DraftMeasure
    by_text: Ordered[DraftMeasure]
    losses: tuple[Measure, ...]
    lengths: tuple[Measure, ...]
    held_out_steps: tuple[Count, ...]
    held_out_losses: tuple[Measure, ...]
    held_out_lengths: tuple[Measure, ...]
    seconds: Measure


class DecodedDivergence(Record):
    """Where a text first leaves plain decoding's: prompt, new token, and how far apart the logits are."""

    prompt: Count
    at: Count
    gap: Measure


class DecodedDraft(Record):
    """One drafter on prompts of one domain; see ``evals.decode_record.DraftFigures``.

    ``prompts`` is empty in reports from before it was kept.
    """

    name: str
    length: Measure
    rates: tuple[Measure, ...]
    drafts: Count
    accepted_at: tuple[Count, ...]
    looping: Count
    divergences: tuple[DecodedDivergence, ...] | None
    wall_s: Measure
    speedup: Measure
    tokens: Count
    passes: Count
    prompts: tuple[tuple[Count, Count], ...] = ()


class DecodedDomain(Record):
    """Prompts of one domain at one batch size; see ``evals.decode_record.DomainFigures``."""

    domain: str
    batch: Count
    prompts: Count
    looping: Count
    plain_wall_s: Measure
    drafts: tuple[DecodedDraft, ...]


class DraftDecoding(Record):
    """Decoding in a plain loop of transformers; see ``evals.decode_record.DecodingResult``."""

    tokens: Count
    new_tokens: Count
    temperature: Measure
    runs: Count
    dtype: str
    device: str
    rounded: bool
    identical: bool | None
    domains: tuple[DecodedDomain, ...]


class DraftFacts(Record):
    """What proposes tokens for the result.

    Attributes:
        kind: of it.
        tokens: proposed at a time.
        bytes: of its weights in the folder ``draft``; 0 where they are part of the result's.
        model: how a draft model's source is called, or None.
        training: of a head, or None.
        decoding: with it, or None where that was not measured.
    """

    kind: Kind
    tokens: Count
    bytes: Count
    model: str | None
    training: DraftTraining | None
    decoding: DraftDecoding | None


def speculative_config(facts: DraftFacts, model: str) -> str:
    """JSON for vLLM's ``--speculative-config``; ``model``: the result as the user types it."""
    told: dict[str, object] = {"method": _METHODS[facts.kind]}
    if facts.kind != "native":
        told["model"] = f"{model.rstrip('/')}/{DRAFT_FOLDER}"
    return json.dumps(told | {"num_speculative_tokens": facts.tokens})


def measured_passes(facts: DraftFacts) -> float | None:
    """Tokens a pass: of decoding at the smallest batch, else as held-out texts foretell; None unmeasured."""
    found = proposed(facts)
    proposals = sum(draft.drafts for _, draft in found)
    if proposals:
        return 1 + sum(sum(draft.accepted_at) for _, draft in found) / proposals
    return None if facts.training is None else facts.training.after.length


def proposed(facts: DraftFacts) -> list[tuple[str, DecodedDraft]]:
    """(domain, decoding with the draft itself) at the smallest batch; empty where that was not measured."""
    if facts.decoding is None:
        return []
    batch = min((domain.batch for domain in facts.decoding.domains), default=0)
    return [
        (domain.domain, draft)
        for domain in facts.decoding.domains
        if domain.batch == batch
        for draft in domain.drafts
        if draft.name != _CONTROL
    ]


def draft_caption(facts: DraftFacts) -> str:
    """One line: what proposes, and how it came to it."""
    whose = _WHOSE[facts.kind] + (f", {facts.model}," if facts.model else "")
    stored = f" ({size(facts.bytes)} beside the weights)" if facts.bytes else ""
    text = f"{whose} proposes {facts.tokens} tokens at a time{stored}"
    how = facts.training
    if how is None:
        return text
    text = f"{text}; {number(how.parameters / 1e6, 1)}M numbers"
    if not how.planned_steps:
        return f"{text}, as the source has them"
    tokens = how.steps * how.batch * how.sequence_length
    return f"{text} trained on {tokens:,} tokens in {how.steps:,} steps, {duration(how.seconds)}"


def draft_rows(facts: DraftFacts) -> list[tuple[str, str, str]]:
    """The mean loss and tokens a pass of a few equal stretches of the training."""
    how = facts.training
    if how is None:
        return []
    count = min(_ROWS, how.steps)
    ends = [(part * how.steps // count, (part + 1) * how.steps // count) for part in range(count)]
    return [
        (f"{begin + 1:,} to {end:,}", _mean(how.losses[begin:end], 4), _mean(how.lengths[begin:end], 2))
        for begin, end in ends
    ]


def held_out_rows(facts: DraftFacts) -> list[tuple[str, str, str, str]]:
    """(texts, tokens a pass before training and with what is kept, accepted by place), all and by text."""
    how = facts.training
    if how is None:
        return []
    before = number(how.before.length, 2) if how.planned_steps else "-"
    rows = [("all", before, number(how.after.length, 2), _accepted(how.after))]
    if len(how.by_text) > 1:
        rows += [
            (name, "-", number(found.length, 2), _accepted(found)) for name, found in how.by_text.items()
        ]
    return rows


def decoded_rows(facts: DraftFacts) -> list[tuple[str, ...]]:
    """A row for the draft and for the control, by domain and batch size (``DECODING_HEADS``)."""
    return [] if facts.decoding is None else decoding_rows(facts.decoding.model_dump())


def draft_notes(facts: DraftFacts) -> list[str]:
    """What the figures are, on what texts, and that the text stays the same."""
    notes = [
        "The result verifies every proposed token, so what is written is what it would write alone; how much "
        "faster depends on the machine, the load and the text: measure it there."
    ]
    if facts.decoding is not None:
        notes += decoding_notes(facts.decoding.model_dump())
        notes.append("The control, repeat, proposes the last token once more.")
    how = facts.training
    if how is None:
        return notes
    notes.append(
        "Tokens a pass are estimated from held-out stretches, each place a place to propose from: 1 and the "
        "shares of places where the likeliest tokens are foretold. Decoding accepts what it meets, and "
        "engines drop nothing: theirs may differ by some points."
    )
    texts = ", ".join(how.texts)
    if how.written:
        notes.append(
            f"The result wrote {how.written:,} tokens after stretches of {texts}, at temperature "
            f"{how.temperature:g}; {how.looping:,} of {how.rows + how.held_out_rows + how.looping:,} texts "
            "ran in circles, and were left out."
        )
    else:
        notes.append(f"The texts are {texts}.")
    if how.steps < how.planned_steps:
        notes.append(
            f"Training ended after {how.steps:,} of {how.planned_steps:,} steps: held-out rows were foretold "
            "no better any more."
        )
    if how.planned_steps:
        kept = f"after step {how.best_step:,}" if how.best_step else "before training, which made none better"
        notes.append(f"The values kept are those {kept}, by the loss on held-out rows.")
    return notes


def _accepted(found: DraftMeasure) -> str:
    return " / ".join(percent(share) for share in found.accepted)


def _mean(values: Sequence[float], digits: int) -> str:
    return number(sum(values) / len(values), digits) if values else "-"
