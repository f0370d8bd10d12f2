"""The recipe's ``calibration`` section and the mixture that it names -> what is calibrated on."""

from __future__ import annotations

import os
from pathlib import Path

from compressor import data
from compressor.calibration.check import text_sha256
from compressor.calibration.images import images_sha256
from compressor.calibration.spec import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    CalibrationSpec,
    DatasetSpec,
    ImagesSpec,
)
from compressor.errors import PlanError, RecipeError, UserError
from compressor.recipe.calibration import CalibrationSection, DatasetSection, ImagesSection
from compressor.recipe.check import build
from compressor.recipe.faults import RecipeFaults
from compressor.recipe.files import read_tree, shown
from compressor.recipe.merge import settle
from compressor.recipe.model import Recipe
from compressor.recipe.tree import Fields

DEFAULT_MIXTURE = "default"
DEFAULT_SPLIT = "train"


def calibration_spec(recipe: Recipe, folder: Path, longest: int | None) -> CalibrationSpec:
    """What a recipe calibrates on, with every file found and hashed.

    Args:
        recipe: one without the section calibrates on the shipped mixture.
        folder: the recipe's, from which its relative paths are looked for too.
        longest: the model's positions, if they are known: rows whose length nobody set are no longer.

    Raises:
        PlanError: a mixture that is missing or faulty, texts that are missing or cannot be read; all of
            them together.
    """
    section = recipe.calibration or CalibrationSection()
    mixture, datasets, file = CalibrationSection(), section.datasets, None
    where = "calibration.datasets.{}"
    if section.mixture is not None or not datasets:
        named = _mixture_file(section.mixture or DEFAULT_MIXTURE, folder)
        mixture = _mixture(named)
        if not datasets:
            datasets, file, where = mixture.datasets, named, f"{shown(named)}: datasets.{{}}"
    found: list[DatasetSpec] = []
    faults: list[UserError] = []
    for index, dataset in enumerate(datasets):
        try:
            found.append(_found(dataset, file, folder))
        except UserError as error:
            at = f" ({error.where})" if error.where else ""
            faults.append(UserError(f"{error.what}{at}", where=where.format(index), fix=error.fix))
    images: ImagesSpec | None = None
    try:
        images = _images(section.images or mixture.images, file, folder)
    except UserError as error:
        at = f" ({error.where})" if error.where else ""
        faults.append(UserError(f"{error.what}{at}", where="calibration.images", fix=error.fix))
    if faults:
        raise PlanError(faults)
    short = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    return CalibrationSpec(
        tuple(found),
        num_samples=section.num_samples or mixture.num_samples or DEFAULT_SAMPLES,
        sequence_length=section.sequence_length or mixture.sequence_length or short,
        seed=next(seed for seed in (section.seed, mixture.seed, recipe.seed) if seed is not None),
        mixture=file,
        images=images,
    )


def seen_from(
    at: Path, section: CalibrationSection | None, spec: CalibrationSpec
) -> CalibrationSection | None:
    """The section with relative files named from the folder ``at``, so that a recipe copied there runs too.

    A mixture that is not a shipped one is spelled out.
    """
    if section is None:
        return None
    images = _moved_images(section.images, spec.images, at)
    if spec.mixture is not None and _is_shipped(spec.mixture):
        return section.model_copy(update={"images": images})
    return CalibrationSection(
        datasets=tuple(_moved(dataset, at) for dataset in spec.datasets),
        num_samples=spec.num_samples,
        sequence_length=spec.sequence_length,
        seed=spec.seed,
        images=images,
    )


def _moved_images(given: ImagesSection | None, found: ImagesSpec | None, at: Path) -> ImagesSection | None:
    """The images of the recipe, else of its mixture, named from the folder ``at``."""
    if found is None:
        return None
    path = found.name if Path(found.name).is_absolute() else os.path.relpath(found.path, at)
    return ImagesSection(path=path, num_samples=found.num_samples if given is None else given.num_samples)


