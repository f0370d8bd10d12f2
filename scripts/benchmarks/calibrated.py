"""Calibrated quantization by this package and by its peers: one model, one set of tokens, one text."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks.ours import heard_tokens, recipe_text, run_ours
from scripts.benchmarks.process import (
    ROOT,
    SOURCE,
    Failed,
    bf16_folder,
    evaluate,
    is_demo,
    machine,
    measured,
    own_command,
    shown,
    spread,
    tensor_bytes,
)
from scripts.benchmarks.settings import PACKAGES, Setting, chosen
from scripts.benchmarks.table import render

WORKERS = ROOT / "scripts" / "benchmarks" / "peers"
_PREPARE = (sys.executable, "-m", "scripts.benchmarks.prepare")
COSTS = ("quantize_s", "save_s", "wall_s", "cpu_s", "peak_rss_bytes", "peak_device_bytes")


class Bench:
    """One measurement: its settings, and the files that every run of it reads.

    Args:
        options: of the command line.
        setting_list: the rows of the table.
    """

    def __init__(self, options: argparse.Namespace, setting_list: list[Setting]) -> None:
        self.options = options
        self.settings = setting_list
        self.work: Path = options.work / f"{options.benchmark}-{options.scheme}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.source = bf16_folder(options.work, options.model)
        self.limit_s: float = options.limit_minutes * 60
        self.ids = self.work / "ids.safetensors"
        self.heldout = self.work / "heldout.safetensors"
        self.errors: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}

    def prepare(self) -> None:
        """Calibration tokens, made once and read by all."""
        recipe = self.work / "tokens.yaml"
        recipe.write_text(self._recipe({"kind": "rtn"}))
        measured([*_PREPARE, "tokens", recipe, self.source, self.ids])

    def prepare_heldout(self) -> None:
        """Evaluation tokens, for the peers whose formats only they read."""
        text = [self.options.text, str(self.options.tokens)]
        measured([*_PREPARE, "heldout", *text, self.source, self.heldout])

    def once(self, setting: Setting, *, saving: bool = True) -> dict[str, Any]:
        """One run of one setting; its costs. Without ``saving``, a peer's checkpoint stays in memory.

        Raises:
            Failed: it cannot be run.
            Late: it took longer than it may; see ``beat`` for what is known.
        """
        target = self.target(setting)
        shutil.rmtree(target, ignore_errors=True)
        if setting.impossible is not None:
            raise Failed(setting.impossible)
        if setting.peer == "compressor":
            recipe = target.with_suffix(".yaml")
            recipe.write_text(self._recipe(setting.options))
            made = run_ours(recipe, target, self.limit_s)
            heard = heard_tokens(target)
            if heard is not None and _ids(heard) != _ids(self.ids):
                raise Failed("heard other calibration tokens than its peers")
            return made
        return self._worker(setting.peer, target, setting.options, saving)

    def forward(self) -> dict[str, Any]:
        """One bare forward pass of the calibration tokens."""
        return self._worker("forward", self.work / "forward", {})

    def evaluate(self, setting: Setting) -> dict[str, Any]:
        """Perplexity and KL of the setting's checkpoint, as it lies on disk.

        Raises:
            Failed: neither this package nor the peer reads it.
        """
        target, options = self.target(setting), self.options
        try:
            found = evaluate(target, self.source, options.text, options.tokens)
            return {**found, "evaluated_by": "compress eval"}
        except Failed:
            if setting.peer not in ("gptqmodel", "modelopt", "autoround"):
                raise
        report = target.with_suffix(".evaluation.json")
        script = WORKERS / "evaluate.py"
        python = peer_python(setting.peer)
        measured([python, script, self.source, target, self.heldout, setting.peer, report])
        return {**json.loads(report.read_text()), "evaluated_by": script.name}

    def beat(self, setting: Setting) -> dict[str, Any]:
        """What a peer's stopped run had told: ``elapsed_s``, ``marks_s`` and its peaks; or nothing."""
        file = self.target(setting).with_suffix(".report.beat")
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def target(self, setting: Setting) -> Path:
        """The folder of the setting's checkpoint."""
        return self.work / setting.slug

    def _worker(
        self, peer: str, target: Path, options: dict[str, Any], saving: bool = True
    ) -> dict[str, Any]:
        report, job = target.with_suffix(".report.json"), target.with_suffix(".job.json")
        for stale in (report, report.with_suffix(".beat")):
            stale.unlink(missing_ok=True)
        facts = {"source": self.source, "target": target, "ids": self.ids, "report": report}
        how = {"scheme": self.options.scheme, "options": options, "saving": saving}
        job.write_text(json.dumps({name: str(path) for name, path in facts.items()} | how))
        command = [peer_python(peer), WORKERS / f"run_{peer}.py", job]
        found = measured(command, limit_s=self.limit_s)
        told = json.loads(report.read_text())
        self.versions[peer] = told["versions"]
        return {**{key: found[key] for key in ("wall_s", "cpu_s", "peak_rss_bytes")}, "save_s": 0.0, **told}

    def _recipe(self, solver: dict[str, Any]) -> str:
        options = self.options
        texts = options.calibration or ()
        return recipe_text(self.source, options.scheme, solver, options.samples, options.length, texts)


