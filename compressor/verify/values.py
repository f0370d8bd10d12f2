"""The values of a checkpoint against those of its source: what was quantized, and what was copied.

Broken values can have sane shapes, finite scales and fluent text. So every decoded matrix is compared with
the matrix that it was made from.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.model.families import family_for, is_prediction
from compressor.model.names import extract
from compressor.progress import Progress
from compressor.spec import FLOAT_DTYPES, LinearPart, Role, TensorHeader
from compressor.verify.base import Check, Chosen
from compressor.verify.resemblance import resemblance
from compressor.verify.structure.kv_scales import is_kv_scale
from compressor.verify.structure.layouts import MARKERS
from compressor.verify.transformed import sane_factors, sane_size, unscaled

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from compressor.checkpoint.stored import StoredTensors
    from compressor.model.decode import StoredWeights

# Relative squared error of a whole matrix, by bits. Ordinary values: 0.008 to 0.015 in 4 bit, 0.001 and less
# in 8.
LIMIT_4BIT = 0.06
LIMIT_8BIT = 0.01
# More values than this that are not the nearest: chosen with calibration, which looks past the single weight.
# Choosing the worse of two neighbours for every weight costs four times the nearest's squared error.
CALIBRATED = 0.05
CALIBRATED_ERROR = 3.0
# Rounding shrinks a matrix by no more than its relative squared error; scales that are all too large, which
# look like calibration otherwise, stretch it. Honest rounding: within 0.01 besides.
GAIN = 0.02
# A polish moves single norms and biases by this much of their squared norm at most; trained scales stretch or
# shrink whole matrices by so much more than rounding does.
POLISHED = 0.1
TRAINED_GAIN = 0.1
# Relative squared error of a matrix in 16 bit whose rows and columns were multiplied: that of rounding.
LIMIT_16BIT = 1e-4
# Training on long documents moves a tensor by this much of its squared norm at most; an unrelated one of the
# same size is off by 2.
ADAPTED = 0.25
_SHOWN = 3


@dataclass
class _Found:
    """What has been compared so far."""

    matrices: int = 0
    copies: int = 0
    far: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    unexplained: bool = False
    unsourced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    absent: int = 0
    moved: int = 0
    changed: int = 0
    adapted_matrices: int = 0
    adapted_copies: int = 0
    calibrated: int = 0
    worst: float = 0.0
    trained: str = "on long documents"


def check_values(stored: StoredWeights, source: Source, progress: Progress, chosen: Chosen) -> list[Check]:
    """Compares every tensor that comes from ``source``; one tensor is in memory at a time.

    Args:
        stored: the checkpoint.
        source: what it was made from.
        progress: told of every matrix.
        chosen: what is known to differ, and why.

    Returns:
        ``weights``: each decoded matrix resembles its source, as a whole and group by group; ``copies``: what
        was not quantized is the source's, bit for bit or rounded to the stored dtype.

    Raises:
        CheckpointError: the source cannot be read.
    """
    family, found = family_for(source.config), _Found()
    roles = {header.name: family.role(header, source.config) for header in source.headers.values()}
    parts = {part.module: (name, part) for name, role in roles.items() for part in role.parts}
    if chosen.predicting:
        # Bounded as what was trained before all else is: one trained is like its source, a stranger's is not.
        retrained = {name for name in source.headers if is_prediction(name, source.config)}
        ways = ("on long documents", "to foretell this result")
        found = _Found(trained=" or ".join(ways[0 if chosen.adapted else 1 :]))
        chosen = replace(chosen, adapted=chosen.adapted | retrained)
    progress.start("values", len(stored.modules) + len(source.headers), "items")
    by_tensor: dict[str, list[tuple[str, LinearPart]]] = defaultdict(list)
    for module in stored.modules:
        if module in parts:
            name, part = parts[module]
            by_tensor[name].append((module, part))
        else:
            found.unsourced.append(module)
    for name, header in source.headers.items():
        if name in stored.names and module_free(name, stored):
            _compare_copy(stored.stored(name), source, header, roles[name], found, chosen)
        elif not by_tensor[name]:
            found.absent += 1
        for module, part in by_tensor[name]:
            adapted = name in chosen.adapted
            _compare_matrix(stored, module, _matrix(source, name, part), found, chosen, adapted=adapted)
            progress.advance(1, module)
        progress.advance(1, name)
    progress.finish()
    found.added = _added(stored, source, roles)
    return [_weights_check(found, chosen), _copies_check(found)]


def check_copies(stored: StoredTensors, source: Source, progress: Progress) -> Check:
    """``copies`` alone, for a folder whose quantization, if it has any, is not read here.

    Raises:
        CheckpointError: either cannot be read.
    """
    found = _Found()
    progress.start("values", len(source.headers), "items")
    for name, header in source.headers.items():
        if name in stored.headers:
            _compare_copy(stored.read(name), source, header, Role("other"), found, Chosen())
        else:
            found.absent += 1
        progress.advance(1, name)
    progress.finish()
    return _copies_check(found)


def module_free(name: str, stored: StoredWeights) -> bool:
    """Whether the tensor was copied: FP8 codes keep the name ``weight``."""
    return name.removesuffix(".weight") not in stored.modules


def _matrix(source: Source, name: str, part: LinearPart) -> torch.Tensor:
    return extract(source.read(name, part.expert), part).float()


def _compare_matrix(
    stored: StoredWeights,
    module: str,
    source_OI: torch.Tensor,
    found: _Found,
    chosen: Chosen,
    *,
    adapted: bool,
) -> None:
    found.matrices += 1
    try:
        decoded_OI = stored.weight(module).float()
    except CheckpointError as error:
        found.far.append(f"{module} ({error.what})")
        return
    if decoded_OI.shape != source_OI.shape:
        found.far.append(f"{module} ({tuple(decoded_OI.shape)} instead of {tuple(source_OI.shape)})")
        return
    if chosen.transform == "rotated":
        if not sane_size(decoded_OI, source_OI):
            found.far.append(f"{module} (not finite, or of another size altogether)")
        return
    if chosen.transform == "scaled":
        nearest_OI = unscaled(decoded_OI, source_OI)
        if nearest_OI is None:
            found.far.append(f"{module} (not even with a factor for each row and column)")
            return
        source_OI = nearest_OI
    scheme = stored.scheme(module)
    found_so = resemblance(decoded_OI, source_OI, _group(scheme, source_OI.shape[1]))
    weights = scheme.weights
    assert weights is not None, "a stored module has a weight scheme"
    if adapted:
        found.adapted_matrices += 1
        if not found_so.relative <= ADAPTED + (LIMIT_4BIT if weights.num_bits <= 4 else LIMIT_8BIT):
            found.far.append(f"{module} (relative squared error {found_so.relative:.2g})")
        return
    found.worst = max(found.worst, found_so.relative)
    limit = LIMIT_4BIT if weights.num_bits <= 4 else LIMIT_8BIT
    loose = chosen.trained or chosen.transform is not None
    calibrated = module in chosen.calibrated or loose or found_so.astray > CALIBRATED
    if calibrated:
        found.calibrated += 1
        limit = min(limit, CALIBRATED_ERROR * found_so.relative / found_so.excess)
    # NaN compares false with everything.
    if not found_so.relative <= limit:
        found.far.append(f"{module} (relative squared error {found_so.relative:.2g})")
    elif abs(found_so.gain) > (TRAINED_GAIN if chosen.trained else GAIN) + found_so.relative:
        found.far.append(f"{module} (as a whole {1 + found_so.gain:.2f} times as large)")
    elif found_so.groups and not calibrated:
        found.groups.append(f"{module} ({found_so.groups:,} group(s))")


def _group(scheme: QuantizationScheme, in_features: int) -> tuple[int, int]:
    """Rows and columns that share a scale; a whole row where the scale is the channel's or the tensor's."""
    weights = scheme.weights
    assert weights is not None, "a stored module has a weight scheme"
    if weights.block_structure:
        rows, columns = weights.block_structure
        return int(rows), int(columns)
    return 1, min(int(weights.group_size), in_features) if (weights.group_size or 0) > 0 else in_features


def _compare_copy(
    ours: torch.Tensor, source: Source, header: TensorHeader, role: Role, found: _Found, chosen: Chosen
) -> None:
    import torch

    found.copies += 1
    theirs = source.read(header.name)
    rounded = theirs.to(ours.dtype) if header.dtype in FLOAT_DTYPES else theirs
    same = ours.dtype == rounded.dtype and ours.shape == rounded.shape
    if same and not torch.equal(ours, rounded):
        same = _may_differ(ours, theirs, header, role, found, chosen)
        found.unexplained |= not same and header.name in chosen.named
    if not same:
        found.unlike.append(header.name)


def _may_differ(
    ours: torch.Tensor, theirs: torch.Tensor, header: TensorHeader, role: Role, found: _Found, chosen: Chosen
) -> bool:
    """Whether the report and the recipe explain the difference, and it is no larger than these make it."""
    if header.dtype not in FLOAT_DTYPES:
        return False
    # What was scaled afterwards has left these bounds.
    if header.name in chosen.adapted - chosen.changed:
        found.adapted_copies += 1
        apart = float((ours.double() - theirs.double()).square().sum())
        size = float(theirs.double().square().sum())
        if ours.dim() < 2:  # a norm that stores its weight less one may be nearly zero
            size = max(size, float((theirs.double() + 1).square().sum()))
        return apart <= ADAPTED * size
    # What was scaled and then polished has left the polish's bounds.
    if header.name in chosen.moved - chosen.changed and ours.dim() < 2:
        found.moved += 1
        error = float((ours.double() - theirs.double()).square().sum())
        # NaN compares false with everything.
        return error <= POLISHED * float(theirs.double().square().sum())
    if header.name not in chosen.changed:
        return False
    found.changed += 1
    if chosen.transform == "rotated":
        return sane_size(ours, theirs)
    if ours.dim() < 2:
        # Gemma's norms store their weight less one.
        return sane_factors(ours, theirs) or sane_factors(ours.double() + 1, theirs.double() + 1)
    if ours.dim() > 2 or role.kind in ("embedding", "lm_head"):
        return False
    nearest_OI = unscaled(ours.float(), theirs.float())
    if nearest_OI is None:
        return False
    error = float((ours.float() - nearest_OI).double().square().sum())
    return error <= LIMIT_16BIT * float(nearest_OI.double().square().sum())


def _weights_check(found: _Found, chosen: Chosen) -> Check:
    if found.unsourced:
        return Check(
            "weights",
            "failed",
            f"quantized, but no matrix of the source: {_some(found.unsourced)}; is this its source?",
        )
    if found.far:
        return Check("weights", "failed", f"do not decode to the source's weights: {_some(found.far)}")
    if found.groups:
        return Check(
            "weights", "failed", f"hold groups whose scale or codes are wrong: {_some(found.groups)}"
        )
    if chosen.transform == "rotated":
        return Check(
            "weights",
            "skipped",
            f"{found.matrices:,} matrices were not compared value by value: the recipe rotates them; all are "
            "finite and of about their source's size",
        )
    adapted = found.adapted_matrices
    trained = f", {adapted:,} of them to about that, trained {found.trained}" if adapted else ""
    how = "each weight the nearest that its group's scale allows"
    if chosen.transform == "scaled":
        how = "but for a factor for each row and column, which the recipe's transform moves between layers"
    elif found.calibrated:
        how = f"{found.calibrated:,} of them not by rounding to nearest"
    return Check(
        "weights",
        "passed",
        f"{found.matrices:,} matrices decode to the source's{trained}, {how}; "
        f"largest relative squared error {found.worst:.4f}",
    )


def _copies_check(found: _Found) -> Check:
    if found.unlike:
        made = "by more than polish or transform of recipe.yaml make it, or its training"
        why = f" ({made})" if found.unexplained else ""
        return Check("copies", "failed", f"differ from the source{why}: {_some(found.unlike)}")
    if found.added and not found.absent:
        return Check("copies", "failed", f"in the checkpoint, but not in the source: {_some(found.added)}")
    if found.absent:
        text = (
            f"{found.copies:,} tensors are the source's; {found.absent:,} of the source are not here by name"
        )
        return Check("copies", "passed" if found.copies else "skipped", text)
    same = found.copies - found.moved - found.changed - found.adapted_copies
    text = f"{same:,} tensors are the source's"
    if found.adapted_copies:
        verb = "was" if found.adapted_copies == 1 else "were"
        text += f"; {found.adapted_copies:,} {verb} trained {found.trained}, which moved none by much"
    if found.moved:
        text += f"; {found.moved:,} norms and biases were moved by the polish, none by much"
    if found.changed:
        text += (
            f"; {found.changed:,} were changed by a transform and not compared bit for bit: all are finite "
            "and within its bounds"
        )
    return Check("copies", "passed", text)


def _added(stored: StoredWeights, source: Source, roles: Mapping[str, Role]) -> list[str]:
    """Tensors that neither the source nor a quantized module accounts for, but for a head that is a copy."""
    import torch

    parts = {name for module in stored.modules for name in stored.parts(module)}
    # A fused tensor of the source may lie here matrix by matrix.
    parts |= {f"{part.module}.weight" for role in roles.values() for part in role.parts}
    found = [
        name
        for name in sorted(stored.names - parts - source.headers.keys())
        if name.rpartition(".")[2] not in MARKERS and not is_kv_scale(name)
    ]
    embeddings = [name for name, role in roles.items() if role.kind == "embedding" and name in stored.names]
    heads = [name for name in found if name.endswith("lm_head.weight") and embeddings]
    copies = {head for head in heads if torch.equal(stored.stored(head), stored.stored(embeddings[0]))}
    return [name for name in found if name not in copies]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
