"""Starts vLLM's OpenAI-compatible server on a checkpoint once, and asks it over HTTP as a client would."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from compressor.progress import Progress
from compressor.verify.engine import WORKER
from compressor.verify.process import ended, engine_environment, how_it_ended, last_line, running

NEW_TOKENS = 16
CHAT_QUESTION = "What is the capital of France?"

_POLL_S = 0.5
_ANSWER_BYTES = 1 << 20
# Ctrl-C ends it in an orderly way; it may be stuck in a kernel.
_PATIENCE = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0))


@dataclass(frozen=True)
class ServerAnswer:
    """What the server said.

    Attributes:
        version: of the engine, by its own word.
        models: the names that it lists.
        same_prompt: whether its tokenizer made the expected ids of the text; None if it did not say.
        text: the greedy continuation of the text.
        token_ids: of the continuation; empty if it did not say.
        chat: its answer to a chat message, or None where the checkpoint has no chat template.
        error: None, or what went wrong, a sentence.
        seconds: until it was ready (``start``), and for the requests (``ask``).
    """

    version: str = ""
    models: tuple[str, ...] = ()
    same_prompt: bool | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    chat: str | None = None
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class _ServerError(Exception):
    """The server is not there, or says no."""


def ask_server(
    python: Path,
    model_folder: Path,
    *,
    dtype: str,
    prompt_text: str,
    prompt_ids: Sequence[int],
    scratch: Path,
    timeout_s: float,
    progress: Progress,
    extra_env: Mapping[str, str] | None = None,
) -> ServerAnswer:
    """Starts the server, asks it, and ends it; every failure is told in the answer's ``error``.

    Args:
        python: from ``find_engine_python``.
        model_folder: the checkpoint.
        dtype: as in ``EngineRequest``.
        prompt_text: what is continued, without special tokens.
        prompt_ids: its token ids as a client's request gets them: with the special tokens that the tokenizer
            adds itself.
        scratch: an existing folder for the server's log.
        timeout_s: for all of it, seconds.
        progress: hears where the log is.
        extra_env: environment variables on top of ours.
    """
    folder = Path(mkdtemp(prefix="serve-", dir=scratch))
    log, port = folder / "server.log", _free_port()
    progress.log(f"the server's log: {log}")
    command = [str(python), str(WORKER), "serve", str(model_folder.absolute()), dtype, str(port)]
    started = time.monotonic()
    server = _Server(f"http://127.0.0.1:{port}", started + timeout_s)
    env = engine_environment(python, extra_env or {})
    died = None
    with running(command, log=log, env=env, patience=_PATIENCE) as process:
        try:
            server.wait_until_ready(process)
            ready = time.monotonic()
            answer = _question(server, model_folder, prompt_text, prompt_ids)
            seconds = {"start": ready - started, "ask": time.monotonic() - ready}
        except _ServerError as error:
            died = ended(process, 0.0)
            answer, seconds = ServerAnswer(error=str(error)), {}
    if died:
        # Only now is its exit status known.
        answer = ServerAnswer(error=f"the server {how_it_ended(process)}; its last line: {last_line(log)}")
    return replace(answer, seconds=seconds)


class _Server:
    """One server and the time until which it may answer."""

    def __init__(self, url: str, deadline: float) -> None:
        self._url = url
        self._deadline = deadline
        # Without the proxy that the environment may name.
        self._opener = build_opener(ProxyHandler({}))

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        while True:
            if ended(process, _POLL_S):
                raise _ServerError("it ended while it started")
            try:
                self.ask("/health")
            except _ServerError as error:
                if self._left() <= 0:
                    raise _ServerError(f"not ready in time: {error}") from error
            else:
                return

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET, or POST where there is a body; the JSON of the response, None if it is empty."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=max(1.0, self._left())) as response:
                raw = response.read(_ANSWER_BYTES)
            return json.loads(raw) if raw else None
        except HTTPError as error:
            said = error.read(_ANSWER_BYTES).decode("utf-8", "replace")
            raise _ServerError(f"{path} answers {error.code}: {' '.join(said.split())[:300]}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise _ServerError(f"{path}: {error}") from error

    def _left(self) -> float:
        return self._deadline - time.monotonic()


def _question(
    server: _Server, model_folder: Path, prompt_text: str, prompt_ids: Sequence[int]
) -> ServerAnswer:
    """Version, list of models, a completion, and a chat message where there is a template for it."""
    try:
        models = tuple(str(model["id"]) for model in server.ask("/v1/models")["data"])
        model = str(model_folder.absolute())
        if model not in models:  # another program took the port
            raise _ServerError(f"a server of something else answers: {', '.join(models)[:200]}")
        plain = {"model": model, "temperature": 0.0, "max_tokens": NEW_TOKENS}
        choice = server.ask("/v1/completions", {**plain, "prompt": prompt_text, "return_token_ids": True})[
            "choices"
        ][0]
        chat = None
        if _has_chat_template(model_folder):
            messages = [{"role": "user", "content": CHAT_QUESTION}]
            said = server.ask("/v1/chat/completions", {**plain, "messages": messages})
            chat = str(said["choices"][0]["message"]["content"])
        seen = choice.get("prompt_token_ids")
        return ServerAnswer(
            version=str(server.ask("/version")["version"]),
            models=models,
            same_prompt=None if seen is None else list(seen) == list(prompt_ids),
            text=str(choice["text"]),
            token_ids=tuple(choice.get("token_ids") or ()),
            chat=chat,
        )
    except (KeyError, IndexError, TypeError) as error:
        what = f"{type(error).__name__} {error}"
        raise _ServerError(f"its answer is not the OpenAI API's: {what}") from error


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
