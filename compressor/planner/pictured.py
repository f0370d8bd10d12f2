"""What calibration with images needs, told from headers, config and files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from compressor.calibration.spec import CalibrationSpec
from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.model.families import is_wrapper
from compressor.planner.oneshot import takes
from compressor.stages.base import Claim

_WHERE = "calibration.images"
# Any of them configures a processor of images (transformers 5.17 processing_auto.py).
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def image_faults(
    calibration: CalibrationSpec, source: Source, claims: Sequence[Claim], *, polished: bool
) -> list[UserError]:
    """A text-only model, a processor that is missing, and what calibrates on texts alone."""
    if calibration.images is None:
        return []
    if not is_wrapper(source.config):
        what = "the model takes no images: its config has no vision tower"
        return [UserError(what, where=_WHERE, fix="leave the key out")]
    faults = []
    folder = source.model_dir()
    if folder is not None and not any((folder / name).is_file() for name in _PROCESSORS):
        what = f"the source has neither {' nor '.join(_PROCESSORS)}, which its processor of images needs"
        faults.append(UserError(what, where=_WHERE, fix="download it with all its files"))
    if find_spec("PIL") is None:
        what, fix = "images are read by Pillow, which is not installed", "pip install 'compressor[images]'"
        faults.append(UserError(what, where=_WHERE, fix=fix))
    learned = any(claim.solver is not None and claim.solver.learning is not None for claim in claims)
    for uses, name in (
        (any(takes(claim) for claim in claims), "solver llmcompressor"),
        (learned, "solver learned"),
        (polished, "weights.polish"),
    ):
        if uses:
            what = f"{name} calibrates on texts only"
            faults.append(UserError(what, where=_WHERE, fix="leave the key out, or use another solver"))
    return faults
