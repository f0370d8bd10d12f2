"""Serves a result by vLLM with and without its draft: tokens a second, and how many of a draft's stay.

    python scripts/draft_serving.py --output FOLDER --python PYTHON_WITH_VLLM [--source BF16_FOLDER]

``plain``, ``draft`` and ``source`` are a process each, all of them loaded at once. They are measured by
turns, cell by cell (a domain at a concurrency), ``--rounds`` times, as far as ``--minutes`` allow. Prompts
are those of `compress eval --draft`; those that the result answers in circles are left out. Decoding is
greedy, and goes on behind ends of text. Acceptance is vLLM's own count. Result, written as it grows:
``bench/results/draft-serving.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.data import find  # noqa: E402
from compressor.errors import UserError  # noqa: E402
from compressor.evals.decode_compare import loops  # noqa: E402
from compressor.evals.decode_record import Acceptance  # noqa: E402
from compressor.evals.decode_spec import SHIPPED_DOMAINS  # noqa: E402
from compressor.evals.decode_texts import prompts_of  # noqa: E402
from compressor.evals.run import leading_token  # noqa: E402
from compressor.model.load import load_tokenizer  # noqa: E402
from compressor.report.drafts import speculative_config  # noqa: E402
from compressor.report.model import load_report  # noqa: E402
from compressor.verify.process import engine_environment  # noqa: E402
from scripts.benchmarks.process import Failed, machine, spread  # noqa: E402

WORKER = Path(__file__).with_name("draft_serving_worker.py")
RESULT = ROOT / "bench/results/draft-serving.json"
HEADS = ("text", "at once", "engine", "tokens/s", "x plain", "tokens a pass", "accepted by place", "as alone")
NOTE = (
    "Tokens/s: median (least to most) of the rounds. As alone: answers that are, token by token, those of "
    "`plain` at the first concurrency; in 16 bit, batches of other sizes round otherwise, so that those of "
    "`plain` differ, too."
)
CLAIMS = "The literature reports 2.5, 3 and 5 x, by kind of text, for larger models."
_ERROR = re.compile(r"(\[rank0\]: )?[A-Za-z_][\w.]*(Error|Exception): ")
# All in one process, no telemetry, nothing that is compiled at a first call.
_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Server:
    """A worker's process: it loads while others do, and answers a line with a line."""

    def __init__(self, name: str, python: Path, engine: Mapping[str, Any], work: Path) -> None:
        self._name, self._log = name, work / f"{name}.log"
        task = work / f"{name}.json"
        task.write_text(json.dumps(engine))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, WORKER, task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=engine_environment(python, _ENGINE),
                cwd=work,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *fault: object) -> None:
        # Of its group, too, what an engine may have started.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def asked(self, until: float, **told: Any) -> dict[str, Any]:
        """Sends a line and waits for its answer; errors as ``answer``."""
        self.ask(**told)
        return self.answer(until)

    def ask(self, **told: Any) -> None:
        """Sends a line; that the process has ended is found by ``answer``."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, until: float) -> dict[str, Any]:
        """Waits for a line.

        Raises:
            Failed: the process ended, or has not answered by then (seconds of ``time.monotonic``).
        """
        assert self._process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not waiting.select(max(0.0, until - time.monotonic())):
                    raise Failed(f"{self._name}: no answer in time; see {self._log}")
                part = self._process.stdout.read1(2**20)  # type: ignore[attr-defined]
                if not part:
                    raise Failed(f"{self._name}: {self._reason()}; see {self._log}")
                line += part
        found: dict[str, Any] = json.loads(line)
        return found

    def _reason(self) -> str:
        """The last error in its log, where lines may begin with the process's rank."""
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("[rank0]: ") for line in lines if _ERROR.match(line)]
        return errors[-1][:300] if errors else f"ended with exit status {self._process.wait()}"


