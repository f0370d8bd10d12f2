"""A table of named pydantic models: the built-in ones and those that other packages add (entry points)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compressor.errors import UserError

M = TypeVar("M", bound=BaseModel)


class Kinds(Generic[M], Mapping[str, type[M]]):
    """Name -> class of all models of one sort; the name is the default of the class's field ``kind``.

    Args:
        noun: what the models are, for messages ("scheme").
        group: the entry point group of other packages' classes; scanned on first use.
        base: the class that all must derive from.
        builtins: this package's classes.
        refused: what to say for well-known names that do not exist here.
    """

    def __init__(
        self,
        noun: str,
        *,
        group: str,
        base: type[M],
        builtins: tuple[type[M], ...],
        refused: Mapping[str, str],
    ) -> None:
        self._noun = noun
        self._group = group
        self._base = base
        self._builtins = {_kind_of(cls): cls for cls in builtins}
        self._refused = refused
        assert len(self._builtins) == len(builtins), "two built-in classes of one kind"

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._group):
            other = found.get(point.name)
            if point.name in self._builtins or other is not None:
                rival = "a built-in one" if other is None else f"one of package {_package(other)}"
                raise UserError(
                    f"package {_package(point)} adds {self._noun} {point.name!r}, which clashes with {rival}",
                    where=f"entry point group {self._group}",
                    fix=f"uninstall package {_package(point)}, or rename its {self._noun}",
                )
            found[point.name] = point
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._builtins
        yield from self._plugins

    def __len__(self) -> int:
        return len(self._builtins) + len(self._plugins)

    def __getitem__(self, name: str) -> type[M]:
        """The class; an unknown name is a KeyError.

        Raises:
            UserError: the package that adds the name cannot be loaded or adds something else.
        """
        plugins = self._plugins
        return self._builtins[name] if name in self._builtins else self._load(plugins[name])

    def _load(self, point: EntryPoint) -> type[M]:
        fault = ""
        try:
            cls = point.load()
        except Exception as error:  # a plug-in may fail in any way; the user needs its package's name
            fault = f"cannot be loaded: {type(error).__name__}: {error}"
        else:
            if not (isinstance(cls, type) and issubclass(cls, self._base)):
                fault = f"is no {self._base.__name__} class but {cls!r}"
            elif _kind_of(cls) != point.name:
                fault = f"calls itself kind {_kind_of(cls)!r}"
        if fault:
            raise UserError(
                f"the {self._noun} {point.name!r} of package {_package(point)} ({point.value}) {fault}",
                where=f"entry point group {self._group}",
                fix=f"update or uninstall package {_package(point)}",
            )
        return cls  # type: ignore[no-any-return]  # checked just above

    def parse(self, value: str | Mapping[str, Any] | M) -> M:
        """The model for a name, for a mapping with the key ``kind`` and its options, or for itself.

        Raises:
            ValueError: unknown, with the known names and the nearest; pydantic's for bad options.
            UserError: a package's entry point is broken.
        """
        if isinstance(value, self._base):
            return value
        if isinstance(value, str):
            return self._find(value).model_validate({})
        if not isinstance(value, Mapping):
            raise ValueError(f"a {self._noun} is a name or a mapping with the key 'kind', not {value!r}")
        options = dict(value)
        kind = options.pop("kind", None)
        if not isinstance(kind, str):
            raise ValueError(f"a {self._noun} mapping needs the key 'kind': one of {', '.join(self)}")
        return self._find(kind).model_validate(options)

    def _find(self, name: str) -> type[M]:
        if name in self:
            return self[name]
        known = f"(known: {', '.join(self)})"
        reason = self._refused.get(name.lower().replace("-", "_"))
        if reason is not None:
            raise ValueError(f"{self._noun} {name!r} {reason} {known}")
        near = get_close_matches(name.lower(), list(self), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {self._noun} {name!r}{hint} {known}")

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """As an annotation of a field: one of the names, or any model's mapping (with ``kind`` required)."""
        models = [cls.model_json_schema() for cls in self.values()]
        for model in models:
            model["required"] = ["kind", *model.get("required", [])]
        return {"anyOf": [{"type": "string", "enum": list(self)}, *models]}


def _kind_of(cls: type[BaseModel]) -> str:
    return str(cls.model_fields["kind"].default)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "(unknown)"
