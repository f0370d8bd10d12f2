"""Files and folders that a plan names: found, readable, apart from each other, and large enough."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from pathlib import Path

from compressor import data
from compressor.checkpoint.base import Source, fetched_files
from compressor.errors import UserError
from compressor.evals.base import EvalSpec
from compressor.planner.predict import Prediction
from compressor.stages.base import Claim
from compressor.stages.evaluate import memory_needed
from compressor.workspace import Workspace

_MAX_TEXT_BYTES = 4 << 30


def check_text(name: str, beside: Path) -> Path:
    """The evaluation text, which must be an ordinary file of UTF-8 with something in it.

    Raises:
        UserError: it is not.
    """
    path = data.find(name, beside=beside, what="evaluation text")
    if not path.is_file():
        raise UserError(
            "the evaluation text is not a file", where=str(path), fix="name a text or .jsonl file"
        )
    size = path.stat().st_size
    if not 0 < size <= _MAX_TEXT_BYTES:
        raise UserError("the evaluation text is empty or larger than 4 GiB", where=str(path))
    data.scan_text(path)
    return path


def check_places(output: Path, workspace: Path, source: Path | None, faults: list[UserError]) -> None:
    """Output, workspace and source may not lie within each other, nor the output be somebody's folder."""
    for name, path in (("output", output), ("workspace", workspace)):
        if path.exists() and not path.is_dir():
            fix = f"choose another --{name}"
            faults.append(UserError(f"the {name} path is a file", where=str(path), fix=fix))
        # A GGUF file's folder may hold anything; only a model folder is its files' own.
        if source is not None and (source / "config.json").is_file() and path.is_relative_to(source):
            fix = f"choose another --{name}"
            faults.append(UserError(f"the {name} lies in the source's folder", where=str(path), fix=fix))
    if output.is_relative_to(workspace) or workspace.is_relative_to(output):
        faults.append(
            UserError(
                "output and workspace lie within each other",
                where=f"{output}, {workspace}",
                fix="choose folders apart; by default the workspace lies beside the output",
            )
        )
    elif output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        faults.append(
            UserError(
                "the output folder is not empty",
                where=str(output),
                fix="choose another --output, or move it away",
            )
        )


def check_disk(
    prediction: Prediction,
    source: Source,
    output: Path,
    space: Workspace,
    own: Set[str],
    faults: list[UserError],
) -> None:
    """What the plan will write against what is free.

    What is there already counts: what this plan's ``own`` stages hold, and what was fetched of the source.
    """
    files = fetched_files(source)
    held = sum(entry.nbytes for entry in space.entries() if entry.path.name in own)
    held += 0 if files is None else files.held_bytes
    needs = {existing(space.root): prediction.disk_bytes - held}
    target = existing(output)
    if os.stat(target).st_dev != os.stat(existing(space.root)).st_dev:
        # Shards cannot be linked there: they are copied.
        needs[target] = prediction.result_bytes
    for place, needed in needs.items():
        free = shutil.disk_usage(place).free
        if needed > free:
            faults.append(
                UserError(
                    f"the plan needs {needed / 1e6:,.1f} MB more of disk, {free / 1e6:,.1f} MB are free",
                    where=str(place),
                    fix="free some space (`compress clean` shows the workspace) or choose another --output",
                )
            )


def check_memory(
    needed: int,
    claims: Sequence[Claim],
    evaluation: EvalSpec | None,
    most: int | None,
    faults: list[UserError],
) -> None:
    """What the plan needs of memory against the most that the recipe allows, if it says so."""
    if most is None:
        return
    told = {"the weights": needed}
    if evaluation is not None:
        told["measuring the result against its source (evaluate)"] = memory_needed(claims, evaluation)
    for what, size in told.items():
        if size > most:
            faults.append(
                UserError(
                    f"{what}: {size / 1e9:.2f} GB of memory are needed, more than {most / 1e9:.2f} GB",
                    where="workspace.max_memory_bytes",
                    fix="allow more, or ask for less: `calibration` of fewer tokens, `evaluate: null`",
                )
            )


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path
