"""What sources that read another one's tensors have in common."""

from __future__ import annotations

from pathlib import Path

from compressor.checkpoint.base import Source


class Wrapping:
    """All of a ``Source`` but its tensors is the wrapped one's.

    Attributes:
        inner: the wrapped source, which lies in safetensors.
    """

    inner: Source

    def write_side_files(self, folder: Path) -> list[str]:
        """See ``Source.write_side_files``."""
        return self.inner.write_side_files(folder)

    def model_dir(self) -> Path | None:
        """See ``Source.model_dir``: the tokenizer lies there; the weights may be stored otherwise."""
        return self.inner.model_dir()

    def gguf_file(self) -> str | None:
        """None: the weights are safetensors."""
        return None
