"""The model card: front matter the Hub reads, sections people read, no markup from names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from compressor.report.card import escape, fenced, render_card, write_card
from compressor.report.words import visible
from tests.report.full import full_report, hostile_full_report
from tests.report.sample import ATTACK, RECIPE, hostile_report, sample_report


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter as the Hub cuts it, and the rest."""
    match = re.match(r"\A---\n(.*?\n)---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), card[match.end() :]


def tokens(markdown: str) -> list[Token]:
    """All tokens, inline ones too, of CommonMark with HTML allowed and the Hub's tables."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [part for token in parser.parse(markdown) for part in (token, *(token.children or []))]


def test_front_matter() -> None:
    """What the Hub needs to place the model."""
    facts, _ = split(render_card(sample_report(), RECIPE))
    assert facts == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "quantized", "nvfp4a16"],
    }


def test_front_matter_names_the_dialect() -> None:
    """A ModelOpt folder is not found under compressed-tensors."""
    report = sample_report()
    result = report.result.model_copy(update={"format": "modelopt"})
    facts, _ = split(render_card(report.model_copy(update={"result": result}), RECIPE))
    assert facts["tags"] == ["modelopt", "quantized", "nvfp4a16"]


def test_front_matter_of_an_unknown_base() -> None:
    """What is not known is left out, not guessed; the overview says so."""
    report = sample_report()
    source = report.source.model_copy(update={"base_model": None, "license": None})
    facts, body = split(render_card(report.model_copy(update={"source": source}), RECIPE))
    assert not {"base_model", "base_model_relation", "license"} & facts.keys()
    assert "| licence | not stated by the source; its terms apply |" in body


def test_front_matter_takes_no_hostile_string() -> None:
    """Neither a base model, a licence nor a tag that is not of the Hub's alphabet."""
    facts, _ = split(render_card(hostile_report(), RECIPE))
    assert facts == {
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "quantized"],
    }


def test_sections_and_figures() -> None:
    """Every section, the evaluation row by row, the note in each caption, the recipe and the commands."""
    _, body = split(render_card(sample_report(), RECIPE))
    heads = [line for line in body.splitlines() if line.startswith("## ")]
    assert heads == [
        "## At a glance",
        "## Overview",
        "## What was done",
        "## Calibration",
        "## How to serve",
        "## Verified",
        "## Evaluation",
        "## Limits",
        "## How it was made",
    ]
    for line in (
        "| Weights, times smaller | 2.31x | 269.0 MB → 116.4 MB |",
        "|  | source | result | change | recovery |",
        "| perplexity | 22.316 | 26.806 | +20.1% (95%: +18.1% to +22.1%) | - |",
        "| piqa acc (n=1,838) | 0.6801 | 0.6605 | -0.0196 (standard error 0.0081) | 97.1% |",
        "| embedding (tied to lm\\_head) | 1 | 56.6 MB |",
        "vllm serve out/smollm2-nvfp4",
        "compress eval out/smollm2-nvfp4 --source SOURCE --text held-out.txt",
        "  scheme: nvfp4a16",
        "| torch | 2.13.0 |",
        "- The baseline of every table here is the source as it is: dequantized from GGUF Q4\\_1.",
    ):
        assert line in body.splitlines()
    captions = [line for line in body.splitlines() if line.startswith("*") and line.endswith("*")]
    assert len(captions) == 4
    assert all("Source: dequantized from GGUF Q4\\_1." in line for line in captions)


@pytest.mark.parametrize("passed", [True, False])
def test_limits_name_failed_gates(passed: bool) -> None:
    """A result that failed says so among its limits."""
    _, body = split(render_card(sample_report(passed=passed), RECIPE))
    assert ("- This result failed the recipe's gates on perplexity." in body) is not passed


def test_skipped_evaluation_is_a_limit() -> None:
    """No numbers, and said so twice."""
    _, body = split(render_card(sample_report(quality=False), RECIPE))
    assert "- Quality was not measured." in body
    assert "nothing is known about what this result lost" in body
    assert "Measured with" not in body


def test_hostile_names_make_no_markup() -> None:
    """No HTML, link, image or extra heading; tables keep their columns; blocks hold the text and end."""
    _, body = split(render_card(hostile_report(), ATTACK))
    found = tokens(body)
    assert not {"html_block", "html_inline", "link_open", "image", "code_block", "hr"} & {
        t.type for t in found
    }
    assert sum(token.type == "heading_open" for token in found) == 10
    blocks = [token.content for token in found if token.type == "fence"]
    assert len(blocks) == 4
    assert blocks[0] == "\n".join(visible(line) for line in ATTACK.split("\n")) + "\n"
    outside = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"https?://|www\.", outside)


def test_hostile_names_keep_tables_whole() -> None:
    """As many tables with as many cells as without them."""
    honest = split(render_card(sample_report(), RECIPE))[1]
    hostile = split(render_card(hostile_report(), RECIPE))[1]
    count = [sum(t.type == "table_open" for t in tokens(body)) for body in (honest, hostile)]
    assert count[0] == count[1] == 14
    widths = [line.count(" ---") for line in hostile.splitlines() if line.startswith("| ---")]
    assert widths == [3, 2, 3, 5, 3, 3, 6, 4, 3, 2, 5, 4, 5, 2]


@given(st.text(min_size=1))
def test_escaped_text_is_one_plain_text(text: str) -> None:
    """Whatever the text, in a table cell CommonMark shows exactly its visible form."""
    cell = escape(text)
    table = [t for t in tokens(f"| a | b |\n| --- | --- |\n| {cell} | end |\n") if t.type == "inline"]
    children = table[2].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == visible(text.strip()).strip()
    assert table[3].content == "end"


@given(st.text(st.sampled_from("`~ab\n"), min_size=1))
@example("a\n```\n# b\n")
@example("`````")
def test_fences_hold_any_text(text: str) -> None:
    """A block of back ticks cannot end its fence."""
    found = tokens(fenced(text, "bash") + "\n\nafter")
    assert [token.type for token in found] == ["fence", "paragraph_open", "inline", "text", "paragraph_close"]
    assert found[0].content.rstrip("\n") == text.rstrip("\n")


def test_written_card_quotes_the_folders_recipe(tmp_path: Path) -> None:
    """README.md, with the recipe that lies beside it."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_card(tmp_path, sample_report())
    assert (tmp_path / "README.md").read_text() == render_card(sample_report(), RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "recipe.yaml"]


def test_hostile_names_in_every_section() -> None:
    """A card with all sections has as many headings, tables, columns and blocks, and no markup of theirs."""
    honest, hostile = (
        tokens(split(render_card(report, RECIPE))[1]) for report in (full_report(), hostile_full_report())
    )
    # Not their rows: what solvers and schemes are called decides which matrices share one.
    for kind in ("heading_open", "table_open", "th_open", "fence"):
        counts = [sum(token.type == kind for token in found) for found in (honest, hostile)]
        assert counts[0] == counts[1] > 0, kind
    assert not {"html_block", "html_inline", "link_open", "image", "code_block", "hr"} & {
        t.type for t in hostile
    }