def calibrated(options: argparse.Namespace) -> dict[str, Any]:
    """Every setting in turn, ``--rounds`` times, every other round backwards; prints the table."""
    bench = Bench(options, chosen(options.scheme, options.ours, options.peers, options.only))
    bench.prepare()
    bench.prepare_heldout()
    runs: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in bench.settings}
    forwards = []
    for number in range(options.rounds):
        forwards.append(bench.forward())
        for setting in bench.settings if number % 2 == 0 else reversed(bench.settings):
            if setting.name in bench.errors:
                continue
            try:
                runs[setting.name].append(bench.once(setting))
            except Failed as error:
                bench.errors[setting.name] = str(error)
            # What an interrupted measurement leaves.
            (bench.work / "runs.json").write_text(json.dumps({"runs": runs, "errors": bench.errors}))
            print(_progress(number, setting, runs, bench.errors), file=sys.stderr, flush=True)
    result = {
        "scheme": options.scheme,
        "model": shown(options.model or SOURCE),
        "is_demo_model": is_demo(options.model),
        "samples": options.samples,
        "length": options.length,
        "calibration": [shown(text) for text in options.calibration or ()],
        "text": shown(options.text),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "command": own_command(),
        "machine": machine(),
        "versions": bench.versions,
        "forward": {
            "seconds": spread([run["quantize_s"] for run in forwards]),
            "dtype": forwards[0]["dtype"],
            "read_s": spread([run["read_s"] for run in forwards]),
        },
        "rows": {setting.name: _row(bench, setting, runs[setting.name]) for setting in bench.settings},
    }
    print(render(result))
    return result


def _row(bench: Bench, setting: Setting, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result: costs over all rounds, bytes, figures; or ``error``."""
    if setting.name in bench.errors:
        return {"error": bench.errors[setting.name]}
    try:
        figures = bench.evaluate(setting)
    except Failed as error:
        return {"error": f"its checkpoint cannot be evaluated: {error}", "rounds": runs}
    return {
        "options": setting.options,
        "quantize_s": spread([run["quantize_s"] + run["save_s"] for run in runs]),
        "cpu_s": spread([run["cpu_s"] for run in runs]),
        "process_s": spread([run["wall_s"] for run in runs]),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "peak_device_bytes": max(run["peak_device_bytes"] for run in runs),
        "bytes": tensor_bytes(bench.target(setting)),
        **figures,
        "text": shown(bench.options.text),
        "helped": runs[0].get("helped"),
        "rounds": [{key: run[key] for key in COSTS} | _stages(run) for run in runs],
    }


def _stages(run: dict[str, Any]) -> dict[str, Any]:
    return {"stages": run["stages"]} if "stages" in run else {}


def _progress(
    number: int, setting: Setting, runs: dict[str, list[dict[str, Any]]], errors: dict[str, str]
) -> str:
    if setting.name in errors:
        return f"round {number + 1}: {setting.name}: {errors[setting.name]}"
    return f"round {number + 1}: {setting.name}: {runs[setting.name][-1]['wall_s']:.1f} s"


def peer_python(peer: str) -> Path:
    """The Python of a peer's own environment; this one where it holds the peer's package.

    Raises:
        Failed: neither is there.
    """
    own = ROOT / f".venv-peer-{peer}" / "bin" / "python"
    if own.exists():
        return own
    package = PACKAGES.get(peer)
    if package is not None:
        look = f"import sys, importlib.util as u; sys.exit(u.find_spec({package!r}) is None)"
        if subprocess.run([sys.executable, "-c", look], check=False).returncode:
            raise Failed(f"not installed: run bash scripts/peers_env.sh {peer}")
    return Path(sys.executable)


def _ids(file: Path) -> bytes:
    """The bytes of the tensor ``ids`` of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(size))["ids"]["data_offsets"]
        opened.seek(8 + size + begin)
        return opened.read(end - begin)
