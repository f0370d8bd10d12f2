"""The first stage: config.json under which everything after it reads the source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor.checkpoint.base import Source
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.rope.scaled import scaled_config
from compressor.rope.search_spec import SearchSpec
from compressor.rope.spec import ContextSpec, ScaledConfig
from compressor.stages.context_search import RECORD_NAME, search_factors
from compressor.workspace import write_json

SCALED_NAME = "scaled_config.json"


@dataclass(frozen=True)
class ContextJob:
    """What the stage is told.

    Attributes:
        spec: what the recipe asks for.
        scaled: the config that the plan made of it; where factors are searched, of the same lengths.
        search: how the factors are searched, or None.
    """

    spec: ContextSpec
    scaled: ScaledConfig
    search: SearchSpec | None = None

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able: what the result depends on, however the recipe spells it."""
        told = {"config": self.scaled.config, "length": self.scaled.length}
        return told if self.search is None else told | {"search": self.search.content}


def context_stage(source: Source, job: ContextJob, folder: Path, progress: Progress) -> dict[str, Any]:
    """Leaves ``scaled_config.json`` in ``folder``; facts for the report: ``resumed``, ``context``.

    Where factors are searched, ``context`` holds ``search``: what ``Found.facts`` says, with ``accepted`` and
    ``reason``. Errors as ``search_factors``.
    """
    scaled, facts, resumed = job.scaled, dict[str, Any](), False
    if job.search is not None:
        resumed = (folder / RECORD_NAME).is_file()
        found = search_factors(source, job.spec, job.search, folder, progress)
        scaled = scaled_config(source.config, found.context)
        scaled = replace(scaled, notes=(found.reason, *scaled.notes))
        facts = {"search": found.facts | {"accepted": found.accepted, "reason": found.reason}}
    write_json(folder / SCALED_NAME, asdict(scaled))
    progress.log(f"context: {source.label} is read up to {scaled.length:,} tokens")
    return {"resumed": resumed, "context": facts}


def reconfigured(source: Source, folder: Path) -> ReconfiguredSource:
    """The source under the config that the finished stage left in ``folder``.

    Raises:
        CheckpointError: that file is damaged.
    """
    scaled = read_scaled(folder)
    return ReconfiguredSource(source, scaled.config, scaled.length)


def read_scaled(folder: Path) -> ScaledConfig:
    """What the finished stage left in ``folder``.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / SCALED_NAME
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return ScaledConfig(
            dict(found["config"]), int(found["length"]), float(found["factor"]), tuple(found["notes"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"is damaged: {error}", where=str(path), fix="run again with --fresh"
        ) from error
