"""The exact ``vllm serve`` line of a checkpoint, and what its schemes need of the machine that serves it.

The notes state what loading real checkpoints into vLLM 0.32 showed on CPU (log-probabilities against
transformers, 200 tokens and more), and for NVFP4 the fallback that vLLM documents in
vllm/model_executor/layers/quantization/utils/marlin_utils_fp4.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

from compressor.report.model import Serve

_NO_CPU_KERNEL = (
    "vLLM 0.32 has no CPU kernel for {label}: loading it there fails with a ValueError. Serve on a GPU."
)
_MARLIN = (
    "{label} needs no FP4 hardware: on GPUs without it, such as Hopper, vLLM serves it as weight-only "
    "through its Marlin kernel."
)

# Scheme label, letters and digits only, upper case -> notes; the first prefix that fits decides.
_NOTES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NVFP4A16", (_MARLIN, _NO_CPU_KERNEL)),
    ("NVFP4", (_NO_CPU_KERNEL,)),
    ("MXFP4", (_NO_CPU_KERNEL,)),
    ("FP8BLOCK", ("On CPU, vLLM 0.32 computes {label} as W8A16; its log-probabilities agree there.",)),
    (
        "FP8DYNAMIC",
        (
            "On CPU, vLLM 0.32 loads {label} and reads sanely, but agreement is not settled and it ran "
            "85 times slower than bf16: serve on a GPU.",
        ),
    ),
    (
        "W4A16",
        (
            "On CPU, set VLLM_CPU_INT4_W4A8=0 for {label}: without it vLLM 0.32 silently rounds activations "
            "to 8 bits.",
        ),
    ),
    ("W8A16", (_NO_CPU_KERNEL,)),
    ("W8A8", ("On CPU, vLLM 0.32 loads {label} and reads sanely, but agreement is not settled.",)),
)
_UNKNOWN = "No serving check of {label} is recorded: compare log-probabilities before relying on it."


def serve_facts(path: str, scheme_labels: Iterable[str]) -> Serve:
    """The command that serves the checkpoint at ``path`` (as the user will type it), and its notes.

    No flags: everything that the engine needs is in the checkpoint's config.
    """
    # An engine would take a leading dash for an option.
    model = f"./{path}" if path.startswith("-") else path
    notes = [note for label in scheme_labels for note in scheme_notes(label)]
    return Serve(command=f"vllm serve {shell_quote(model)}", model=model, notes=tuple(dict.fromkeys(notes)))


def scheme_notes(label: str) -> tuple[str, ...]:
    """What serving the scheme ``label`` needs, one sentence each."""
    key = re.sub(r"[^A-Z0-9]", "", label.upper())
    for prefix, notes in _NOTES:
        if key.startswith(prefix):
            return tuple(note.format(label=label) for note in notes)
    return (_UNKNOWN.format(label=label),)


def request_command(model: str) -> str:
    """A ``curl`` line that asks the served model for a completion."""
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 16})
    return (
        "curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        f"  -d {shell_quote(body)}"
    )


def shell_quote(text: str) -> str:
    """``text`` as one word of bash; characters that would not show are written as ``$'...'`` escapes."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(_ansi_c(char) for char in text) + "'"


def _ansi_c(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable():
        return char
    # Bytes, so that the word does not depend on the reader's locale (bash manual, ANSI-C Quoting).
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
