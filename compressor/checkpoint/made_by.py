"""A checkpoint of a model that transformers does not know: an installed package makes its modules.

config.json holds the factory's keyword arguments. Nothing is imported here: whoever builds the model asks
``allowed_factory`` first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind, Source
from compressor.checkpoint.wrapping import Wrapping
from compressor.errors import UserError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

# Of the result's config.json: which factory makes the model. A folder that has it is never built by itself.
FACTORY_KEY = "compressor_factory"
# The model_type of a config.json that has none.
MODEL_TYPE = "compressor_factory"
_NOT_ARGUMENTS = frozenset(
    {FACTORY_KEY, "model_type", "architectures", "dtype", "torch_dtype", "quantization_config"}
    | {"transformers_version"}
)


class FactorySource(Wrapping):
    """A source whose model is made by ``factory``; all else is that of the folder or repository.

    Args:
        inner: the checkpoint.
        factory: ``module:callable``.
        allowed: whether the user allowed this code to be run.
    """

    def __init__(self, inner: Source, factory: str, *, allowed: bool) -> None:
        self.factory = factory
        self.allowed = allowed
        self.inner = inner
        self.label: str = inner.label
        self.kind: Kind = inner.kind
        self.revision: str | None = inner.revision
        self.license: str | None = inner.license
        self.headers: Mapping[str, TensorHeader] = inner.headers
        self.note: str = "; ".join(filter(None, (inner.note, f"modules made by {factory}")))
        self.config: dict[str, Any] = {"model_type": MODEL_TYPE} | inner.config | {FACTORY_KEY: factory}
        # Another version of the package may compute otherwise.
        told = f"{inner.fingerprint} {factory} {_package_version(factory)}"
        self.fingerprint: str = hashlib.sha256(told.encode()).hexdigest()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``."""
        return self.inner.read(name, index)

    def stored_names(self, name: str) -> Collection[str]:
        """The tensor itself."""
        return (name,)


def allowed_factory(source: Source) -> str | None:
    """The factory that makes the source's model, or None where transformers does.

    Raises:
        UserError: nobody allowed its code to be run.
    """
    if not isinstance(source, FactorySource):
        return None
    if not source.allowed:
        raise not_allowed(source.factory)
    return source.factory


def not_allowed(factory: str) -> UserError:
    """The refusal of code that nobody allowed."""
    return UserError(
        f"this would import and call {factory}, code of an installed package",
        where="model.factory",
        fix="give `compress run` the option --allow-code if you trust it",
    )


def factory_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a config.json holds for its factory."""
    return {name: value for name, value in config.items() if name not in _NOT_ARGUMENTS}


def missing_package(factory: str) -> UserError | None:
    """A fault where the factory's package is not installed; tells without running any of its code."""
    package = factory.partition(":")[0].partition(".")[0]
    try:
        if find_spec(package) is not None:
            return None
    except ValueError:  # a module without a spec, such as __main__
        pass
    return UserError(
        f"the package {package!r} of {factory} is not installed",
        where="model.factory",
        fix="install it into the environment of this program",
    )


def _package_version(factory: str) -> str:
    package = factory.partition(":")[0].partition(".")[0]
    try:
        return ", ".join(version(name) for name in packages_distributions().get(package, ()))
    except PackageNotFoundError:
        return ""