@dataclass
class Cell:
    """A domain at a concurrency in one configuration; what is written is the same in each round.

    Attributes:
        speeds: output tokens a second, of each round.
        acceptance: of the first round; None without a draft.
        looping: answers that run in circles. At concurrency 1 they are left out of ``acceptance``.
        alike: answers that are those of ``plain`` at the first concurrency; None for the source.
        requests: that were answered.
    """

    speeds: list[float] = field(default_factory=list)
    acceptance: Acceptance | None = None
    looping: int = 0
    alike: int | None = None
    requests: int = 0

    def add(self, found: Mapping[str, Any], usual: Sequence[Sequence[int]] | None) -> None:
        """Another round's answer. ``usual``: of ``plain`` alone, by prompt."""
        ids = found["ids"]
        self.speeds.append(sum(map(len, ids)) / found["wall_s"])
        if len(self.speeds) > 1:
            return
        circles = [loops(one) for one in ids]
        self.requests, self.looping = len(ids), sum(circles)
        if usual is not None:
            self.alike = sum(one == usual[place % len(usual)] for place, one in enumerate(ids))
        counts = found["counts"]
        if len(counts) == len(ids):
            counts = [count for count, circle in zip(counts, circles, strict=True) if not circle]
        if counts and len(counts[0]) > 1:
            parts = [Acceptance(count[0], tuple(count[1:])) for count in counts]
            self.acceptance = Acceptance.sum(parts, len(counts[0]) - 1)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        told = {"requests": self.requests, "looping": self.looping, "as_alone": self.alike}
        kept = None if self.acceptance is None else self.acceptance.to_json()
        return {"tokens_per_s": spread(self.speeds), "speeds": self.speeds, **told, "acceptance": kept}


Key = tuple[int, str, str]  # concurrency, domain, configuration


def main(words: Sequence[str] | None = None) -> None:
    """Loads all configurations, measures them by turns, and prints the table."""
    asked = _arguments(words)
    until = time.monotonic() + 60 * asked.minutes
    asked.work.mkdir(parents=True, exist_ok=True)
    drafts = load_report(asked.output).drafts
    if drafts is None:
        raise Failed(f"{asked.output}: its report.json tells of no draft")
    config = json.loads(speculative_config(drafts, str(asked.output)))
    models: dict[str, tuple[Path, dict[str, Any]]] = {
        "plain": (asked.output, {}),
        "draft": (asked.output, {"speculative_config": config}),
    }
    if asked.source is not None:
        models["source"] = (asked.source, {})
    facts: dict[str, Any] = {
        "kind": drafts.kind,
        "tokens": drafts.tokens,
        "new_tokens": asked.new,
        "prompt_tokens": asked.prompt_tokens,
        "machine": machine(),
    }
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(Server(name, asked.python, _engine(asked, folder, more), asked.work))
            for name, (folder, more) in models.items()
        }
        candidates = _candidates(asked)
        facts["engines"] = {name: server.answer(until) for name, server in servers.items()}
        print(json.dumps(facts["engines"]), file=sys.stderr, flush=True)
        prompts = _chosen(asked, servers["plain"], candidates, until)
        facts["prompts"] = {domain: len(ids) for domain, ids in prompts.items()}
        if not prompts:
            raise Failed("every answer of every domain runs in circles: there is nothing to measure on")
        _warm(asked, servers, next(iter(prompts.values())), until)
        measure(asked, servers, prompts, facts, until)


def _candidates(asked: argparse.Namespace) -> dict[str, list[list[int]]]:
    tokenizer = load_tokenizer(asked.output)
    first = leading_token(tokenizer)
    return {
        domain: [
            ids_T.tolist()
            for ids_T in prompts_of(
                tokenizer, find(SHIPPED_DOMAINS[domain]), asked.candidates, asked.prompt_tokens, first=first
            )
        ]
        for domain in asked.domains
    }


def measure(
    asked: argparse.Namespace,
    servers: Mapping[str, Server],
    prompts: Mapping[str, list[list[int]]],
    facts: dict[str, Any],
    until: float,
) -> None:
    """Rounds over all cells, the configurations of a cell one after another; writes as it goes.

    Ends before a cell that took longer the last time than there is time left.

    Raises:
        Failed: a process ended, or does not answer in time; what was measured is written.
    """
    cells: dict[Key, Cell] = {}
    usual: dict[str, list[list[int]]] = {}
    took_s: dict[tuple[int, str], float] = {}
    try:
        for turn in range(asked.rounds):
            for concurrency, (domain, ids) in product(asked.concurrency, prompts.items()):
                began = time.monotonic()
                if began + took_s.get((concurrency, domain), 0.0) > until:
                    print("the time is over", file=sys.stderr, flush=True)
                    return
                # Two requests for each place at once, so that most of the time all are taken.
                many = ids if concurrency == 1 else cycled(ids, max(len(ids), 2 * concurrency))
                for name, server in servers.items():
                    found = server.asked(until, ids=many, concurrency=concurrency, new=asked.new)
                    if name == "plain":
                        usual.setdefault(domain, found["ids"])
                    cell = cells.setdefault((concurrency, domain, name), Cell())
                    cell.add(found, None if name == "source" else usual[domain])
                took_s[concurrency, domain] = time.monotonic() - began
                _write(facts, cells)
            print(f"round {turn + 1}: {until - time.monotonic():.0f} s left", file=sys.stderr, flush=True)
    finally:
        if cells:
            print(render(_write(facts, cells)), flush=True)


