"""Asks an engine about the checkpoint, and about its source for the noise floor; turns answers into facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from compressor.checkpoint.base import Source
from compressor.progress import Progress
from compressor.report.verification import EngineFacts
from compressor.verify.base import EngineAnswer, EngineRequest
from compressor.verify.engine import ask, unsupported_here
from compressor.verify.inputs import equal_before_difference, plain_folder
from compressor.verify.judge import TYPICAL_FLOOR, Distance, Judgement, Verdict, distance, judge
from compressor.verify.models import NEW_TOKENS, Reference
from compressor.verify.server import ServerAnswer, ask_server
from compressor.verify.spec import Dtype


@dataclass(frozen=True)
class Questions:
    """What an engine is asked, and where it lives.

    Attributes:
        python: the interpreter of its environment.
        checkpoint: the folder.
        source: what the noise floor is measured on, or None.
        reference: what its numbers are compared with.
        dtype: what it computes in.
        server: whether it is asked over HTTP too.
        timeout_s: for each of its processes.
        env: further environment variables.
        scratch: a folder for its files.
    """

    python: Path
    checkpoint: Path
    source: Source | None
    reference: Reference
    dtype: Dtype
    server: bool
    timeout_s: float
    env: Mapping[str, str]
    scratch: Path


@dataclass(frozen=True)
class EngineFinding:
    """A verdict with its numbers.

    Attributes:
        facts: as the report tells them.
        rounded: whether they rest on the reference whose activations are rounded as the scheme says.
    """

    facts: EngineFacts
    rounded: bool


def question_engine(asked: Questions, progress: Progress) -> EngineFinding:
    """Loads and scores the checkpoint in the engine, then its source, then asks its server."""
    tokens = asked.reference.tokens
    progress.log("asking the engine about the checkpoint")
    answer = _ask(asked, asked.checkpoint, asked.dtype, progress)
    floor = None
    if answer.error is None and asked.source is not None and asked.reference.source is not None:
        progress.log("asking the engine about the source, for its noise floor")
        of_source = _ask(asked, plain_folder(asked.source, asked.scratch), answer.dtype, progress)
        if of_source.error is None:
            floor = distance(of_source.logprobs, asked.reference.source).mean
        else:
            progress.warn(f"no noise floor was measured: the engine fails on the source: {of_source.error}")
    server = None
    if answer.error is None and asked.server and tokens is not None:
        progress.log("starting the engine's server")
        server = ask_server(
            asked.python,
            asked.checkpoint,
            dtype=answer.dtype,
            prompt_text=tokens.text,
            prompt_ids=tokens.prompts[0],
            scratch=asked.scratch,
            timeout_s=asked.timeout_s,
            progress=progress,
            extra_env=asked.env,
        )
    return engine_facts(answer, asked.reference, floor, server)


def engine_facts(
    answer: EngineAnswer, reference: Reference, floor: float | None, server: ServerAnswer | None
) -> EngineFinding:
    """The verdict on one answer.

    Args:
        answer: about the checkpoint.
        reference: what transformers computed.
        floor: measured mean distance on the unquantized source, or None: the typical one is used.
        server: what the server said, or None where it was not asked.
    """
    found, used_floor, effect, rounded = None, None, None, False
    verdict: Verdict | Literal["failed", "unsupported"]
    if answer.error is not None:
        unsupported = unsupported_here(answer)
        verdict, reason = ("unsupported", unsupported) if unsupported else ("failed", answer.error)
    elif not reference.checkpoint:
        verdict, reason = "undecided", "it loads and answers; there is no reference to compare with"
    else:
        used_floor = TYPICAL_FLOOR[answer.dtype] if floor is None else floor
        found, judged, effect, used_floor, rounded = _compare(answer, reference, used_floor)
        verdict, reason = judged.verdict, judged.reason
    if server is not None and server.error is not None and verdict in ("agrees", "undecided"):
        verdict, reason = "failed", f"its server: {server.error}"
    facts = EngineFacts(
        name=answer.engine,
        version=answer.version,
        device=answer.device,
        dtype=answer.dtype,
        plugins=answer.plugins,
        verdict=verdict,
        reason=reason,
        tokens=found.tokens if found else 0,
        mean_difference=found.mean if found else None,
        max_difference=found.largest if found else None,
        noise_floor=used_floor,
        noise_floor_measured=floor is not None,
        effect=effect,
        greedy_tokens_equal=equal_before_difference(answer.greedy, reference.greedy) if answer.greedy else 0,
        greedy_tokens=sum(map(len, answer.greedy)),
        server=None if server is None else _server_words(server, answer),
    )
    return EngineFinding(facts, rounded)


def _compare(
    answer: EngineAnswer, reference: Reference, floor: float
) -> tuple[Distance, Judgement, float | None, float, bool]:
    """Distance, judgement, effect, floor and whether activations are rounded, for the nearer reference.

    Where a scheme rounds activations, an engine without such kernels may compute with them unrounded: it
    then serves the weights rightly, and says what it serves.
    """
    found, against, words = distance(answer.logprobs, reference.checkpoint), reference.checkpoint, ""
    if reference.rounded is not None:
        rounded = distance(answer.logprobs, reference.rounded)
        if rounded.mean < found.mean:
            found, against = rounded, reference.rounded
            floor = max(floor, reference.rounded_noise)
        else:
            words = ", with unrounded activations"
    effect = None if reference.source is None else distance(against, reference.source).mean
    is_rounded = against is reference.rounded
    judged = judge(found, floor=floor, effect=effect, rounded=is_rounded)
    if reference.unsimulated and judged.verdict == "disagrees":
        judged = replace(judged, verdict="undecided")
        words = "; the scheme rounds activations, which the reference does not simulate for experts"
    return found, replace(judged, reason=judged.reason + words), effect, floor, is_rounded


def _ask(asked: Questions, model: Path, dtype: str, progress: Progress) -> EngineAnswer:
    tokens = asked.reference.tokens
    request = EngineRequest(
        model=str(model.absolute()),
        dtype=dtype,
        windows=tokens.windows if tokens else (),
        prompts=tokens.prompts if tokens else (),
        new_tokens=NEW_TOKENS,
    )
    return ask(
        asked.python,
        request,
        scratch=asked.scratch,
        timeout_s=asked.timeout_s,
        progress=progress,
        extra_env=asked.env,
    )


def _server_words(server: ServerAnswer, answer: EngineAnswer) -> str:
    if server.error is not None:
        return server.error
    asked = "/v1/completions" + (" and /v1/chat/completions" if server.chat is not None else "")
    other = "; its tokenizer made other ids of the text" if server.same_prompt is False else ""
    if not other and server.token_ids and answer.greedy:
        equal = equal_before_difference([server.token_ids], [answer.greedy[0]])
        other = f"; {equal} of {len(server.token_ids)} tokens are those of the engine without it"
    return f"ready after {server.seconds['start']:.0f} s, answers {asked}{other}"
