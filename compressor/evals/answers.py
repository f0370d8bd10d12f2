"""What a model answered before, kept by content: the same requests to the same model are computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.workspace import write_json


@dataclass(frozen=True)
class Answers:
    """Answers of one model, in files that are each published by one rename.

    Attributes:
        folder: they lie here.
        identity: what else they depend on: the model's content, dtype, device, versions.
    """

    folder: Path
    identity: Mapping[str, str]

    def kept(self, kind: str, asked: Any, compute: Callable[[], list[Any]]) -> list[Any]:
        """What ``compute`` gives, or gave when the same was asked before; NaN is not kept.

        Args:
            kind: of the requests.
            asked: JSON-able: all that the answers depend on besides ``identity``.
            compute: gives a list of JSON-able answers.
        """
        content = json.dumps([kind, dict(self.identity), asked], sort_keys=True, ensure_ascii=True)
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"
        if path.is_file():
            try:
                found: list[Any] = json.loads(path.read_text(encoding="utf-8"))["answers"]
            except (OSError, ValueError, KeyError, TypeError):  # not ours: it is written anew
                path.unlink(missing_ok=True)
            else:
                return found
        made = [list(answer) if isinstance(answer, tuple) else answer for answer in compute()]
        if not any(isinstance(part, float) and part != part for answer in made for part in _parts(answer)):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"kind": kind, "identity": dict(self.identity), "answers": made})
        return made


def _parts(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]
