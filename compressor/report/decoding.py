"""Decoding with proposed tokens in words: tables of ``evals.decode_record.DecodingResult.to_json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.words import counted

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
    runs = measured["runs"]
    timed = "one timed run" if runs == 1 else f"medians of {runs} alternating runs"
    notes = [
        f"{measured['tokens']} tokens proposed at a time, continuations of up to {measured['new_tokens']} "
        f"tokens, {how}, {measured['dtype']}, {measured['device']}, transformers; {timed}, prompts included. "
        "Rates are of all proposals."
    ]
    looping = sum(domain["looping"] for domain in measured["domains"])
    if looping:
        verbs = "runs in circles is" if looping == 1 else "run in circles are"
        notes.append(f"{counted(looping, 'continuation')} that {verbs} left out.")
    gaps = [
        abs(one["gap"])
        for domain in measured["domains"]
        for draft in domain["drafts"]
        for one in draft["divergences"] or ()
    ]
    if gaps:
        differ = "differs" if len(gaps) == 1 else "differ"
        notes.append(
            f"{counted(len(gaps), 'continuation')} {differ} from plain decoding's; where each first does, "
            f"the two tokens' logits are at most {max(gaps):.3g} apart."
            + (" Inputs are rounded to few bits, and a last bit decides how." if measured["rounded"] else "")
        )
    elif measured["identical"] and any(domain["drafts"] for domain in measured["domains"]):
        notes.append("All continuations are plain decoding's, token by token.")
    return notes
