"""Decoding with proposed tokens in words: tables of ``evals.decode_record.DecodingResult.to_json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECODING_HEADS = (
    *("text", "at once", "proposed by", "tokens a pass", "accepted by place", "speedup", "same text"),
)


def decoding_rows(measured: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each drafter, by domain and batch size."""
    made: list[tuple[str, ...]] = []
    for domain in measured["domains"]:
        place = (domain["domain"], str(domain["batch"]))
        if not domain["drafts"]:
            made.append((*place, "-", "-", "-", "-", "-"))
        for draft in domain["drafts"]:
            differ = draft["divergences"]
            same = "-" if differ is None else f"{domain['prompts'] - len(differ)} of {domain['prompts']}"
            made.append(
                (
                    *place,
                    draft["name"],
                    f"{draft['length']:.2f}",
                    " ".join(f"{rate:.0%}" for rate in draft["rates"]),
                    f"{draft['speedup']:.2f}x",
                    same,
                )
            )
    return made


def decoding_notes(measured: Mapping[str, Any]) -> list[str]:
    """How it was measured, what was left out, and how near the ties are where texts differ."""
    how = "greedy" if measured["temperature"] == 0 else f"sampled at {measured['temperature']:g}"
    notes = [
        f"{measured['tokens']} tokens proposed at a time, continuations of up to {measured['new_tokens']} "
        f"tokens, {how}, {measured['dtype']}, {measured['device']}, transformers; medians of "
        f"{measured['runs']} alternating runs, prompts included. Rates are of all proposals."
    ]
    looping = sum(domain["looping"] for domain in measured["domains"])
    if looping:
        notes.append(f"{looping} continuations that run in circles are left out.")
    gaps = [
        abs(one["gap"])
        for domain in measured["domains"]
        for draft in domain["drafts"]
        for one in draft["divergences"] or ()
    ]
    if gaps:
        notes.append(
            f"{len(gaps)} continuations differ from plain decoding's; where each first does, the two tokens' "
            f"logits are at most {max(gaps):.3g} apart."
            + (" Inputs are rounded to few bits, and a last bit decides how." if measured["rounded"] else "")
        )
    return notes
