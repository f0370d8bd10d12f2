"""The exact ``vllm serve`` line of a checkpoint, and what its schemes need of the machine that serves it.

The notes state what loading checkpoints into vLLM showed: 0.32 on CPU, 0.26 on an H200 (docs/serving.md).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable

from compressor.report.adapters import AdapterFacts
from compressor.report.drafts import DraftFacts, speculative_config
from compressor.report.kv import KvFacts
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
    (
        "FP8BLOCK",
        (
            "On CPUs with AMX, vLLM 0.32 computes {label} as W8A16, and its log-probabilities agree; on "
            "others it has no kernel for it.",
        ),
    ),
    (
        "FP8DYNAMIC",
        ("On CPU, vLLM 0.32 computes {label} value by value, minutes for a prompt: serve on a GPU.",),
    ),
    (
        "FP8",
        ("On CPU, vLLM 0.32 cannot round activations by the stored scale of {label}: serve on a GPU.",),
    ),
    (
        "W4A16",
        (
            "On CPU, set VLLM_CPU_INT4_W4A8=0 for {label}: without it vLLM 0.32 silently rounds activations "
            "to 8 bits. On CPUs with AMX its server may die of an illegal instruction.",
        ),
    ),
    ("W8A16", (_NO_CPU_KERNEL,)),
    (
        "W8A8",
        (
            "Rounding activations to 8 bits moves log-probabilities about as far as quantization does: "
            "two right programs differ as much, so that agreement of {label} cannot be decided by them.",
        ),
    ),
)
# model_type of Llama 4, and what was measured of its experts (docs/serving.md).
_ROUTED_ON_INPUT = ("llama4", "llama4_text")
_OTHER_MODEL = (
    "vLLM 0.26 on Hopper computed another model from Llama 4's {label} experts (docs/serving.md; "
    "vllm-project/vllm#43694 says of other kernels that they apply the router's weights twice): run "
    "`compress verify` on the machine that will serve. INT4 experts agreed there."
)
_OWN_MODULES = (
    "vLLM 0.32 does not know the model that {factory} makes: the command works only where a plug-in of vLLM "
    "provides it."
)
_OWN_CACHE = (
    "The chosen KV cache ({format}) is not servable by vLLM 0.32 alone: this line serves the weights with a "
    "16-bit cache, unless this package is installed beside vLLM, whose plug-in follows kv_plan.json "
    "(docs/kv-cache.md)."
)
_ADAPTER = "The adapter is applied to requests for the model `adapter`; others are answered without it."
_DRAFT_APART = (
    "The draft is named by its folder, as the engine is to find it: where the result is moved both paths are "
    "others, and of a copy on the Hub `draft` must be downloaded."
)
_DRAFT = "Drafts pay where few requests run at once: measure with and without --speculative-config."
_UNKNOWN = "No serving check of {label} is recorded: compare log-probabilities before relying on it."


def serve_facts(
    path: str,
    scheme_labels: Iterable[str],
    model_type: str = "",
    factory: str | None = None,
    kv: KvFacts | None = None,
    max_length: int | None = None,
    adapters: AdapterFacts | None = None,
    drafts: DraftFacts | None = None,
) -> Serve:
    """The command that serves the checkpoint at ``path`` (as the user will type it), and its notes.

    Flags for the KV cache, the length, adapters and drafts: all else that the engine needs is in the config.
    ``model_type``: of that config. ``factory``: what makes the model, where transformers does not know it.
    ``max_length``: tokens that it was made to read, where that is not its source's. ``adapters``: what was
    trained; those that are not merged are named to the engine. ``drafts``: what proposes tokens.
    """
    # An engine would take a leading dash for an option.
    model = f"./{path}" if path.startswith("-") else path
    labels = [] if factory else list(scheme_labels)
    notes = [note for label in labels for note in scheme_notes(label)]
    if factory:
        notes.append(_OWN_MODULES.format(factory=factory))
    notes += [note for label in labels for note in family_notes(label, model_type)]
    flags = "" if max_length is None else f" --max-model-len {max_length}"
    if kv is not None:
        flags += f" {kv.flags}" if kv.flags else ""
        notes += [] if kv.servable else [_OWN_CACHE.format(format=kv.format)]
    if adapters is not None and not adapters.merged:
        named = shell_quote(f"adapter={model.rstrip('/')}/adapter")
        flags += f" --enable-lora --lora-modules {named} --max-lora-rank {adapters.served_rank}"
        notes.append(_ADAPTER)
    if drafts is not None:
        flags += f" --speculative-config {shell_quote(speculative_config(drafts, model))}"
        notes += [_DRAFT] if drafts.kind == "native" else [_DRAFT_APART, _DRAFT]
    return Serve(
        command=f"vllm serve {shell_quote(model)}{flags}", model=model, notes=tuple(dict.fromkeys(notes))
    )


def scheme_notes(label: str) -> tuple[str, ...]:
    """What serving the scheme ``label`` needs, one sentence each."""
    key = re.sub(r"[^A-Z0-9]", "", label.upper())
    for prefix, notes in _NOTES:
        if key.startswith(prefix):
            return tuple(note.format(label=label) for note in notes)
    return (_UNKNOWN.format(label=label),)


def family_notes(label: str, model_type: str) -> tuple[str, ...]:
    """What was found of the scheme ``label`` in one architecture."""
    if model_type in _ROUTED_ON_INPUT and label.startswith("NVFP4"):
        return (_OTHER_MODEL.format(label=label),)
    return ()


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
