"""The source as a result's recipe says that its positions were scaled, before its weights were stored.

The scaled config is made anew from the source's own and the recipe, and the result's config.json compared
with that (``verify.meaning``). Searched factors are the result's own: any may have been found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.layout import load_config
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.stored import StoredTensors
from compressor.errors import CheckpointError, UserError
from compressor.model.families import text_config
from compressor.model.reach import reach
from compressor.recipe.context import ContextSection
from compressor.recipe.load import load_recipe
from compressor.rope.checked import check_positions
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec
from compressor.verify.base import Check
from compressor.verify.inputs import RECIPE_FILE

_NAME = "context"
_SEARCHED = ("longrope", "yarn")


def scaled_source(checkpoint: Path, source: Source | None) -> tuple[Source | None, list[Check]]:
    """What the result is to be compared with, and the check ``context`` where its recipe scales positions.

    Raises:
        CheckpointError: config.json has become unreadable.
    """
    section = _section(checkpoint)
    if section is None:
        return source, []
    config = load_config(StoredTensors(checkpoint).small_file("config.json"), "config.json")
    faults = [found.what for found in check_positions(config) if found.severity == "error"]
    length = reach(text_config(config)) or 0
    if length < section.target_length:
        faults.append(
            f"config.json reads {length:,} tokens, and {RECIPE_FILE} wants {section.target_length:,}: the "
            "scaling is gone, export again"
        )
    if faults:
        return source, [Check(_NAME, "failed", ". ".join(faults))]
    if source is None:
        return None, [
            Check(_NAME, "passed", f"{length:,} tokens, as {RECIPE_FILE} wants; no source to compare")
        ]
    try:
        spec = _as_found(section, config)
        scaled = scaled_config(source.config, spec)
    except UserError as error:
        return source, [Check(_NAME, "failed", f"{error.what}: {RECIPE_FILE} does not fit the source")]
    text = (
        f"{spec.method}, factor {scaled.factor:g}, {scaled.length:,} tokens; all is compared with the source "
        "under that config"
    )
    return ReconfiguredSource(source, dict(scaled.config), scaled.length), [Check(_NAME, "passed", text)]


def _section(checkpoint: Path) -> ContextSection | None:
    """The ``context`` section of the folder's recipe; None where it has none that can be read."""
    path = checkpoint / RECIPE_FILE
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return load_recipe(str(path.absolute())).recipe.context
    except UserError:
        return None


def _as_found(section: ContextSection, config: Mapping[str, Any]) -> ContextSpec:
    """What was written: as the recipe says, or, where it had factors searched, what config.json has.

    Raises:
        CheckpointError: a search leaves nothing of the kind.
    """
    spec = section.spec()
    if section.search is None:
        return spec
    positions = read_positions(config)
    if positions.rope_type not in _SEARCHED:
        raise CheckpointError(f"a search leaves {' or '.join(_SEARCHED)}, not {positions.rope_type!r}")
    if positions.rope_type == "yarn":
        return replace(spec, method="yarn")
    told = positions.parameters
    return replace(spec, factors=tuple(told["long_factor"]), attention_factor=told.get("attention_factor"))
