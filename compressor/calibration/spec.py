"""What a model is calibrated on, as plain records: found, hashed, and apart from any recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Template = Literal["plain", "chat"]

# As many tokens as GPTQ's authors used (128 sequences, arXiv:2210.17323 section 4), in rows that small
# models' positions hold.
DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a mixture: a local or shipped file, or a dataset of the Hub.

    Attributes:
        name: how reports name it.
        path: the file: plain text, or JSON lines where it ends in ``.jsonl`` or ``.ndjson``.
        sha256: of the file.
        hub: id of a dataset on the Hub; ``path`` is None.
        subset: the Hub dataset's configuration, where it has several.
        revision: its commit.
        split: its split.
        field: what holds a document in a JSON line or a Hub row; None is ``text``, else ``messages``.
        weight: its share of the tokens, relative to the others'.
        template: whether documents pass through the tokenizer's chat template; None: conversations do.
        held_out_every: the last of so many documents is left out; 0 for none.
    """

    name: str
    path: Path | None = None
    sha256: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    field: str | None = None
    weight: float = 1.0
    template: Template | None = None
    held_out_every: int = 0

    @property
    def content(self) -> Mapping[str, Any]:
        """JSON-able: which documents these are, wherever the file lies."""
        facts = asdict(self)
        told = {
            name: facts[name]
            for name in ("sha256", "hub", "subset", "revision", "split", "field")
            if facts[name] is not None
        }
        return told | ({"held_out_every": self.held_out_every} if self.held_out_every else {})


@dataclass(frozen=True)
class ImagesSpec:
    """Conversations with images that are shown besides the texts, a row each.

    Attributes:
        name: how reports name the file.
        path: JSON lines; the images lie below its folder.
        sha256: of the file and the images (``images.images_sha256``).
        num_samples: how many of the conversations.
    """

    name: str
    path: Path
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class CalibrationSpec:
    """Rows of tokens to be made of a mixture of datasets.

    Attributes:
        datasets: at least one.
        num_samples: rows.
        sequence_length: tokens of a row.
        seed: decides which stretches of the texts are taken.
        mixture: the file that names the datasets; None where the recipe does.
        images: what is shown besides, or None.
    """

    datasets: tuple[DatasetSpec, ...]
    num_samples: int = DEFAULT_SAMPLES
    sequence_length: int = DEFAULT_LENGTH
    seed: int = 0
    mixture: Path | None = None
    images: ImagesSpec | None = None

    @property
    def tokens(self) -> int:
        """All tokens of all rows; rows with images count as full."""
        return self.samples * self.sequence_length

    @property
    def samples(self) -> int:
        """All rows."""
        return self.num_samples + (self.images.num_samples if self.images else 0)

    @property
    def content(self) -> Mapping[str, Any]:
        """JSON-able, for a stage's key: everything that the rows depend on besides the tokenizer."""
        datasets = [
            {**dataset.content, "weight": dataset.weight, "template": dataset.template}
            for dataset in self.datasets
        ]
        return {
            "datasets": datasets,
            "num_samples": self.num_samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            **({"images": [self.images.sha256, self.images.num_samples]} if self.images else {}),
        }

    @property
    def shares(self) -> list[float]:
        """Each dataset's part of the rows; together they are one."""
        total = sum(dataset.weight for dataset in self.datasets)
        return [dataset.weight / total for dataset in self.datasets]

    def place(self, index: int) -> str:
        """Where a dataset was named: a key of the recipe, or the mixture's file."""
        return f"calibration.datasets.{index}" if self.mixture is None else str(self.mixture)

    def order(self) -> list[int]:
        """The dataset of each row: after any number of rows each has its share, to within a row or so.

        A row goes to the dataset that is furthest behind its share, the first of equals.
        """
        shares = self.shares
        taken = [0] * len(shares)
        order = []
        for row in range(1, self.num_samples + 1):
            # Rounded, so that shares of 1/3 are not ranked by their last bit.
            behind = [round(share * row - count, 9) for share, count in zip(shares, taken, strict=True)]
            chosen = behind.index(max(behind))
            taken[chosen] += 1
            order.append(chosen)
        return order
