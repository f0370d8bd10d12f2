"""A family: what each checkpoint tensor of an architecture is, told from its name, shape and the config."""

from __future__ import annotations

from typing import Any, Protocol

from compressor.spec import Role, TensorHeader


class Family(Protocol):
    """Facts about one architecture, at the level of checkpoint tensors (never ``nn.Module``).

    Attributes:
        name: ``llama``, ``llama4``, ... as the plan prints it.
        model_types: the ``model_type`` values of config.json that it claims; empty for the fallback.
        inferred: what the fallback had to guess, one sentence for the plan; "" for named families.
        renamed: engines rename its linear layers on loading, so that a quantization config must name them
            plainly (``model.names``); a model with towers is renamed whatever this says.
    """

    name: str
    model_types: tuple[str, ...]
    inferred: str
    renamed: bool

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        """What the tensor is; parts carry the module names that the engine's loader expects.

        Raises:
            CheckpointError: the tensor has a shape that no checkpoint of the architecture can have.
        """
        ...
