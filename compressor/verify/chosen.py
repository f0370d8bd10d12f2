"""What a result's own report and recipe say of values that data chose; neither is taken at its word."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CheckpointError, UserError
from compressor.recipe.load import load_recipe
from compressor.recipe.model import Recipe, WeightsSection
from compressor.report.model import Report, load_report
from compressor.solvers.base import Solver
from compressor.solvers.llmcompressor import LlmCompressor
from compressor.verify.base import Chosen, Transform
from compressor.verify.inputs import RECIPE_FILE


def chosen_with_data(checkpoint: Path) -> Chosen:
    """What the folder's report names as changed, as far as its recipe has something that changes it.

    Nothing without a report. Tensors that the report names although nothing that changes them stands in the
    recipe are compared like all others.
    """
    try:
        report = load_report(checkpoint)
    except CheckpointError:
        return Chosen()
    recipe, shown = _recipe(checkpoint), report.calibration
    named = frozenset(report.adapters.changed if report.adapters else ())
    trains = recipe is not None and recipe.adapters is not None and recipe.adapters.merge
    adapted = named if trains else frozenset[str]()
    predicting = _predicting(report, recipe)
    if shown is None:
        return Chosen(adapted=adapted, named=named, predicting=predicting)
    moved = frozenset(shown.polish.changed_16bit if shown.polish else ())
    changed = frozenset(shown.changed_16bit)
    weights = None if recipe is None else recipe.weights
    solvers = _solvers(weights) if weights is not None else []
    transform = _transform(solvers)
    polished = weights is not None and weights.polish is not None
    learned = any(solver.learning is not None for solver in solvers)
    return Chosen(
        calibrated=frozenset(matrix.name for matrix in shown.matrices if matrix.solver != "rtn"),
        moved=moved if polished else frozenset(),
        trained=learned or (polished and bool(moved)),
        changed=changed if transform is not None else frozenset(),
        # Scales may have moved between matrices only.
        transform=transform if changed or shown.smoothed else None,
        named=moved | changed | named,
        adapted=adapted,
        predicting=predicting,
    )


def _predicting(report: Report, recipe: Recipe | None) -> bool:
    """Whether both say that the source's own prediction layer was trained, and has changed."""
    asked = None if recipe is None else recipe.drafts
    told = report.drafts
    if asked is None or told is None or told.training is None:
        return False
    return asked.kind == told.kind == "native" and asked.train is not None and told.training.best_step > 0


def _recipe(checkpoint: Path) -> Recipe | None:
    """The folder's recipe; None where it has none that can be read."""
    path = checkpoint / RECIPE_FILE
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return load_recipe(str(path.absolute())).recipe
    except UserError:
        return None


def _solvers(weights: WeightsSection) -> list[Solver]:
    return [weights.solver, *(rule.solver for rule in weights.rules if rule.solver is not None)]


def _transform(solvers: list[Solver]) -> Transform | None:
    """What the solvers do to weights before they are quantized."""
    library = [solver for solver in solvers if isinstance(solver, LlmCompressor) and solver.transforms]
    if any(solver.uses("SpinQuantModifier") for solver in library):
        return "rotated"
    smoothed = any(solver.smoothing is not None for solver in solvers)
    return "scaled" if library or smoothed else None
