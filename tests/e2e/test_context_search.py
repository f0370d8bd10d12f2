"""A recipe that searches factors, from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import compressor
from compressor.model.load import load_checkpoint_model
from compressor.report.model import Report
from tests.tiny import tiny_llama

from .cases import write_recipe

SEARCH = (
    "context: {method: longrope, target_length: 1024, search: {documents: long.jsonl, population: 2, "
    "generations: 1, search_documents: 1, accept_documents: 1, short_slack: %s}}\nevaluate: null\n"
)


@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_the_result_has_what_was_found(tmp_path: Path, slack: float) -> None:
    """The factors where they were accepted, else YaRN; in config.json, and loaded back."""
    source = tiny_llama(tmp_path / "source", heads=2, kv_heads=1)
    texts = [f"{number} of them, and {number + 1} more. " * 60 for number in range(2)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", SEARCH % slack)
    output = compressor.run(recipe, output=tmp_path / "out" / "result").output
    (stage,) = (tmp_path / "out" / ".compress-workspace" / "stages").glob("context-*")
    facts = json.loads((stage / "stage.json").read_text())
    search = facts["context"]["search"]
    config = json.loads((output / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["max_position_embeddings"] == 1024
    # This random model gains 0.03 nats by it, and loses 0.008 of short texts.
    assert search["accepted"] is bool(slack)
    if search["accepted"]:
        assert rope["rope_type"] == "longrope"
        assert rope["long_factor"] == rope["short_factor"] == search["best"]["factors"]
        assert rope["attention_factor"] == rope["long_mscale"] == search["best"]["attention_factor"]
    else:
        assert rope["rope_type"] == "yarn"
        assert search["reason"].startswith("YaRN is used")
    if slack:
        assert search["held_out"]["tokens"] == [1024]
    report = Report.from_json((output / "report.json").read_bytes()).context
    assert report is not None
    assert report.search is not None
    assert (report.method == "longrope") == report.search.accepted == search["accepted"]
    assert len(report.search.generations) == 2
    (named,) = re.findall("documents: (.*long.jsonl)", (output / "recipe.yaml").read_text())
    assert (output / named).resolve() == tmp_path / "long.jsonl"
    model = load_checkpoint_model(output, torch.float32).model
    assert model(torch.arange(1024)[None] % 256).logits.isfinite().all()
