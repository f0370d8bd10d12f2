"""One of several processes that train together: ``adapt_worker.py MODEL TEXT FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from compressor.stages.adapt import AdaptSpec, adapt_stage
from compressor.workspace import file_sha256


def main(model: Path, text: Path, folder: Path) -> None:
    """Trains, and leaves what the stage leaves."""
    spec = AdaptSpec(
        (DatasetSpec(text.name, text, file_sha256(text)),),
        64,
        steps=4,
        sequences=4,
        rank=4,
        alpha=8,
        norms=True,
        embeddings=True,
        learning_rate=2e-2,
        direct_learning_rate=2e-2,
        warmup_steps=2,
        save_every=3,
    )
    adapt_stage(FolderSource(model), spec, folder, Silent())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
