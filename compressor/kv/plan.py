"""Which format each attention layer has, with what was fitted: ``kv_plan.json`` and ``kv_plan.tensors``.

A plan may come from strangers: sizes, names, shapes and types are checked before anything is made of them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.safetensors_file import FileHeader, load_json, read_header, read_tensor
from compressor.checkpoint.safetensors_writer import write_tensors
from compressor.errors import CheckpointError
from compressor.kv.base import KvCodec
from compressor.kv.formats import FORMATS
from compressor.workspace import write_json

if TYPE_CHECKING:
    import torch

    from compressor.kv.layer import LayerCodecs

JSON_NAME = "kv_plan.json"
# In safetensors; vLLM takes every *.safetensors of a folder without an index for weights, and fails.
TENSORS_NAME = "kv_plan.tensors"
BF16 = "bf16"
ENGINE_BYTES = 2  # of an element in 16 bit

_VERSION = 1
_MOST_JSON_BYTES = 16 * 2**20
_MOST_LAYERS = 10_000
_MOST_NUMBER = 2**24
_LAYER_KEYS = {"layer", "format", "kv_heads", "head_dim", "keys", "values"}


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is stored.

    Attributes:
        format: a name of ``FORMATS`` or of a fitted format; ``bf16`` for layers kept in 16 bit.
        kv_heads: its KV heads.
        head_dim: elements of a head.
        keys: stores the keys; None in 16 bit.
        values: the same for values.
    """

    format: str
    kv_heads: int
    head_dim: int
    keys: KvCodec | None = None
    values: KvCodec | None = None

    def __post_init__(self) -> None:
        assert (self.keys is None) == (self.values is None), "a layer is packed on both sides or on none"

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in one KV head, keys and values."""
        if self.keys is None or self.values is None:
            return 2 * self.head_dim * ENGINE_BYTES
        return self.keys.slot_bytes(self.head_dim) + self.values.slot_bytes(self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all KV heads."""
        return self.kv_heads * self.slot_bytes

    @property
    def plain_bytes(self) -> int:
        """What ``token_bytes`` would be in 16 bit."""
        return self.kv_heads * 2 * self.head_dim * ENGINE_BYTES


