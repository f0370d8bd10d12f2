"""ModelOpt's unified Hugging Face export: its algorithms and its tensors, as compressed-tensors knows them.

As NVIDIA/Model-Optimizer@0.47.0 writes it, modelopt/torch/export/quant_utils.py: the algorithm is named by
``get_quantization_format``, the scales are made by ``get_weight_scaling_factor``,
``get_weight_scaling_factor_2`` and ``get_activation_scaling_factor``. A local tensor is named within its
module: ``weight``, ``weight_scale``.

Legend: O out_features, I in_features, R blocks of rows, C blocks of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.layout import load_config, stated_quantization
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

CONFIG_NAME = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
_FP8_BLOCK = 128


@dataclass(frozen=True)
class Algorithm:
    """One way to store a weight, as both dialects call it.

    Attributes:
        name: ModelOpt's ``quant_algo``.
        preset: compressed-tensors' preset, which is also the label of the scheme.
        format: compressed-tensors' ``format`` of that preset.
        group_size: values in a block, or None where ModelOpt's config does not say.
    """

    name: str
    preset: str
    format: str
    group_size: int | None = None

    @property
    def nvfp4(self) -> bool:
        """Whether weights are NVFP4."""
        return self.group_size is not None

    @property
    def static_inputs(self) -> bool:
        """Whether a scale of the inputs is stored."""
        return self.preset in ("NVFP4", "FP8")

    def ct_scheme(self, targets: list[str]) -> QuantizationScheme:
        """The compressed-tensors description of modules so stored."""
        from compressed_tensors.config import CompressionFormat
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.preset, targets)
        scheme.format = CompressionFormat(self.format)
        return scheme


ALGORITHMS = (
    Algorithm("W4A16_NVFP4", "NVFP4A16", "nvfp4-pack-quantized", 16),
    Algorithm("NVFP4", "NVFP4", "nvfp4-pack-quantized", 16),
    Algorithm("FP8", "FP8", "float-quantized"),
    Algorithm("FP8_PER_CHANNEL_PER_TOKEN", "FP8_DYNAMIC", "float-quantized"),
    # In lower case: ModelOpt's process_layer_quant_config has no public name for it. Readers fold the case.
    Algorithm("fp8_pb_wo", "FP8_BLOCK", "float-quantized"),
)
_BY_NAME = {algorithm.name.upper(): algorithm for algorithm in ALGORITHMS}
_BY_PRESET = {algorithm.preset: algorithm for algorithm in ALGORITHMS}


def algorithm_for(preset: str) -> Algorithm | None:
    """ModelOpt's algorithm that stores what the compressed-tensors preset does, or None."""
    return _BY_PRESET.get(preset)