def cycled(ids: list[list[int]], count: int) -> list[list[int]]:
    """So many prompts, the first ones anew behind the last."""
    return [ids[place % len(ids)] for place in range(count)]


def _chosen(
    asked: argparse.Namespace, server: Server, candidates: Mapping[str, list[list[int]]], until: float
) -> dict[str, list[list[int]]]:
    """The first prompts of each domain that the result does not answer in circles."""
    found = {}
    for domain, ids in candidates.items():
        written = server.asked(until, ids=ids, concurrency=max(asked.concurrency), new=asked.new)["ids"]
        straight = [prompt for prompt, answer in zip(ids, written, strict=True) if not loops(answer)]
        print(f"{domain}: {len(ids) - len(straight)} of {len(ids)} answers loop", file=sys.stderr, flush=True)
        if straight:
            found[domain] = straight[: asked.prompts]
    return found


def _warm(
    asked: argparse.Namespace, servers: Mapping[str, Server], ids: list[list[int]], until: float
) -> None:
    """Shapes of every concurrency, in all processes at once: programs for them are compiled now."""
    for concurrency in asked.concurrency:
        for server in servers.values():
            server.ask(ids=cycled(ids, 2 * concurrency), concurrency=concurrency, new=min(asked.new, 16))
        for server in servers.values():
            server.answer(until)


def _write(facts: Mapping[str, Any], cells: Mapping[Key, Cell]) -> dict[str, Any]:
    rows = [
        {"concurrency": concurrency, "domain": domain, "engine": name, **cell.to_json()}
        for (concurrency, domain, name), cell in cells.items()
    ]
    result = {**facts, "cells": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return result


def render(result: Mapping[str, Any]) -> str:
    """A Markdown table of a result file, and the claims that it stands beside."""
    plain = {
        (row["concurrency"], row["domain"]): row["tokens_per_s"]["median"]
        for row in result["cells"]
        if row["engine"] == "plain"
    }
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in result["cells"]:
        speed, kept = row["tokens_per_s"], row["acceptance"]
        cells = [
            row["domain"],
            str(row["concurrency"]),
            row["engine"],
            f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})",
            f"{speed['median'] / plain[row['concurrency'], row['domain']]:.2f}",
            "" if kept is None else f"{kept['length']:.2f}",
            "" if kept is None else " / ".join(f"{rate:.0%}" for rate in kept["rates"]),
            "" if row["as_alone"] is None else f"{row['as_alone']} of {row['requests']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTE, CLAIMS])


def _engine(asked: argparse.Namespace, folder: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    return {
        "model": str(folder),
        "dtype": asked.dtype,
        "max_model_len": 2 * (asked.prompt_tokens + asked.new),
        "max_num_seqs": max(asked.concurrency),
        "kv_cache_memory_bytes": int(asked.gib * 2**30),
        # Only checked to be free: the bytes above count.
        "gpu_memory_utilization": 0.1,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
        **asked.engine,
        **more,
    }


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a result with a draft")
    parser.add_argument("--source", type=Path, help="its source as a 16-bit folder")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "draft-serving", help="for logs")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-serve/bin/python")
    parser.add_argument("--domains", nargs="+", default=list(SHIPPED_DOMAINS), choices=SHIPPED_DOMAINS)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, default=16, help="of each domain, at most")
    parser.add_argument("--candidates", type=int, default=48, help="that they are taken from")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="after them everything is stopped")
    parser.add_argument("--gib", type=float, default=2.0, help="of memory for each cache")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of vllm.LLM's arguments, as JSON")
    asked = parser.parse_args(words)
    for name in ("output", "source", "work", "python"):
        given = getattr(asked, name)
        # A link in a virtual environment says which one it is.
        setattr(asked, name, given and given.absolute())
    return asked


if __name__ == "__main__":
    try:
        main()
    except (UserError, Failed) as fault:
        sys.exit(str(fault))
