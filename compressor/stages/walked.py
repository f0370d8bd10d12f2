"""What the walk or the polish leaves behind: a file of finished tensors and a receipt for each block.

Quantized matrices are named and laid out as their schemes do, so that any dialect can be made of them. What
stays in 16 bit is there under its own name where it was changed; what lies in no block has a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compressor.checkpoint.safetensors_file import FileHeader, read_header, read_tensor
from compressor.errors import CheckpointError
from compressor.stages.receipts import PartError, all_receipts, is_whole, read_receipt

if TYPE_CHECKING:
    import torch


# The file of tensors that lie in no block.
REST_NAME = "rest-00000.safetensors"
# A matrix's file may hold its bias as well, which no scheme knows.
_BIAS = "bias"


def layer_name(index: int) -> str:
    """The file of one block."""
    return f"layer-{index:05d}.safetensors"


def smoothing_name(made_by: str) -> str:
    """The scales that were folded into ``made_by``: what a rerun needs, and no part of the result."""
    return f"smoothing:{made_by}"


class Finished(Protocol):
    """Tensors of the result that are made already."""

    def __contains__(self, module: str) -> bool:
        """Whether a matrix is among them."""
        ...

    def local(self, module: str) -> dict[str, torch.Tensor]:
        """Local name -> tensor of a matrix, as its scheme's ``encode`` gave them."""
        ...

    def changed(self, name: str) -> torch.Tensor | None:
        """A tensor that stays in 16 bit, where it was changed; else None."""
        ...

    def error(self, module: str) -> PartError:
        """The errors of a matrix."""
        ...


class WalkedTensors:
    """The finished tensors of all blocks, read one by one; opening it reads the files' headers.

    Raises:
        CheckpointError: a finished file has changed since it was written.
    """

    def __init__(self, folder: Path) -> None:
        finished = [*sorted(folder.glob("layer-*.safetensors")), *folder.glob(REST_NAME)]
        paths = [path for path in finished if read_receipt(folder, path.name) is not None]
        for path in paths:
            if not is_whole(folder, path.name):
                raise CheckpointError(
                    "a finished block in the workspace has changed since it was written",
                    where=str(path),
                    fix="run again with --fresh",
                )
        files = {path: read_header(path) for path in paths}
        self._homes: dict[str, dict[str, tuple[Path, FileHeader]]] = {}
        for path, header in files.items():
            for name in header.headers:
                module, _, local = name.rpartition(".")
                self._homes.setdefault(module, {})[local] = (path, header)
        self._errors = {
            error["module"]: PartError(**error)
            for receipt in all_receipts(folder)
            for error in receipt["errors"]
        }

    def __contains__(self, module: str) -> bool:
        return module in self._errors

    def local(self, module: str) -> dict[str, torch.Tensor]:
        """Local name -> tensor of a matrix, as its scheme's ``encode`` gave them."""
        return {
            local: read_tensor(path, header.headers[name], header.offsets[name])
            for local, (path, header) in self._homes[module].items()
            if local != _BIAS
            for name in (f"{module}.{local}",)
        }

    def changed(self, name: str) -> torch.Tensor | None:
        """A tensor that stays in 16 bit, where it was changed; else None."""
        module, _, local = name.rpartition(".")
        if local not in self._homes.get(module, {}):
            return None
        path, header = self._homes[module][local]
        return read_tensor(path, header.headers[name], header.offsets[name])

    def error(self, module: str) -> PartError:
        """The errors of a matrix."""
        return self._errors[module]
