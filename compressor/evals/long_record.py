"""What was measured of long documents, as plain records; ``to_json`` gives the shape that scripts read.

Legend: N documents, P scored tokens of a document: number i of them is the document's token i + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Names of what is measured: the source as it was given, the same through a window, and the result.
SOURCE, SLIDING, RESULT = "source", "sliding", "result"

_RESAMPLES = 2000
_CURVE_POINTS = 64


@dataclass(frozen=True)
class Difference:
    """Of two means over the same tokens, nats; the interval is a paired bootstrap over documents.

    Attributes:
        mean: negative log-likelihood of the one minus that of the other.
        ci95: low and high end, or None where there is one document only.
    """

    mean: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Bucket:
    """The tokens at positions ``start`` to ``stop - 1`` of all documents.

    Attributes:
        start: first position: as many tokens of the document come before.
        stop: past the last.
        nll: name -> mean negative log-likelihood, nats a token.
        change: name -> difference from the reference.
    """

    start: int
    stop: int
    nll: dict[str, float]
    change: dict[str, Difference]


@dataclass(frozen=True)
class LongText:
    """Models, or one in several ways, on the same long documents.

    Attributes:
        names: of the documents.
        tokens: of each.
        reference: the name that the others are compared with.
        window: tokens of the sliding window, or None without one.
        stride: how far it slides.
        buckets: by position.
        curve: positions (middles of equal parts) and for each name the mean there: for a drawing.
        dtype: that the models computed in.
    """

    names: tuple[str, ...]
    tokens: int
    reference: str
    window: int | None
    stride: int | None
    buckets: tuple[Bucket, ...]
    curve: tuple[tuple[int, dict[str, float]], ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``buckets`` with ``nll`` and ``change`` by name; ``curve`` as lists."""
        return {
            "documents": list(self.names),
            "tokens": self.tokens,
            "reference": self.reference,
            "window": self.window,
            "stride": self.stride,
            "dtype": self.dtype,
            "buckets": [
                {
                    "start": bucket.start,
                    "stop": bucket.stop,
                    "nll": bucket.nll,
                    "change": {
                        name: {"mean": found.mean, "ci95": list(found.ci95) if found.ci95 else None}
                        for name, found in bucket.change.items()
                    },
                }
                for bucket in self.buckets
            ],
            "curve": {
                "position": [position for position, _ in self.curve],
                "nll": {
                    name: [means[name] for _, means in self.curve]
                    for name in (self.curve[0][1] if self.curve else ())
                },
            },
        }


@dataclass(frozen=True)
class FoundCell:
    """Hidden numbers at one depth of texts of one length, by one model.

    Attributes:
        kind: ``passkey`` or ``needle``.
        tokens: of a text, question and answer included.
        depth: 0 at the beginning, 1 right before the question.
        trials: how many texts.
        found: of these, the ones whose answer is what greedy decoding gives.
        logprob: mean log-probability of an answer, nats.
        right: of each text, whether its answer was found.
    """

    kind: str
    tokens: int
    depth: float
    trials: int
    found: int
    logprob: float
    right: tuple[bool, ...] = ()


@dataclass(frozen=True)
class RulerScore:
    """One model on one RULER task at one length.

    Attributes:
        task: lm-eval's name.
        tokens: the most that a prompt and its answer have.
        samples: how many.
        score: mean fraction of the wanted strings that the answer has, in 0 to 1.
    """

    task: str
    tokens: int
    samples: int
    score: float


