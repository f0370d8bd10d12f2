"""The commits behind the branches and tags that a mixture names: a moved branch is another text."""

from __future__ import annotations

import re
from dataclasses import replace

from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 15.0


def pinned(spec: CalibrationSpec, *, planning: bool) -> tuple[CalibrationSpec, list[str]]:
    """The spec with the commit of every Hub dataset, and a warning for each that was named otherwise.

    ``planning``: where the Hub does not answer, the branch stays, since nothing will be read.

    Raises:
        UserError: the Hub does not answer, or knows no such dataset or revision.
    """
    datasets, warnings = [], []
    for dataset in spec.datasets:
        if dataset.hub is None or dataset.revision is None or _COMMIT.fullmatch(dataset.revision):
            datasets.append(dataset)
            continue
        unpinned = f"calibration: {dataset.name} is not pinned to a commit: {dataset.revision}"
        try:
            commit = _commit(dataset, dataset.hub)
        except UserError:
            if not planning:
                raise
            datasets.append(dataset)
            warnings.append(f"{unpinned} may change")
            continue
        datasets.append(replace(dataset, revision=commit))
        warnings.append(f"{unpinned} is {commit} now, which this run uses")
    return replace(spec, datasets=tuple(datasets)), warnings


def _commit(dataset: DatasetSpec, hub: str) -> str:
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(hub, revision=dataset.revision, timeout=_TIMEOUT_S).sha
    except Exception as error:  # whatever the Hub's client or the network raise
        raise UserError(
            f"the Hub does not say what {dataset.revision} of the dataset {hub} is: "
            f"{(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}",
            where="calibration.datasets",
            fix="pin `revision` to a commit, check the id and the connection, or use a file with `path`",
        ) from error
    if found is None or not _COMMIT.fullmatch(found):
        raise UserError(f"the Hub names no commit of the dataset {hub}", where="calibration.datasets")
    return str(found)
