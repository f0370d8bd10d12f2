"""What a verification works with: the source of the checkpoint, an engine's copy of it, and the tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.made_by import FACTORY_KEY, FactorySource
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.checkpoint.sources import From, local_path, open_source
from compressor.checkpoint.stored import StoredTensors
from compressor.data import find
from compressor.errors import CheckpointError, UserError
from compressor.evals.run import leading_token
from compressor.evals.text import tokens_from_text
from compressor.progress import Progress
from compressor.recipe.load import load_recipe
from compressor.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE_FILE = "recipe.yaml"
# Long enough for several blocks of a paged KV cache.
WINDOW = 256
PROMPT = 16
PROMPTS = 3
LEAST_POSITIONS = 64


@dataclass(frozen=True)
class Tokens:
    """Token ids: ``windows`` are scored, ``prompts`` are continued; ``text`` is that of the first prompt."""

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    text: str

    @property
    def scored(self) -> int:
        """Tokens that get a log-probability: all but a window's first."""
        return sum(len(window) - 1 for window in self.windows)

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(max(ids) for ids in (*self.windows, *self.prompts))


def find_source(
    checkpoint: Path,
    named: str | None,
    revision: str | None,
    cache: Path,
    progress: Progress,
    from_: From | None = None,
) -> Source | None:
    """The source that ``named`` names, else the local one that the checkpoint's own recipe names, or None.

    A Hub id in the recipe is not followed: nobody asked for the download. Says why where there is none.

    Raises:
        UserError: ``named`` cannot be opened.
    """
    if named is not None:
        return open_source(named, revision=revision, cache=cache, from_=from_)
    recipe = checkpoint / RECIPE_FILE
    hint = "its values are not compared with a source; name one with --source"
    if not recipe.is_file():
        progress.warn(f"{checkpoint} has no {RECIPE_FILE}: {hint}")
        return None
    try:
        model = load_recipe(str(recipe.absolute())).recipe.model
        # The export names its source from its own folder.
        beside = recipe.absolute().parent
        if local_path(model.source, beside) is None:
            progress.warn(f"the source {model.source} is on the Hub: {hint} {model.source}")
            return None
        source = open_source(
            model.source,
            sha256=model.sha256,
            beside=beside,
            # What is kept is compared by its values too.
            from_=None if model.from_ is None else "dequantize",
        )
        return source if model.factory is None else FactorySource(source, model.factory, allowed=False)
    except UserError as error:
        progress.warn(f"the source that {RECIPE_FILE} names cannot be opened ({error.what}): {hint}")
        return None


def factory_of(checkpoint: Path) -> str:
    """The factory that config.json says makes the model, for messages; "" where there is none."""
    named = load_config(StoredTensors(checkpoint).small_file("config.json"), "config.json").get(FACTORY_KEY)
    return "" if named is None else repr(str(named)[:80])


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, longest: int | None) -> Tokens:
    """``tokens`` tokens of a text in windows, each with the leading token that the model was trained with.

    Args:
        tokenizer: the checkpoint's.
        text: a path or a shipped text.
        tokens: how many.
        longest: the model's positions, or None. An engine generates a token besides each window.

    Raises:
        UserError: the text is missing, or shorter than asked for; or the model takes no prompt worth asking.
    """
    if longest is not None and longest < LEAST_POSITIONS:
        raise CheckpointError(
            f"max_position_embeddings is {longest}: too short for prompts of {PROMPT} tokens",
            fix="correct config.json",
        )
    ids = tokens_from_text(tokenizer, find(text, what="text"), tokens).tolist()
    first = leading_token(tokenizer)
    lead = () if first is None else (first,)
    step = min(WINDOW, WINDOW if longest is None else longest - 1) - len(lead)
    windows = [(*lead, *ids[start : start + step]) for start in range(0, len(ids), step)]
    starts = range(0, len(ids), max(1, len(ids) // PROMPTS))
    prompts = [(*lead, *ids[start : start + PROMPT]) for start in starts][:PROMPTS]
    start = tokenizer.decode(ids[:PROMPT], clean_up_tokenization_spaces=False)
    return Tokens(tuple(window for window in windows if len(window) > 1), tuple(prompts), start)


def own_folder(source: Source) -> Path | None:
    """The source's own folder, with config.json and safetensors; None where it has none such (GGUF, or
    weights that are stored quantized).
    """
    return source.model_dir() if source.kind == "safetensors" else None


def _own_weights(source: Source) -> Path | None:
    """The folder whose safetensors are the source's, whatever the config beside them says; None without."""
    while isinstance(source, ReconfiguredSource):
        source = source.inner
    return own_folder(source)


def missing_room(source: Source, scratch: Path) -> str:
    """Why ``plain_folder`` would not fit on the disk, or "": weights at 16 bit, and the side files.

    Args:
        source: it writes sources that are dequantized, and no others.
        scratch: an existing folder on that disk; the side files are written there to be measured.
    """
    if _own_weights(source) is not None:
        return ""
    with TemporaryDirectory(prefix="side-files.tmp-", dir=scratch) as folder:
        written = source.write_side_files(Path(folder))
        side_bytes = sum((Path(folder) / name).stat().st_size for name in written)
    needed = side_bytes + sum(header.nbytes for header in source.headers.values())
    free = shutil.disk_usage(scratch).free
    if needed <= free:
        return ""
    return f"the source takes {needed / 1e6:,.1f} MB in {scratch}, {free / 1e6:,.1f} MB are free"


def plain_folder(source: Source, scratch: Path) -> Path:
    """A folder that an engine can load the source from: its own, or one written into ``scratch``."""
    own = own_folder(source)
    if own is not None:
        return own
    folder = scratch / "source"
    folder.mkdir(parents=True)
    weights = _own_weights(source)
    if weights is None:
        headers = list(source.headers.values())
        with ShardWriter(folder / "model.safetensors", headers) as writer:
            for header in headers:
                writer.write(header.name, source.read(header.name))
    for path in [] if weights is None else weights.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    source.write_side_files(folder)
    write_json(folder / "config.json", source.config)
    return folder


def equal_before_difference(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> int:
    """Tokens of greedy continuations up to the first difference of each, summed."""
    total = 0
    for ours, theirs in zip(left, right, strict=True):
        pairs = list(zip(ours, theirs, strict=False))
        total += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return total