@dataclass(frozen=True)
class LongResult:
    """Everything measured at long context; what was not asked for is empty.

    Attributes:
        text: by position, or None.
        needles: ``source`` or ``result`` -> cells by kind, length and depth.
        ruler: the same of RULER.
        documents_label: how reports name the documents.
    """

    text: LongText | None
    needles: dict[str, tuple[FoundCell, ...]]
    ruler: dict[str, tuple[RulerScore, ...]]
    documents_label: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``text``, ``needles``, ``ruler``, ``documents_label``."""
        return {
            "text": self.text.to_json() if self.text else None,
            "needles": {name: [dict(vars(cell)) for cell in cells] for name, cells in self.needles.items()},
            "ruler": {name: [dict(vars(score)) for score in scores] for name, scores in self.ruler.items()},
            "documents_label": self.documents_label,
        }


def bucket_edges(trained: int, tokens: int) -> tuple[int, ...]:
    """0, an eighth, a half and the whole of the trained length, its doubles, and ``tokens``.

    Of 8,192 trained and 32,768: 0, 1,024, 4,096, 8,192, 16,384, 32,768.
    """
    edges = [0, *(edge for edge in (trained // 8, trained // 2) if edge > 1), trained]
    while edges[-1] < tokens:
        edges.append(2 * edges[-1])
    return (*(edge for edge in edges if edge < tokens), tokens)


def by_position(
    nll_NP: Mapping[str, torch.Tensor],
    edges: Sequence[int],
    *,
    names: Sequence[str],
    reference: str,
    window: int | None,
    stride: int | None,
    dtype: str,
    seed: int = 0,
) -> LongText:
    """Means by bucket of what was measured on the same documents, each against ``reference``.

    Args:
        nll_NP: name -> of ``long_text.measure``, all on the same documents.
        edges: rising positions, from 0 to the documents' tokens; a bucket without a scored token is left out.
        names: of the documents.
        reference: one of the names in ``nll_NP``.
        window: of the sliding window, if there was one.
        stride: of the sliding window.
        dtype: that the models computed in.
        seed: of the bootstrap intervals.
    """
    tokens = next(iter(nll_NP.values())).shape[1] + 1
    assert {tuple(part.shape) for part in nll_NP.values()} == {(len(names), tokens - 1)}
    assert edges[0] == 0
    assert edges[-1] == tokens
    buckets = [
        _bucket(nll_NP, max(start, 1), start, stop, reference, seed)
        for start, stop in pairwise(edges)
        if stop > max(start, 1)
    ]
    points = min(_CURVE_POINTS, tokens - 1)
    cuts = [1 + round(part * (tokens - 1) / points) for part in range(points + 1)]
    curve = [
        (
            (start + stop) // 2,
            {name: float(part[:, start - 1 : stop - 1].double().mean()) for name, part in nll_NP.items()},
        )
        for start, stop in pairwise(cuts)
    ]
    return LongText(
        tuple(names), tokens, reference, window, stride, tuple(buckets), tuple(curve), dtype=dtype
    )


def _bucket(
    nll_NP: Mapping[str, torch.Tensor], first: int, start: int, stop: int, reference: str, seed: int
) -> Bucket:
    """``first``: the first position that is scored; a document's token 0 is not."""
    means = {name: part[:, first - 1 : stop - 1].double().mean(1) for name, part in nll_NP.items()}
    return Bucket(
        start,
        stop,
        {name: float(mean_N.mean()) for name, mean_N in means.items()},
        {
            name: paired_difference(mean_N, means[reference], seed)
            for name, mean_N in means.items()
            if name != reference
        },
    )


def paired_difference(one_N: torch.Tensor, other_N: torch.Tensor, seed: int) -> Difference:
    """Mean of ``one - other`` over documents, with a 95% percentile interval of documents drawn again.

    Tokens of one document depend on each other, documents hardly (Efron and Tibshirani 1993, chapter 13).
    """
    import torch

    difference_N = one_N - other_N
    count = len(difference_N)
    if count < 2:
        return Difference(float(difference_N.mean()), None)
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(count, (_RESAMPLES, count), generator=generator)
    means_R = difference_N[drawn_RN].mean(1)
    low, high = means_R.quantile(torch.tensor([0.025, 0.975], dtype=means_R.dtype)).tolist()
    return Difference(float(difference_N.mean()), (low, high))
