"""A smoke run: the real plan, a small random model of its source, the recipe on it from end to end.

Everything lies in ``<workspace>/smoke``, which is emptied before and after; stages, output and whatever a
real run would go on with stay as they are.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from compressor.checkpoint.hub import HubUnavailable
from compressor.checkpoint.kept import KeptSource
from compressor.checkpoint.made_by import FactorySource
from compressor.errors import CheckpointError, UserError
from compressor.model.load import check_known, load_tokenizer
from compressor.planner.plan import Plan, make_plan
from compressor.progress import Progress
from compressor.report.model import Report
from compressor.runner import execute
from compressor.smoke.config import SmallConfig, parsed, small_config
from compressor.smoke.folder import BYTE_TOKENS, write_byte_tokenizer, write_weights
from compressor.smoke.layers import KeptLayers, decoder_path, kept_layers
from compressor.smoke.recipe import small_recipe
from compressor.smoke.tensors import declared_class, small_headers
from compressor.workspace import Workspace

_FOLDER = "smoke"


@dataclass(frozen=True)
class Smoke:
    """What a smoke run did.

    Attributes:
        architecture: the model's class.
        layers: which blocks were kept.
        config: the small config, and what was changed in it.
        tensors: of the small model.
        parameters: all their elements.
        tokenizer: which one, and why, for people.
        unmet: patterns of the recipe that met nothing, because what they meet was cut away.
        measured: whether the recipe itself asks for an evaluation.
        report: of the run on the small model.
        wall_s: in all.
    """

    architecture: str
    layers: KeptLayers
    config: SmallConfig
    tensors: int
    parameters: int
    tokenizer: str
    unmet: tuple[str, ...]
    measured: bool
    report: Report
    wall_s: float


def smoke(plan: Plan, progress: Progress) -> Smoke:
    """Runs the recipe of ``plan``, made with ``planning=True``, on a small random model.

    Raises:
        UserError: the model cannot be shrunk, or the recipe fails on the small one.
    """
    start = time.monotonic()
    for warning in plan.warnings:
        progress.warn(warning)
    _check_early(plan)
    with _emptied(plan.workspace) as folder:
        model = folder / "model"
        tokenizer = _side_files(plan, model)
        where, raw = plan.source.label, plan.source.config
        layers = kept_layers(plan.claims, parsed(raw, where).get_text_config(), where)
        config = small_config(raw, layers.kept, None if tokenizer is None else BYTE_TOKENS, where)
        blocks = (decoder_path(plan.claims), layers.total)
        headers = small_headers(plan.source.headers, config.raw, blocks, where)
        write_weights(model, config.raw, headers, plan.loaded.recipe.seed)
        if tokenizer is not None:
            write_byte_tokenizer(model, config.special)
        progress.log(f"small random model: {layers}")
        recipe, unmet = small_recipe(plan, model, config.raw, headers)
        with _blamed():
            small = make_plan(
                recipe, output=folder / "result", workspace=folder / "workspace", planning=False
            )
            report = execute(small, progress).report
    return Smoke(
        architecture=declared_class(raw, parsed(raw, where), where).__name__,
        layers=layers,
        config=config,
        tensors=len(headers),
        parameters=sum(header.numel for header in headers.values()),
        tokenizer=tokenizer or "the source's own, so the vocabulary keeps its size",
        unmet=tuple(unmet),
        measured=plan.evaluation is not None,
        report=report,
        wall_s=time.monotonic() - start,
    )


def _check_early(plan: Plan) -> None:
    """What a run refuses before anything else, told from the real headers."""
    if isinstance(plan.source, KeptSource):
        raise UserError(
            "--smoke makes random weights in 16 bit, and has none to keep",
            where="model.from",
            fix="try the recipe with `--set model.from=dequantize`",
        )
    if isinstance(plan.source, FactorySource):
        what = f"--smoke cannot shrink a model that {plan.source.factory} makes"
        raise UserError(
            what, where="model.factory", fix="make a small checkpoint, and run the recipe on that"
        )
    check_known(plan.source)
    if plan.walk is not None:
        from compressor.model.tape import check_walkable

        check_walkable(plan.source)


@contextmanager
def _emptied(workspace: Workspace) -> Iterator[Path]:
    """A folder for one smoke run; what a killed one left goes first."""
    place = Workspace(workspace.root / _FOLDER)
    with place.locked():
        for left in place.root.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
        with TemporaryDirectory(prefix="run-", dir=place.root) as folder:
            yield Path(folder)


def _side_files(plan: Plan, model: Path) -> str | None:
    """Makes the folder with the source's tokenizer and the like; else says why it gets one of its own."""
    model.mkdir()
    if plan.source.kind == "headers":
        return "bytes, since the source's cannot be reached"
    try:
        plan.source.write_side_files(model)
        load_tokenizer(model)
    except HubUnavailable as error:
        reason = f"bytes, since the source's cannot be reached ({error.reason})"
    except CheckpointError:
        if plan.evaluation is not None or plan.calibration is not None:
            raise
        reason = "bytes, since the source has none, and the recipe needs none"
    else:
        return None
    shutil.rmtree(model)
    model.mkdir()
    return reason


@contextmanager
def _blamed() -> Iterator[None]:
    """Says of a fault that it is the small model's."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"the recipe fails on a small random model of its source: {error.render()}"
        ) from error
