"""The serve line can be pasted into a shell, whatever the folder is called."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from compressor.report.serve import request_command, scheme_notes, serve_facts, shell_quote

ODD_PATHS = [
    "out/smollm2-nvfp4",
    'my models/it\'s $HOME; `id` "x" \\',
    "a\x1b[31m\nb\ttab'quote\\",
    "naïve 模型\u202e",
    "raw-\udcff-byte",
    "1\x011",
]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_quoted_path_is_one_printable_word_of_bash(path: str) -> None:
    """bash itself gives the path back, byte for byte."""
    quoted = shell_quote(path)
    assert quoted.isprintable()
    run = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert run.stdout == path.encode("utf-8", "surrogateescape")


def test_plain_line_has_no_flags() -> None:
    """The checkpoint's config says everything the engine needs."""
    facts = serve_facts("out/model", ["NVFP4A16"])
    assert (facts.command, facts.model) == ("vllm serve out/model", "out/model")


def test_path_cannot_become_an_option() -> None:
    """A folder called ``--help`` is served, not obeyed."""
    assert serve_facts("--help", []).command == "vllm serve ./--help"


def test_request_is_json_for_the_served_name() -> None:
    """The client line names the model as the server knows it, through JSON and shell quoting."""
    words = shlex.split(request_command("a 'b' \"c\"").replace("\\\n", ""))
    assert json.loads(words[words.index("-d") + 1])["model"] == "a 'b' \"c\""


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("NVFP4A16", "Marlin"),
        ("NVFP4A16", "no CPU kernel"),
        ("MXFP4", "no CPU kernel"),
        ("FP8-block", "computes FP8-block as W8A16"),
        ("FP8_BLOCK", "computes FP8_BLOCK as W8A16"),
        ("FP8", "cannot round activations by the stored scale of FP8"),
        ("FP8-dynamic", "minutes for a prompt"),
        ("W4A16 g64", "VLLM_CPU_INT4_W4A8=0"),
        ("W8A16", "no CPU kernel"),
        ("W8A8", "cannot be decided"),
        ("ODD5", "No serving check of ODD5 is recorded"),
    ],
)
def test_notes_of_schemes(label: str, phrase: str) -> None:
    """Each scheme says what was seen when it was served; an unknown one says that nothing was."""
    assert phrase in " ".join(scheme_notes(label))


def test_notes_are_said_once() -> None:
    """Two spellings of a note stay two, one stays one."""
    assert len(serve_facts("m", ["NVFP4A16", "NVFP4A16"]).notes) == 2


def test_llama4_experts_come_with_a_warning() -> None:
    """An engine that loads them and computes another model is worse than one that refuses."""
    for model_type in ("llama4", "llama4_text"):
        assert any("another model" in note for note in serve_facts("out", ["NVFP4A16"], model_type).notes)
        assert not any("another model" in note for note in serve_facts("out", ["W4A16"], model_type).notes)
    assert not any("another model" in note for note in serve_facts("out", ["NVFP4A16"], "llama").notes)
