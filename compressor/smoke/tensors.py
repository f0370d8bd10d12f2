"""The small checkpoint's tensors: names and dtypes of the source's headers, shapes of the small model.

The small model is built on the meta device and its tensors renamed and rebuilt as transformers 5.17 saves
them (``core_model_loading.py`` revert_weight_conversion): experts one by one where checkpoints have them so.
What transformers knows nothing of (multi-token prediction layers) is shrunk by the widths of the rest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.errors import CheckpointError
from compressor.model.architecture import model_class
from compressor.model.quiet import quiet
from compressor.model.skeleton import library_faults
from compressor.smoke.config import parsed
from compressor.smoke.layers import without_numbers
from compressor.smoke.sizes import experts
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SHOWN = 3


def small_headers(
    headers: Mapping[str, TensorHeader], raw: Mapping[str, Any], blocks: tuple[str, int], where: str
) -> dict[str, TensorHeader]:
    """The small checkpoint's headers, in file order.

    Args:
        headers: the source's.
        raw: the small model's config.json.
        blocks: path of the decoder's list of blocks, and how many the source has: blocks of higher numbers
            (multi-token prediction) take the numbers behind the kept ones.
        where: the source, for messages.

    Raises:
        CheckpointError: transformers cannot build the small model, or the source's tensors are not its.
    """
    config = parsed(raw, where).get_text_config()
    named = _named(headers, *blocks, kept=config.num_hidden_layers)
    known = _known_shapes(raw, named, where)
    matched = {name: known[name] for name in named if name in known}
    _check_whole(known, matched, where)
    guess = _Shapes(named, matched)
    few, templates = experts(config), {without_numbers(name) for name in known}
    shapes = dict(matched)
    for name, header in named.items():
        number = _number(name, blocks[0])
        behind = number is not None and number >= config.num_hidden_layers
        # Of a name that the small model has with other numbers: a cut expert, or a cut layer of a tower.
        is_cut = name in known or (without_numbers(name) in templates and not behind)
        if not is_cut and not _is_cut_expert(name, few):
            shapes[name] = guess(name, header.shape)
    return {
        name: TensorHeader(name, header.dtype, shapes[name])
        for name, header in named.items()
        if name in shapes
    }


def declared_class(raw: Mapping[str, Any], config: Any, where: str) -> type[PreTrainedModel]:
    """The class that config.json names under ``architectures``, which has the towers of other modalities too.

    Raises:
        CheckpointError: it names none that transformers has, and there is no causal language model of the
            config either.
    """
    import transformers

    for name in raw.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    with library_faults(where, "transformers has no causal language model for it"):
        return model_class(config)[0]


def _known_shapes(raw: Mapping[str, Any], names: Iterable[str], where: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the small model as a checkpoint stores it.

    Where one of ``names`` is an older name of the same tensor, it stands in the place of the present one.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.utils import ContextManagers

    config = parsed(raw, where)
    chosen = declared_class(raw, config, where)
    with library_faults(where, "--smoke cannot shrink it: no small model can be built"), quiet():
        with ContextManagers(chosen.get_init_context(torch.float32, False, False, False)):
            model: Any = chosen(config)
        state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        saved = revert_weight_conversion(model, dict(state))
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        place_of = _placer(model, state)
        places = {place_of(name): name for name in shapes}
        older = {
            name: places[place]
            for name in names
            if name not in shapes and (place := place_of(name)) in places
        }
    kept = {name: shape for name, shape in shapes.items() if name not in older.values()}
    return kept | {name: shapes[present] for name, present in older.items()}


def _placer(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, str | None, str]]:
    """Tensor -> where the loader puts it (as ``model.tensor_map``): parameter, conversion, expert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [found for found in transforms if isinstance(found, WeightRenaming)]
    converters = [found for found in transforms if isinstance(found, WeightConverter)]

    def place(name: str) -> tuple[str, str | None, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        expert = _EXPERT.search(name)
        return renamed, pattern, expert[1] if expert else ""

    return place


def _named(headers: Mapping[str, TensorHeader], path: str, total: int, kept: int) -> dict[str, TensorHeader]:
    """New name -> header of all but cut blocks; those behind the source's last follow the kept ones."""
    named = {}
    for name, header in headers.items():
        number = _number(name, path)
        if number is None or number < kept:
            named[name] = header
        elif number >= total:
            rest = name.removeprefix(f"{path}.{number}.")
            named[f"{path}.{number - total + kept}.{rest}"] = header
    return named


def _number(name: str, path: str) -> int | None:
    """The number of the block of ``path`` that a tensor lies in."""
    number, point, _ = name.removeprefix(f"{path}.").partition(".")
    return int(number) if name.startswith(f"{path}.") and point and number.isdecimal() else None


def _check_whole(known: Iterable[str], matched: Iterable[str], where: str) -> None:
    """Refuses a checkpoint that lacks matrices of the small model: it has other names than are known here."""
    found = set(matched)
    stored = {without_numbers(name) for name in found}
    lacking = [name for name in known if name not in found and without_numbers(name) in stored]
    blocks = [name for name in known if re.search(r"\.\d+\.", name)]
    if not found or 2 * len(found.intersection(blocks)) < len(blocks) or lacking:
        some = ", ".join([name for name in known if name not in found][:_SHOWN])
        raise CheckpointError(
            f"--smoke cannot shrink it: the tensors have other names than transformers saves, such as {some}",
            where=where,
        )


def _is_cut_expert(name: str, few: int) -> bool:
    found = _EXPERT.search(name)
    return found is not None and 0 < few <= int(found[1])


class _Shapes:
    """Small shapes of tensors that the small model lacks: as that of a like tensor, else width by width."""

    def __init__(self, named: Mapping[str, TensorHeader], matched: Mapping[str, tuple[int, ...]]) -> None:
        self._alike: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        widths: dict[int, Counter[int]] = defaultdict(Counter)
        for name, small in matched.items():
            shape = named[name].shape
            self._alike.setdefault((_ending(name), shape), small)
            if len(shape) == len(small):
                for width, few in zip(shape, small, strict=True):
                    widths[width][few] += 1
        self._widths = {width: counts.most_common(1)[0][0] for width, counts in widths.items()}

    def __call__(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The small shape of the tensor ``name``."""
        alike = self._alike.get((_ending(name), tuple(shape)))
        return alike if alike is not None else tuple(self._width(width) for width in shape)

    def _width(self, width: int) -> int:
        if width in self._widths:
            return self._widths[width]
        half = self._widths.get(width // 2) if width % 2 == 0 else None
        return width if half is None else 2 * half


def _ending(name: str) -> str:
    """What a tensor is called inside its block."""
    return without_numbers(name).rpartition(".*.")[2]
