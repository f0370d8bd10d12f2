"""docs/serving.md from measured cells: nothing in its tables is typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """# What serves what

Written by `python scripts/serving_matrix.py render` from `bench/results/serving-*.json`; do not edit.

Each cell is a checkpoint that `compress run` made and vLLM loaded: SmolLM2-135M-Instruct, and tiny random
models of the other families. "agrees" means that vLLM's prompt log-probabilities are as near to those of
transformers on the decoded weights as the noise of its arithmetic allows. The three numbers are, in nats a
token: the mean difference; the noise floor, which is the same difference for the unquantized source; and the
effect of quantization, decoded weights against the source, both by transformers. Text is no evidence: a wrong
scale still reads fluently.

- **emulated**: this build of vLLM has no kernel for the format on the device. A test-only plug-in
  (`tests/serve/plugin`) dequantizes when loading and leaves activations unrounded, so that vLLM's own loader,
  layout and handling of scales are proven, and its kernels are not.
- **no kernel**: vLLM refuses the format there, with its reason. On CPUs without AMX it has none
  for FP8_BLOCK and for experts in INT4 either.
- **rounded**: the engine rounds activations, as the format asks, which turns the least difference into
  another code. Two right programs are then about as far apart as source and result, and only gross faults
  would show; where none does, the rest is undecided. The noise floor is that of the checkpoint itself,
  float32 against bfloat16 by transformers.
- **undecided**: the noise is as large as the effect, or the reference cannot do what the format asks for.
- **not made**: no recipe makes this combination, with the reason.

Llama 4's NVFP4 experts disagree on the GPU, while a checkpoint of the same recipe agrees through the plug-in
on CPU. vllm-project/vllm#43694 says of vLLM's CUTLASS kernels that they apply the router's weights of such
experts twice; whether that is the cause here is not established.

`compress verify CHECKPOINT` does the same for any checkpoint. Text Generation Inference (in maintenance mode)
reads the same compressed-tensors files; TensorRT-LLM and SGLang read the ModelOpt dialect
(`export: {format: modelopt}`). None of these three was run.
"""


def render(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page, from the rows of each results file."""
    return HEAD + "".join(_section(rows) for rows in results.values() if rows)


def _section(rows: Sequence[Mapping[str, Any]]) -> str:
    engines = sorted({_program(row["engine"]) for row in rows if row["engine"]})
    formats = list(dict.fromkeys(row["format"] for row in sorted(rows, key=lambda row: row["format"])))
    families = list(dict.fromkeys(row["family"] for row in rows))
    cells = {(row["family"], row["format"]): row for row in rows}
    lines = [
        f"\n## {', '.join(engines)}\n",
        *_dates(rows),
        f"| format | {' | '.join(families)} |",
        f"| --- |{' --- |' * len(families)}",
    ]
    notes: list[str] = []
    for form in formats:
        shown = [_cell(cells.get((family, form)), notes) for family in families]
        lines.append(f"| {form} | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _dates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """When the rows were measured, where they say so."""
    dates = Counter(row["date"] for row in rows if "date" in row)
    if not dates:
        return []
    undated = len(rows) - dates.total()
    told = [f"{date} ({count})" for date, count in sorted(dates.items())]
    return [f"Cells by date: {', '.join([*told, *([f'not recorded ({undated})'] if undated else [])])}.\n"]


def _program(engine: Mapping[str, Any]) -> str:
    return f"{engine['name']} {engine['version']} on {engine['device']}, {engine['dtype']}"


def _cell(row: Mapping[str, Any] | None, notes: list[str]) -> str:
    if row is None:
        return "-"
    if row["refused"]:
        return f"not made{_note(row['refused'], notes)}"
    engine = row["engine"]
    if engine["verdict"] == "unsupported":
        return f"no kernel{_note(engine['reason'], notes)}"
    if engine["mean_difference"] is None:
        return f"**{engine['verdict']}**{_note(engine['reason'], notes)}"
    how = ", emulated" if engine["plugins"] else ", rounded" if row["rounded"] else ""
    numbers = "{mean_difference:.4f} / {noise_floor:.4f} / {effect:.3f}".format(**engine)
    if engine["verdict"] == "agrees":
        return f"agrees{how}<br>{numbers}"
    return f"**{engine['verdict']}{how}**{_note(engine['reason'], notes)}<br>{numbers}"


def _note(text: str, notes: list[str]) -> str:
    """A reference to ``text`` among the notes below the table."""
    plain = " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())[:300]
    if plain not in notes:
        notes.append(plain)
    return f" ({notes.index(plain) + 1})"