def _mixture_file(name: str, folder: Path) -> Path:
    try:
        return data.find(f"calibration/{name}.yaml", beside=folder, what="mixture")
    except UserError as error:
        known = sorted(path.stem for path in (data.shipped_root() / "calibration").glob("*.yaml"))
        fix = f"shipped: {', '.join(known)}; or list `datasets` instead; {error.fix}"
        raise PlanError([UserError(error.what, where="calibration.mixture", fix=fix)]) from error


def _mixture(file: Path) -> CalibrationSection:
    """A mixture's file, which may extend others.

    Raises:
        PlanError: all its faults.
    """
    faults: list[RecipeError] = []
    try:
        root = settle(read_tree(file, faults), faults)
    except RecipeFaults as error:
        raise PlanError(error.faults) from error
    assert isinstance(root, Fields)
    mixture = build(root, faults, CalibrationSection)
    if mixture is not None and mixture.mixture is not None:
        where = root.entries["mixture"].where
        faults.append(RecipeError("a mixture names no mixture", where=where, fix="use `extends`"))
    if mixture is not None and not mixture.datasets:
        faults.append(RecipeError("key 'datasets' is missing", where=root.where))
    if mixture is None or faults:
        raise PlanError(faults)
    return mixture


def _found(dataset: DatasetSection, mixture: Path | None, folder: Path) -> DatasetSpec:
    """The dataset with its file found: beside the mixture, else where evaluation texts are looked for.

    Raises:
        UserError: it is missing, or no UTF-8 text.
    """
    if dataset.hub is not None:
        given = dataset.model_dump(exclude={"path", "split"})
        part = "".join(f"/{name}" for name in (dataset.subset,) if name)
        return DatasetSpec(name=f"{dataset.hub}{part}", split=dataset.split or DEFAULT_SPLIT, **given)
    assert dataset.path is not None
    beside = mixture.parent / dataset.path if mixture is not None else None
    name = str(beside) if beside is not None and beside.is_file() else dataset.path
    path = data.find(name, beside=folder, what="calibration text")
    return DatasetSpec(
        name=dataset.path,
        path=path,
        sha256=text_sha256(path),
        field=dataset.field,
        weight=dataset.weight,
        template=dataset.template,
    )


def _images(section: ImagesSection | None, mixture: Path | None, folder: Path) -> ImagesSpec | None:
    """The conversations with their file found and their images checked.

    Raises:
        UserError: as ``images_sha256``, or there are fewer than are asked for.
    """
    if section is None:
        return None
    beside = mixture.parent / section.path if mixture is not None else None
    name = str(beside) if beside is not None and beside.is_file() else section.path
    path = data.find(name, beside=folder, what="calibration images")
    sha256, count = images_sha256(path)
    wanted = section.num_samples or count
    if wanted > count:
        raise UserError(f"it holds {count} conversations, {wanted} are asked for", where=str(path))
    return ImagesSpec(section.path, path, sha256, wanted)


def _is_shipped(path: Path) -> bool:
    return path.is_relative_to(data.shipped_root())


def _moved(dataset: DatasetSpec, at: Path) -> DatasetSection:
    """The dataset as a recipe in the folder ``at`` spells it; absolute paths stay as they were given."""
    path: str | None = None
    if dataset.path is not None and Path(dataset.name).is_absolute():
        path = dataset.name
    elif dataset.path is not None and _is_shipped(dataset.path):
        path = dataset.path.relative_to(data.shipped_root()).as_posix()
    elif dataset.path is not None:
        path = os.path.relpath(dataset.path, at)
    return DatasetSection(
        path=path,
        hub=dataset.hub,
        subset=dataset.subset,
        revision=dataset.revision,
        split=dataset.split,
        field=dataset.field,
        weight=dataset.weight,
        template=dataset.template,
    )