@dataclass(frozen=True)
class KvPlan:
    """How the cache of a model is stored.

    Attributes:
        layers: index of a full-attention layer -> how it is stored. Layers of other kinds are not listed.
        sink_tokens: the first tokens of a sequence, which packed layers keep in 16 bit.
        recent_tokens: the last ones, likewise.
    """

    layers: Mapping[int, LayerPlan] = field(default_factory=dict)
    sink_tokens: int = 0
    recent_tokens: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token takes in all layers."""
        return sum(layer.token_bytes for layer in self.layers.values())

    @property
    def bits(self) -> float:
        """Mean bits of an element over layers, keys and values, scales and norms included; sinks are not.

        16 where no layer is listed: latent attention has none.
        """
        plain = sum(layer.plain_bytes for layer in self.layers.values())
        return 16 * self.token_bytes / plain if plain else 16.0

    def bytes_at(self, tokens: int) -> int:
        """Bytes of one sequence of ``tokens`` tokens, sink and recent window included."""
        whole = min(tokens, self.sink_tokens + self.recent_tokens)
        return sum(
            layer.token_bytes * tokens
            if layer.keys is None
            else layer.plain_bytes * whole + layer.token_bytes * (tokens - whole)
            for layer in self.layers.values()
        )

    def bits_at(self, tokens: int) -> float:
        """Mean bits of an element of one sequence of ``tokens`` tokens, everything included."""
        plain = sum(layer.plain_bytes for layer in self.layers.values())
        return 16 * self.bytes_at(tokens) / (plain * tokens)

    def codecs(self) -> dict[int, LayerCodecs]:
        """Layer -> how ``PackedCache`` stores it; layers in 16 bit are left out."""
        from compressor.kv.layer import LayerCodecs

        return {
            index: LayerCodecs(layer.keys, layer.values, self.sink_tokens, self.recent_tokens)
            for index, layer in self.layers.items()
            if layer.keys is not None and layer.values is not None
        }

    def write(self, folder: Path) -> None:
        """Writes the plan's two files into an existing folder; without fitted tensors only the first.

        Raises:
            UserError: the disk is full.
        """
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for index, layer in sorted(self.layers.items()):
            entry: dict[str, Any] = {
                "layer": index,
                "format": layer.format,
                "kv_heads": layer.kv_heads,
                "head_dim": layer.head_dim,
            }
            for side, codec in (("keys", layer.keys), ("values", layer.values)):
                entry[side] = codec and {"kind": codec.kind, "options": dict(codec.options())}
                if codec is not None:
                    for name, tensor in codec.tensors().items():
                        tensors[f"{index}.{side}.{name}"] = tensor.detach().cpu().contiguous().clone()
            layers.append(entry)
        (folder / TENSORS_NAME).unlink(missing_ok=True)
        if tensors:
            write_tensors(folder / TENSORS_NAME, tensors)
        windows = {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}
        write_json(folder / JSON_NAME, {"version": _VERSION, **windows, "layers": layers})

    @classmethod
    def read(cls, folder: Path) -> KvPlan:
        """The plan that ``write`` left in a folder.

        Raises:
            CheckpointError: a file is missing, broken, or says what no plan says.
        """
        return _Reader(folder).plan()


class _Reader:
    """Reads one folder's plan; every fault names the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JSON_NAME
        tensors = folder / TENSORS_NAME
        self._header = read_header(tensors) if tensors.is_file() else FileHeader({}, {}, {}, 0)
        self._classes = codec_classes()
        self._used: set[str] = set()

    def plan(self) -> KvPlan:
        stored = self._json()
        if set(stored) != {"version", "sink_tokens", "recent_tokens", "layers"}:
            raise self._fault("its keys are not those of a plan")
        if stored["version"] != _VERSION:
            raise self._fault(f"version {str(stored['version'])[:20]} of the plan is not known")
        entries = stored["layers"]
        if not isinstance(entries, list) or len(entries) > _MOST_LAYERS:
            raise self._fault("layers must be a list, of a model's length")
        layers: dict[int, LayerPlan] = {}
        for entry in entries:
            index, layer = self._layer(entry)
            if index in layers:
                raise self._fault(f"layer {index} is listed twice")
            layers[index] = layer
        unused = sorted(set(self._header.headers) - self._used)
        if unused:
            raise self._fault(f"no layer uses tensor {unused[0][:80]!r} of {TENSORS_NAME}")
        sink, recent = (
            self._number(stored[name], name, least=0) for name in ("sink_tokens", "recent_tokens")
        )
        return KvPlan(layers, sink, recent)

    def _json(self) -> dict[str, Any]:
        try:
            if self._path.stat().st_size > _MOST_JSON_BYTES:
                raise self._fault(f"a plan of more than {_MOST_JSON_BYTES:,} bytes")
            raw = self._path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(self._path)) from error
        stored = load_json(raw, str(self._path), "the plan")
        if not isinstance(stored, dict):
            raise self._fault("the plan is no JSON object")
        return stored

    def _layer(self, entry: object) -> tuple[int, LayerPlan]:
        if not isinstance(entry, dict) or set(entry) != _LAYER_KEYS:
            raise self._fault(f"a layer is not described by {', '.join(sorted(_LAYER_KEYS))}")
        index = self._number(entry["layer"], "layer", least=0)
        heads = self._number(entry["kv_heads"], "kv_heads")
        head_dim = self._number(entry["head_dim"], "head_dim")
        name = entry["format"]
        if not isinstance(name, str) or not 0 < len(name) <= 80 or not name.isprintable():
            raise self._fault(f"layer {index} has no name of a format")
        keys = self._codec(entry["keys"], f"{index}.keys", heads, head_dim)
        values = self._codec(entry["values"], f"{index}.values", heads, head_dim)
        if (keys is None) != (values is None):
            raise self._fault(f"layer {index} packs only one of keys and values")
        return index, LayerPlan(name, heads, head_dim, keys, values)

    def _codec(self, entry: object, place: str, heads: int, head_dim: int) -> KvCodec | None:
        if entry is None:
            return None
        if not isinstance(entry, dict) or set(entry) != {"kind", "options"}:
            raise self._fault(f"{place}: a codec is described by kind and options")
        kind, options = entry["kind"], entry["options"]
        made_by = self._classes.get(kind) if isinstance(kind, str) else None
        if made_by is None:
            raise self._fault(f"{place}: unknown codec {str(kind)[:40]!r}")
        names = [name for name in self._header.headers if name.startswith(f"{place}.")]
        leaves = {name.removeprefix(f"{place}.") for name in names}
        known = set(inspect.signature(made_by).parameters)
        if (
            not isinstance(options, dict)
            or not set(options) <= known - leaves
            or not leaves <= known
            # Of 2.0 arithmetic would make sizes that are no integers.
            or not all(isinstance(value, int | str) for value in options.values())
        ):
            raise self._fault(f"{place}: not the options and tensors of a {kind} codec")
        self._used.update(names)
        tensors = {
            name.removeprefix(f"{place}."): read_tensor(
                self._folder / TENSORS_NAME, self._header.headers[name], self._header.offsets[name]
            )
            for name in names
        }
        try:
            codec = made_by(**options, **tensors)
            problem = codec.problem(head_dim)
            if problem is None and leaves != set(codec.tensors()):
                problem = "its tensors are not those of such a codec"
            if problem is None and codec.kv_heads not in (None, heads):
                problem = f"it is fitted to another number of KV heads than {heads}"
        # What a constructor makes of values that are not its types is its own business.
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self._fault(f"{place}: no {kind} codec ({str(error)[:120]})") from error
        if problem is not None:
            raise self._fault(f"{place}: {problem}")
        return codec

    def _number(self, value: object, name: str, *, least: int = 1) -> int:
        if type(value) is not int or not least <= value < _MOST_NUMBER:
            raise self._fault(f"{name} is not a number of {least} or more: {json.dumps(value)[:40]}")
        return value

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=str(self._path), fix="write the plan again with compress run")


def codec_classes() -> dict[str, type[KvCodec]]:
    """Kind -> codec: those of all formats, and the fitted ones."""
    from compressor.kv.fitted import FittedCodec
    from compressor.kv.fitted_rotary import RotaryFittedCodec

    made = [codec for form in FORMATS.values() if form.make is not None for codec in form.make()]
    fitted: tuple[type[KvCodec], ...] = (FittedCodec, RotaryFittedCodec)
    return {codec.kind: codec for codec in fitted} | {codec.kind: type(codec) for codec in made}
