"""What transformers calls the linear layers of a checkpoint, where that is not what their tensors are called.

transformers 5.17 renames modules while loading (``conversion_mapping.py``): ``vision_tower.*`` of a Gemma 3
checkpoint is ``model.vision_tower.*`` in its model. It matches ``targets`` and ``ignore`` of a
quantization config with its modules' names; vLLM maps the checkpoint's, and those of newer checkpoints, to
its own. A config for both has either name.
"""

from __future__ import annotations

from collections import defaultdict

from compressor.checkpoint.base import Source
from compressor.checkpoint.made_by import allowed_factory
from compressor.model.families import is_wrapper
from compressor.model.names import module_of


def linear_aliases(source: Source) -> dict[str, tuple[str, ...]]:
    """Module by its tensor's name -> other names of it, for linear layers; by both classes of a wrapper.

    Raises:
        CheckpointError: transformers cannot build the model, or the tensors are not its.
    """
    if allowed_factory(source) is not None:
        return {}
    from torch import nn

    from compressor.model.skeleton import build_skeleton
    from compressor.model.tensor_map import TensorMap

    found: dict[str, set[str]] = defaultdict(set)
    for images in (False, True) if is_wrapper(source.config) else (False,):
        model = build_skeleton(source, images=images)
        tensors = TensorMap.of(model, source.headers, source.label)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                for tensor in tensors.sources([f"{name}.weight"]):
                    if module_of(tensor) != name:
                        found[module_of(tensor)].add(name)
    return {module: tuple(sorted(names)) for module, names in sorted(found.items())}