def modelopt_headers(algorithm: Algorithm, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Local name -> header in ModelOpt's dialect, from those in compressed-tensors' (as ``to_modelopt``)."""
    scale = headers["weight_scale"]
    if algorithm.nvfp4:
        divisor = headers["weight_global_scale"]
        found = {
            "weight": headers["weight_packed"],
            "weight_scale": scale,
            "weight_scale_2": TensorHeader(divisor.name, "F32", ()),
        }
    else:
        shape = _scale_shape(algorithm, scale.shape)
        found = {"weight": headers["weight"], "weight_scale": TensorHeader(scale.name, "F32", shape)}
    if algorithm.static_inputs:
        found["input_scale"] = TensorHeader(headers[_input_name(algorithm)].name, "F32", ())
    return found


def to_modelopt(algorithm: Algorithm, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ModelOpt's local tensors from those of compressed-tensors; codes and block scales keep their bits.

    NVFP4: ``weight_scale_2`` fp32 [] = 1 / ``weight_global_scale``, the number that engines make of the
    latter themselves (vllm@0.32.0 compressed_tensors_w4a4_nvfp4.py), and ``input_scale`` likewise of
    ``input_global_scale``. FP8: scales become fp32, [O], [R, 1, C, 1] or []; from 16 bit that is exact.
    """
    scale = tensors["weight_scale"]
    if algorithm.nvfp4:
        spelled = {
            "weight": tensors["weight_packed"],
            "weight_scale": scale,
            "weight_scale_2": tensors["weight_global_scale"].float().reciprocal().reshape(()),
        }
    else:
        wide = scale.float().reshape(_scale_shape(algorithm, tuple(scale.shape)))
        spelled = {"weight": tensors["weight"], "weight_scale": wide}
    if algorithm.static_inputs:
        spelled["input_scale"] = _turned(algorithm, tensors[_input_name(algorithm)]).reshape(())
    return spelled


def to_compressed_tensors(
    algorithm: Algorithm, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """compressed-tensors' local tensors from ModelOpt's: the inverse of ``to_modelopt``, scales in fp32.

    A ``weight_global_scale`` comes back exactly where it is a power of two, as the full search takes it, else
    to within the rounding of its reciprocal; so does an ``input_global_scale``. ModelOpt writes the scale of
    a matrix that is one block without dimensions.
    """
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if algorithm.nvfp4:
        found = {
            "weight_packed": codes,
            "weight_scale": scale,
            # Of one element, not of none: the library would compute in the scale's 16 bit.
            "weight_global_scale": tensors["weight_scale_2"].float().reciprocal().reshape(1),
        }
    else:
        rows, columns = codes.shape
        shapes = {
            "FP8_BLOCK": (-(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK)),
            "FP8_DYNAMIC": (rows, 1),
            "FP8": (1,),
        }
        found = {"weight": codes, "weight_scale": scale.reshape(shapes[algorithm.preset])}
    if algorithm.static_inputs:
        found[_input_name(algorithm)] = _turned(algorithm, tensors["input_scale"]).reshape(1)
    return found


def local_names(algorithm: Algorithm) -> tuple[str, ...]:
    """The local tensors of a module so stored, in ModelOpt's dialect."""
    second = ("weight_scale_2",) if algorithm.nvfp4 else ()
    inputs = ("input_scale",) if algorithm.static_inputs else ()
    return ("weight", "weight_scale", *second, *inputs)


def _input_name(algorithm: Algorithm) -> str:
    """The scale of the inputs, as compressed-tensors names it."""
    return "input_global_scale" if algorithm.nvfp4 else "input_scale"


def _turned(algorithm: Algorithm, scale: torch.Tensor) -> torch.Tensor:
    """A scale of inputs in the other dialect: NVFP4's is a divisor in one and a factor in the other."""
    return scale.float().reciprocal() if algorithm.nvfp4 else scale.float()


def _scale_shape(algorithm: Algorithm, shape: tuple[int, ...]) -> tuple[int, ...]:
    """ModelOpt's shape of FP8 scales that compressed-tensors stores in ``shape``."""
    if algorithm.preset == "FP8_BLOCK":
        rows, columns = shape
        return rows, 1, columns, 1
    return () if algorithm.preset == "FP8" else (shape[0],)


def with_description(config: Mapping[str, Any], raw: bytes, where: str) -> dict[str, Any]:
    """A config.json with what hf_quant_config.json (``raw``) says, unless it describes a quantization itself.

    Raises:
        CheckpointError: that file is not JSON, or not laid out as ModelOpt's.
    """
    if stated_quantization(config):
        return dict(config)
    found = load_config(raw, f"{where}/{CONFIG_NAME}").get("quantization")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{CONFIG_NAME} is not laid out as ModelOpt's", where=where)
    return {**config, "quantization_config": {**found, "quant_method": "modelopt"}}


class Description:
    """What a ModelOpt config says of the modules that are quantized.

    Args:
        config: ``quantization_config`` of config.json, or the contents of hf_quant_config.json.
        where: its file, for messages.

    Raises:
        CheckpointError: it is not laid out as one.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        inner = config.get("quantization", config)
        layers = inner.get("quantized_layers") or {} if isinstance(inner, Mapping) else None
        if not isinstance(layers, Mapping) or not all(isinstance(x, Mapping) for x in layers.values()):
            raise CheckpointError("the quantization config is not laid out as ModelOpt's", where=where)
        self._everywhere = inner
        self._layers = layers

    def algorithm(self, module: str) -> Algorithm:
        """How a module is stored; one of a mixed checkpoint may be named by an ancestor (fused experts).

        Raises:
            CheckpointError: nothing names it, or its algorithm is not read here.
        """
        found = self._everywhere
        if str(found.get("quant_algo")).upper() == MIXED:
            names = [module]
            while "." in names[-1]:
                names.append(names[-1].rpartition(".")[0])
            found = next((self._layers[name] for name in names if name in self._layers), {})
            if not found:
                raise CheckpointError("quantized, but quantized_layers does not name it", where=module)
        name, size = found.get("quant_algo"), found.get("group_size")
        algorithm = _BY_NAME.get(str(name).upper())
        if algorithm is None:
            known = ", ".join(_BY_NAME)
            raise CheckpointError(
                f"ModelOpt's quant_algo {str(name)[:40]!r} is not read here; read: {known}", where=self._where
            )
        if algorithm.group_size is not None and size not in (None, algorithm.group_size):
            raise CheckpointError(
                f"{algorithm.name} in blocks of {str(size)[:40]}; only {algorithm.group_size} is read",
                where=self._where,
            )
        return algorithm
