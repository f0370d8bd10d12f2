"""A package ``vllm`` that answers from arithmetic, or misbehaves as told, and where to import it from."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Log-probability of token t: minus a tenth of it. A continuation counts on from the prompt's last token.
_ENGINE = """
import json, os, signal, subprocess, sys, time

__version__ = "0.0.1"
MODE = os.environ.get("FAKE_MODE", "")
NOTES = os.environ["FAKE_NOTES"]


def note(name, value):
    with open(os.path.join(NOTES, name), "w") as file:
        json.dump(value, file)


def misbehave(stage):
    if MODE == f"raise in {stage}":
        raise ValueError("first line\\n  second line")
    if MODE == f"crash in {stage}":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if MODE == f"hang in {stage}":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note("pids", [os.getpid(), child.pid])
        time.sleep(600)


class Bag:
    def __init__(self, **fields):
        self.__dict__.update(fields)


SamplingParams = Bag


class LLM:
    def __init__(self, model, **settings):
        note("load", {"model": model, "settings": settings, "env": dict(os.environ), "path": sys.path})
        misbehave("load")
        self.llm_engine = Bag(model_config=Bag(quantization="compressed-tensors"))

    def generate(self, prompts, sampling, use_tqdm):
        misbehave("score")
        return [self.answer(prompt["prompt_token_ids"], sampling) for prompt in prompts]

    def answer(self, ids, sampling):
        logprobs = [None] + [{token: Bag(logprob=-token / 10)} for token in ids[1:]]
        count = sampling.max_tokens - (MODE == "answer too little" and sampling.max_tokens > 1)
        tokens = [ids[-1] + 1 + step for step in range(count)]
        return Bag(prompt_logprobs=logprobs, outputs=[Bag(token_ids=tokens)])


misbehave("import")
"""

_PLATFORMS = """
class current_platform:
    is_cpu = staticmethod(lambda: True)
"""

_SERVER = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

from vllm import MODE, note

note("arguments", sys.argv)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
note("pids", [os.getpid(), child.pid])
model = sys.argv[sys.argv.index("--model") + 1] if "--model" in sys.argv else sys.argv[2]
if MODE == "die":
    print("RuntimeError: no such kernel", flush=True)
    sys.exit(3)
if MODE == "never ready":
    time.sleep(600)
if MODE == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/health": None,
            "/version": {"version": "0.0.1"},
            "/v1/models": {"data": [{"id": model}]},
        }
        self.say(200, answers[self.path])

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(self.path.removeprefix("/v1/").replace("/", "-"), asked)
        if MODE == "refuse":
            self.say(400, {"error": {"message": "bad request"}})
        elif MODE == "babble":
            self.say(200, {"choices": []})
        elif self.path == "/v1/completions":
            ids = {"prompt_token_ids": [1, 2], "token_ids": [7, 8]} if MODE != "no ids" else {}
            self.say(200, {"choices": [{"text": " continued", **ids}]})
        else:
            self.say(200, {"choices": [{"message": {"content": "Paris"}}]})

    def say(self, status, answer):
        raw = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@dataclass(frozen=True)
class FakeVllm:
    """A folder for PYTHONPATH, and one in which the fake notes what it was asked."""

    packages: Path
    notes: Path

    def env(self, mode: str = "") -> dict[str, str]:
        """The variables that make an engine's interpreter import the fake."""
        return {"PYTHONPATH": str(self.packages), "FAKE_NOTES": str(self.notes), "FAKE_MODE": mode}

    def noted(self, name: str) -> Any:
        """What the fake wrote down, waiting for it if need be."""
        path = self.notes / name
        deadline = time.monotonic() + 30
        while not (path.is_file() and path.stat().st_size):
            assert time.monotonic() < deadline, f"the fake did not note {name}"
            time.sleep(0.02)
        return json.loads(path.read_text())

    def all_gone(self) -> bool:
        """Whether its processes are dead within seconds (nobody may have reaped them)."""
        deadline = time.monotonic() + 10
        while any(map(_alive, self.noted("pids"))):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def fake_vllm(folder: Path) -> FakeVllm:
    """Writes the package below ``folder``."""
    packages, notes = folder / "packages", folder / "notes"
    notes.mkdir()
    _write(packages / "vllm/__init__.py", _ENGINE)
    _write(packages / "vllm/platforms.py", _PLATFORMS)
    _write(packages / "vllm/entrypoints/openai/api_server.py", _SERVER)
    _write(packages / "vllm/entrypoints/cli/main.py", _SERVER)
    return FakeVllm(packages, notes)


def add_distribution(packages: Path, name: str, entry_points: str = "") -> None:
    """Makes a distribution known to ``importlib.metadata``."""
    folder = packages / f"{name.replace('-', '_')}-1.0.dist-info"
    _write(folder / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    _write(folder / "entry_points.txt", entry_points)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
