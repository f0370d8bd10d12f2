"""A source in a GGUF file: dequantized tensor by tensor to bf16, under Hugging Face names and order of rows.

The same bits as transformers' ``from_pretrained(dir, gguf_file=..., dtype=torch.bfloat16)``, which unpacks
the entire model at once (huggingface/transformers 5.17 src/transformers/modeling_gguf_pytorch_utils.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind
from compressor.checkpoint.folder import check_unchanged, file_samples, file_stamp, sample_step
from compressor.checkpoint.gguf_config import (
    ROPE_FREQS,
    Expected,
    architecture,
    build_config,
    expected_tensors,
)
from compressor.checkpoint.gguf_file import GgufTensor, read_gguf_header
from compressor.checkpoint.gguf_tokenizer import TokenizerFacts, write_tokenizer
from compressor.checkpoint.layout import fingerprint
from compressor.checkpoint.safetensors_file import read_into
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# Values dequantized at a time: bounds the fp32 copy to 64 MiB whatever the tensor.
CHUNK_VALUES = 2**24
_UNQUANTIZED = frozenset({"F32", "F16", "BF16"})


class GgufSource:
    """One GGUF file of a supported architecture; opening reads its header only.

    Attributes as ``Source`` describes them; every tensor counts as BF16.

    Raises:
        UserError: the ``gguf`` library is not installed.
        CheckpointError: malformed, incomplete or unsupported.
    """

    kind: Kind = "gguf"
    revision: str | None = None

    def __init__(self, path: Path, label: str | None = None) -> None:
        self._path = path.resolve()
        self.label = label or str(path)
        self._stamp = file_stamp(self._path)
        header = read_gguf_header(self._path)
        kind = architecture(header, self.label)
        _check_types(header.tensors, self.label)
        self.config: dict[str, Any] = build_config(
            header, rope_factors(self._path, header.tensors, self.label), self.label
        )
        if self.config["num_hidden_layers"] > len(header.tensors):
            raise CheckpointError("GGUF metadata claims more layers than there are tensors", where=self.label)
        expected = expected_tensors(self.config, kind)
        _check_complete(header.tensors, expected, self.label)
        stated = header.metadata.get("general.license")
        self.license: str | None = stated if isinstance(stated, str) else None
        self._tokenizer = TokenizerFacts.of(header.metadata, self.config, self.label)
        self._tensors: dict[str, tuple[GgufTensor, Expected]] = {}
        for stored in header.tensors.values():
            if stored.name != ROPE_FREQS:
                self._tensors[expected[stored.name].name] = (stored, expected[stored.name])
        self.headers: Mapping[str, TensorHeader] = {
            name: TensorHeader(name, "BF16", entry.shape) for name, (_, entry) in self._tensors.items()
        }
        types = Counter[str]()
        for stored in header.tensors.values():
            types[stored.kind] += stored.nbytes
        largest = types.most_common(1)[0][0]
        verb = "unpacked" if largest in _UNQUANTIZED else "dequantized"
        self.note = f"{verb} from GGUF {largest} (largest type by bytes)"
        contents = [repr(header.metadata).encode(), repr(list(header.tensors.values())).encode()]
        spans = [(stored.offset, stored.nbytes) for stored in header.tensors.values()]
        contents += file_samples(self._path, spans, sample_step(len(spans)))
        self.fingerprint = fingerprint(self.config, self.headers, {"gguf": self._stamp}, contents)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``: always bf16."""
        check_unchanged(self._path, self._stamp)
        stored, expected = self._tensors[name]
        tensor = _dequantized(self._path, stored)
        if expected.heads is not None:
            tensor = _unpermuted(tensor, expected.heads)
        return tensor if index is None else tensor[index].clone()

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes the tokenizer, chat template and generation config that the metadata describe."""
        return write_tokenizer(self._tokenizer, folder)

    def model_dir(self) -> Path | None:
        """The folder of the file."""
        return self._path.parent

    def gguf_file(self) -> str | None:
        """The file's name."""
        return self._path.name


def rope_factors(path: Path, tensors: Mapping[str, GgufTensor], where: str) -> list[float] | None:
    """The values of ``rope_freqs.weight`` if the file has it.

    Raises:
        CheckpointError: they are no vector of F32.
    """
    stored = tensors.get(ROPE_FREQS)
    if stored is None:
        return None
    if stored.kind != "F32" or len(stored.shape) != 1:
        raise CheckpointError(f"{ROPE_FREQS} must be a vector of F32", where=where)
    return [float(value) for value in _rows(path, stored, 0, 1)[0]]


def _check_types(tensors: Mapping[str, GgufTensor], where: str) -> None:
    """Refuses ggml types that the library cannot dequantize, by trying one block of each."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind in sorted({stored.kind for stored in tensors.values()}):
        number = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError as error:
            name = next(stored.name for stored in tensors.values() if stored.kind == kind)
            raise CheckpointError(
                f"tensor {name}: the gguf library cannot dequantize {kind}", where=where
            ) from error


def _check_complete(tensors: Mapping[str, GgufTensor], expected: Mapping[str, Expected], where: str) -> None:
    """Refuses missing, unknown and misshapen tensors."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"incomplete GGUF: {len(missing)} tensors missing, such as {missing[0]}", where=where
        )
    for name, stored in tensors.items():
        if name == ROPE_FREQS:
            continue
        if name not in expected:
            raise CheckpointError(
                f"GGUF tensor {name} is not known in this architecture",
                where=where,
                fix="use the safetensors checkpoint of this model",
            )
        if stored.shape != expected[name].shape:
            raise CheckpointError(
                f"GGUF tensor {name} has shape {list(stored.shape)}, "
                f"the metadata ask for {list(expected[name].shape)}",
                where=where,
            )


def _rows(path: Path, stored: GgufTensor, begin: int, end: int) -> npt.NDArray[np.float32]:
    """fp32 [end - begin, columns] of a tensor seen as rows along its last dimension."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row_bytes = stored.nbytes // _row_count(stored)
    raw = np.empty((end - begin, row_bytes), np.uint8)
    read_into(path, raw.reshape(-1).data, stored.offset + begin * row_bytes, stored.name)
    values: npt.NDArray[np.float32] = dequantize(raw, GGMLQuantizationType[stored.kind])
    return values


def _row_count(stored: GgufTensor) -> int:
    return stored.shape[0] if len(stored.shape) == 2 else 1


def _dequantized(path: Path, stored: GgufTensor) -> torch.Tensor:
    """bf16, of the tensor's shape."""
    import torch

    rows = _row_count(stored)
    columns = stored.shape[-1]
    found = torch.empty((rows, columns), dtype=torch.bfloat16)
    step = max(CHUNK_VALUES // columns, 1)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        found[begin:end] = torch.from_numpy(_rows(path, stored, begin, end))
    return found.view(stored.shape)


def _unpermuted(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Puts the rows of q or k back: llama.cpp interleaved the two halves of each head.

    Inverse of llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.
    """
    rows, columns = weight_OI.shape
    return weight_OI.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
