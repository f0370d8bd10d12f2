"""What the stage ``drafts`` is told. No torch here: plans ask too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.calibration.spec import CalibrationSpec
from compressor.drafts.spec import Kind
from compressor.evals.decode_spec import DecodeSpec

DRAFT_FOLDER = "draft"
# Tokens of rows that pass target and head together.
PIECE_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class RowsSpec:
    """The rows that a head is trained and measured on.

    Attributes:
        calibration: the texts; its rows are what the target writes on from or, where it writes nothing, the
            rows themselves. The first ``held_out`` of them are not trained on.
        rows: different ones to train on.
        held_out: further ones to measure on.
        new_tokens: of a row that the target writes; 0 where nothing is written.
        temperature: that it writes at; 0 takes the likeliest token.
        seed: of what it writes.
        at_once: texts that it writes at once.
    """

    calibration: CalibrationSpec
    rows: int
    held_out: int
    new_tokens: int
    temperature: float
    seed: int
    at_once: int = 16

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.calibration.sequence_length + self.new_tokens

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able, for the stage's key."""
        told = {name: value for name, value in asdict(self).items() if name != "calibration"}
        return {**told, "calibration": dict(self.calibration.content)}


@dataclass(frozen=True)
class TrainSpec:
    """How a head is trained.

    Attributes:
        steps: of the optimizer; 0 where it is only measured.
        batch: rows of a step.
        learning_rate: the highest.
        warmup_steps: until it is reached.
        unroll: tokens that are proposed one upon the other.
        cache_bytes: of disk, for hidden states of the target.
        patience: measurements without a better one that training goes on for; None for any number.
        save_every: steps after which the state is saved and held-out rows are measured.
        seed: of first values and of the rows' order.
        dtype: of the target's matrix products, and of the head's on an accelerator.
        vocabulary_size: tokens that a new head knows; None for all.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    unroll: int
    cache_bytes: int
    patience: int | None
    save_every: int
    seed: int
    dtype: Literal["float32", "bfloat16"]
    vocabulary_size: int | None = None

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able, for the stage's key: what is kept on the disk changes nothing."""
        return {name: value for name, value in asdict(self).items() if name != "cache_bytes"}


@dataclass(frozen=True)
class DraftSpec:
    """What is made.

    Attributes:
        kind: of the draft.
        tokens: proposed at a time.
        rows: what a head is trained and measured on; None for a draft model.
        train: how; None for a draft model.
        measure: how decoding with it is measured, or None.
    """

    kind: Kind
    tokens: int
    rows: RowsSpec | None = None
    train: TrainSpec | None = None
    measure: DecodeSpec | None = None

    @property
    def content(self) -> dict[str, Any]:
        """JSON-able, for the stage's key: how it is measured does not change it."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "rows": self.rows and self.rows.content,
            "train": self.train and self.train.content,
        }

    @property
    def measure_content(self) -> dict[str, Any]:
        """JSON-able, for the key of the stage that measures: shipped texts by their names."""
        assert self.measure is not None
        domains = {name: path.name for name, path in self.measure.domains.items()}
        return {"kind": self.kind, **asdict(self.measure), "domains": domains}
