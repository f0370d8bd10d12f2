"""What every tool reads: a bf16 source folder, and one file of calibration tokens.

    python -m scripts.benchmarks.prepare source SOURCE FOLDER
    python -m scripts.benchmarks.prepare tokens RECIPE FOLDER FILE
    python -m scripts.benchmarks.prepare heldout TEXT TOKENS FOLDER FILE

In a process of its own, so that the parent stays small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from compressor.model.load import load_tokenizer


def source(label: str, folder: Path) -> None:
    """A source as transformers saves it, in bfloat16."""
    import torch

    from compressor.checkpoint.sources import open_source
    from compressor.model.load import load_source_model

    opened = open_source(label)
    building = folder.with_suffix(".building")
    load_source_model(opened, torch.bfloat16).save_pretrained(building)
    load_tokenizer(opened).save_pretrained(building)
    building.rename(folder)


def tokens(recipe: str, folder: Path, file: Path) -> None:
    """The calibration tokens [rows, tokens of a row] of a recipe, by the tokenizer in ``folder``."""
    from compressor.calibration.tokens import load_tokens
    from compressor.progress import Silent
    from compressor.recipe.load import load_recipe
    from compressor.recipe.mixtures import calibration_spec

    loaded = load_recipe(recipe)
    spec = calibration_spec(loaded.recipe, Path(recipe).parent, None)
    made = load_tokens(spec, load_tokenizer(folder), Silent())
    save_file({"ids": made.ids_NT.contiguous()}, file, metadata={"counts": json.dumps(made.counts)})


def heldout(text: str, count: int, folder: Path, file: Path) -> None:
    """The first ``count`` tokens of a text, as ``compress eval`` reads them."""
    from compressor.data import find
    from compressor.evals.run import leading_token
    from compressor.evals.text import tokens_from_text

    tokenizer = load_tokenizer(folder)
    first = leading_token(tokenizer)
    metadata = {} if first is None else {"first": str(first)}
    save_file({"ids": tokens_from_text(tokenizer, find(text), count)}, file, metadata=metadata)


def main(words: list[str]) -> None:
    """One of the three."""
    what, *rest = words
    if what == "source":
        source(rest[0], Path(rest[1]))
    elif what == "tokens":
        tokens(rest[0], Path(rest[1]), Path(rest[2]))
    else:
        assert what == "heldout", what
        heldout(rest[0], int(rest[1]), Path(rest[2]), Path(rest[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
