"""Context extension on held-out long documents: each scaling, searched factors and adapters, by position.

All read the same tokens. The reference is the model as it was given through a sliding window of the length
that it was trained at; ``window + adapter`` is the same after training on the same texts at that length: what
training on such texts gains without reading further.

Legend: N documents, P scored tokens of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.calibration.spec import DatasetSpec
from compressor.checkpoint.adapted import AdaptedSource
from compressor.checkpoint.base import Source
from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.sources import open_source
from compressor.data import find
from compressor.device import pick_device
from compressor.errors import UserError
from compressor.evals import long_needle
from compressor.evals.long_record import FoundCell, LongText, bucket_edges, by_position
from compressor.evals.long_text import Documents, Sliding, long_documents, measure
from compressor.evals.run import leading_token
from compressor.model.load import load_source_model, load_tokenizer
from compressor.model.rotary import positions_of
from compressor.progress import Progress, Silent
from compressor.rope.scaled import scaled_config
from compressor.rope.search_spec import SearchSpec
from compressor.rope.spec import ContextSpec, ScaledConfig
from compressor.stages.adapt import AdaptSpec, adapt_stage
from compressor.stages.context_search import search_factors
from compressor.workspace import file_sha256, write_json
from scripts.benchmarks.process import SOURCE, Failed, bf16_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WINDOW, NONE, SEARCH = "window", "none", "search"
STRIDES = 8  # of a window
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class _Bench:
    """One model, its documents, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, factor: int) -> None:
        self.options, self.factor = options, factor
        self.source = open_source(str(bf16_folder(options.work, options.model)))
        self.trained: int = self.source.config["max_position_embeddings"]
        self.target = self.trained * factor
        self.tokenizer = load_tokenizer(self.source)
        self.first = leading_token(self.tokenizer)
        self.documents = self._documents()
        self.nll_NP: dict[str, torch.Tensor] = {}
        self.cells: dict[str, tuple[FoundCell, ...]] = {}
        self.facts: dict[str, Any] = {}
        self.progress: Progress = Silent()

    def _documents(self) -> Documents:
        """As many held-out documents of the target length as there are, or as were asked for."""
        try:
            return long_documents(
                self.tokenizer,
                find(self.options.documents),
                documents=self.options.most_documents,
                tokens=self.target,
                first=self.first,
                least=1,
            )
        except UserError as error:
            raise Failed(str(error)) from error

    def loaded(self, source: Source) -> PreTrainedModel:
        """The model in the dtype and on the device to measure with."""
        import torch

        device = pick_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return load_source_model(source, dtype).to(device).eval()

    def read(
        self, name: str, model: PreTrainedModel, *, sliding: bool = False, needles: bool = False
    ) -> None:
        """Measures all documents, and where asked what is found in texts.

        What there is so far is written to the work folder: hours on a GPU may end early.
        """
        began = time.monotonic()
        window = Sliding(self.trained, self.trained // STRIDES) if sliding else None
        self.nll_NP[name] = measure(model, self.documents, sliding=window, progress=self.progress, label=name)
        if needles:
            self.cells[name] = self._found(model)
        write_json(self.options.work / f"context-x{self.factor}.json", self.result(self.by_position(name)))
        means = (f"{bucket.nll[name]:.3f}" for bucket in self.by_position(name).buckets)
        print(f"{name}: {' '.join(means)} ({time.monotonic() - began:.0f} s)", flush=True)

    def _found(self, model: PreTrainedModel) -> tuple[FoundCell, ...]:
        cells: list[FoundCell] = []
        for kind in self.options.kinds:
            for tokens in sorted({self.target} if self.options.few else {self.trained, self.target}):
                hidden = long_needle.hide(
                    self.tokenizer,
                    kind,
                    self.documents.ids_NT[0],
                    tokens=tokens,
                    depths=DEPTHS,
                    trials=self.options.trials,
                    first=self.first,
                    seed=7,
                )
                cells += long_needle.find(model, kind, hidden, progress=self.progress, label=kind)
        return tuple(cells)

    def scaled(self, context: ContextSpec) -> ScaledConfig:
        """The source's config by this scaling."""
        return scaled_config(self.source.config, context)

    def context(self, method: Any) -> ContextSpec:
        """The scaling to the target by ``method``."""
        return ContextSpec(method, self.target)

    def search(self, folder: Path) -> ContextSpec:
        """Searches factors; what they, or YaRN, are."""
        began = time.monotonic()
        path = find(self.options.long_train)
        spec = SearchSpec(
            path,
            file_sha256(path),
            objective=self.options.objective,
            population=self.options.population,
            generations=self.options.generations,
            search_documents=self.options.search_documents,
            accept_documents=self.options.accept_documents,
        )
        found = search_factors(self.source, self.context("longrope"), spec, folder, self.progress)
        self.facts["search"] = {
            "seconds": round(time.monotonic() - began),
            "accepted": found.accepted,
            "reason": found.reason,
            **found.facts,
        }
        print(f"search: {time.monotonic() - began:.0f} s; {found.reason}", flush=True)
        return found.context

    def adapted(self, name: str, source: Source, length: int, steps: int, folder: Path) -> Source:
        """The source after training at ``length``; a run that was killed goes on."""
        began = time.monotonic()
        folder = folder / name.replace(" ", "").replace("+", "")
        folder.mkdir(parents=True, exist_ok=True)
        path = find(self.options.long_train)
        spec = AdaptSpec(
            (DatasetSpec(self.options.long_train, path=path, sha256=file_sha256(path)),),
            length,
            steps=steps,
            sequences=max(1, self.options.adapter_tokens // length),
            rank=self.options.rank,
            alpha=2 * self.options.rank,
            norms=True,
            embeddings=True,
            learning_rate=self.options.adapter_rate,
            direct_learning_rate=self.options.adapter_rate / 4,
            warmup_steps=min(20, steps),
            dtype="bfloat16" if pick_device().type == "cuda" else "float32",
            retrieval=self.options.retrieval,
        )
        facts = adapt_stage(source, spec, folder, self.progress)["adapt"]
        del facts["changed"]
        self.facts[name] = facts
        print(
            f"{name}: {facts['tokens']:,} tokens in {time.monotonic() - began:.0f} s, loss "
            f"{facts['loss_before']:.3f} -> {facts['loss_after']:.3f}, answers {facts['answers'][-5:]}",
            flush=True,
        )
        return AdaptedSource(source, folder, name)

    def by_position(self, reference: str) -> LongText:
        """Everything against one of them."""
        return by_position(
            self.nll_NP,
            bucket_edges(self.trained, self.target),
            names=self.documents.names,
            reference=reference,
            window=self.trained,
            stride=self.trained // STRIDES,
            dtype="bfloat16" if pick_device().type == "cuda" else "float32",
        )

    def result(self, text: LongText) -> dict[str, Any]:
        """JSON-able."""
        cells = {name: [asdict(cell) for cell in found] for name, found in self.cells.items()}
        return {"target": self.target, "text": text.to_json(), "needles": cells, **self.facts}


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Every factor in turn: scalings, the search, adapters; tables to stdout."""
    results = {}
    for factor in options.factors:
        bench = _Bench(options, factor)
        print(f"\nx{factor}: {len(bench.documents.names)} documents of {bench.target:,} tokens", flush=True)
        folder = options.work / f"context-x{factor}"
        _measure(bench, folder)
        text = bench.by_position(WINDOW)
        results[f"x{factor}"] = bench.result(text)
        print(f"\n{render(text, bench.cells)}", flush=True)
    told = {
        name: getattr(options, name)
        for name in ("documents", "long_train", "adapter_rate", "rank", "retrieval")
    }
    return {"model": Path(options.model or SOURCE).name, **told, "factors": results}


def _measure(bench: _Bench, folder: Path) -> None:
    options, source = bench.options, bench.source
    model = bench.loaded(source)
    bench.read(WINDOW, model, sliding=True)
    bench.read(NONE, model)
    for method in options.methods:
        with positions_of(model, bench.scaled(bench.context(method)).config, source.label):
            bench.read(method, model, needles=method == "yarn")
    chosen = bench.context("yarn")
    if not options.no_search:
        del model
        (folder / "search").mkdir(parents=True, exist_ok=True)
        chosen = bench.search(folder / "search")
        model = bench.loaded(source)
        with positions_of(model, bench.scaled(chosen).config, source.label):
            bench.read(SEARCH, model, needles=not options.few)
    del model
    if not options.adapter_steps:
        return
    scaled = bench.scaled(chosen)
    last: Source = ReconfiguredSource(source, dict(scaled.config), scaled.length)
    lengths = options.adapter_lengths or [bench.target]  # one for each of the steps: `parse`
    for length, steps in zip(lengths, options.adapter_steps, strict=True):
        name = f"+ adapter {length:,}"
        last = bench.adapted(name, last, length, steps, folder)
        model = bench.loaded(last)
        bench.read(name, model, needles=length == lengths[-1])
        del model
    if options.control:
        # The same tokens in shorter sequences.
        tokens = sum(length * steps for length, steps in zip(lengths, options.adapter_steps, strict=True))
        name, steps = f"{WINDOW} + adapter", tokens // bench.trained
        model = bench.loaded(bench.adapted(name, source, bench.trained, steps, folder))
        bench.read(name, model, sliding=True)


def render(text: LongText, cells: Mapping[str, tuple[FoundCell, ...]]) -> str:
    """Markdown: negative log-likelihood by position, and hidden numbers found."""
    names = list(text.buckets[0].nll)
    lines = [f"| tokens | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for bucket in text.buckets:
        shown = [
            f"{bucket.nll[name]:.3f}"
            + (f" ({bucket.change[name].mean:+.3f})" if name in bucket.change else "")
            for name in names
        ]
        lines.append(f"| {bucket.start:,} to {bucket.stop:,} | {' | '.join(shown)} |")
    lines += ["", "| hidden in | tokens | " + " | ".join(cells) + " |", "|---" * (len(cells) + 2) + "|"]
    found = {
        name: {at: list(group) for at, group in groupby(of_name, attrgetter("kind", "tokens"))}
        for name, of_name in cells.items()
    }
    for kind, tokens in next(iter(found.values()), {}):
        shown = [_share(of_name[kind, tokens]) for of_name in found.values()]
        lines.append(f"| {kind} | {tokens:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _share(cells: list[FoundCell]) -> str:
    """Found of all, then of each depth."""
    depths = " ".join(str(cell.found) for cell in cells)
    return f"{sum(cell.found for cell in cells)}/{sum(cell.trials for cell in cells)} ({depths})"
