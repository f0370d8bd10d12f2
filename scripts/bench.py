"""Benchmarks: quality and speed against other tools on one model and text, and the streaming rate.

    python scripts/bench.py quality     NVFP4A16: ours and every data-free setting of llm-compressor
    python scripts/bench.py stream      read -> solve -> write against a plain copy of the same files
    python scripts/bench.py stream --source scout --gigabytes 40 --search minmax --rounds 1 --no-copy
                                        the same with Llama-4-Scout's tensors: larger than memory
    python scripts/bench.py walk --source scout --gigabytes 20 --search minmax --rounds 1
                                        NVFP4 W4A4 of these: activation ranges heard within --memory
    python scripts/bench.py plan        `compress plan` on a synthetic 200 GB header set
    python scripts/bench.py calibrated --peers llmcompressor,autoround,gptqmodel,modelopt
                                        calibrated runs of ours and theirs; `--peers` alone means this one
    python scripts/bench.py layers --shape llama-8b --layers 4 --samples 128 --length 2048
                                        GPTQ by the layer, on random models of real layer shapes
    python scripts/bench.py off-grid --train FILE
                                        fine-tunes the model, so that its weights leave their 4-bit grid
    python scripts/bench.py kv --needle 512 1024
                                        KV-cache formats: quality against bits, table and plot
    python scripts/bench.py context --factors 4
                                        reading further: scalings, searched factors, adapters; a GPU's work
    python scripts/bench.py budget --recipe recipes/smollm2-auto.yaml
                                        what predicts the loss of a mix of schemes, and random mixes
    python scripts/bench.py roofline    decoding of random 8B and 1B models in 16 and 4 bit against what the
                                        plan's roofline predicts; without a GPU of a small one
    python scripts/bench.py kv-kernels  attention over packed KV caches against PyTorch's in bf16, on a GPU

Each measurement runs in a process of its own, ours and theirs alternating; medians and spread go to
``bench/results/*.json`` and, as a Markdown table, to stdout. Times are those of this machine: quote ratios.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.kv.formats import FORMATS  # noqa: E402
from scripts.benchmarks.calibrated import calibrated  # noqa: E402
from scripts.benchmarks.kv import MODES, kv  # noqa: E402
from scripts.benchmarks.layers import layers  # noqa: E402
from scripts.benchmarks.off_grid import off_grid  # noqa: E402
from scripts.benchmarks.plan import plan  # noqa: E402
from scripts.benchmarks.process import Failed, machine, store  # noqa: E402
from scripts.benchmarks.quality import quality  # noqa: E402
from scripts.benchmarks.settings import PEERS, SCHEMES  # noqa: E402
from scripts.benchmarks.shapes import SHAPES  # noqa: E402
from scripts.benchmarks.stream import stream, walk  # noqa: E402


def kv_kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Measured in this process, which imports torch for it."""
    from scripts.benchmarks.kv_kernels import kv_kernels

    return kv_kernels(options)


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Measured in this process too."""
    from scripts.benchmarks.context import context

    return context(options)


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """Measured in this process too."""
    from scripts.benchmarks.budget import budget

    return budget(options)


def roofline(options: argparse.Namespace) -> dict[str, Any]:
    """And this."""
    from scripts.benchmarks.roofline import roofline

    return roofline(options)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "quality": quality,
    "stream": stream,
    "walk": walk,
    "plan": plan,
    "calibrated": calibrated,
    "layers": layers,
    "off-grid": off_grid,
    "kv": kv,
    "kv-kernels": kv_kernels,
    "context": context,
    "budget": budget,
    "roofline": roofline,
}
# As ``benchmarks.roofline`` has them, which imports torch.
ROOFLINE_SHAPES = ["llama-8b", "llama-3b", "llama-1b", "small", "tiny"]
# Tokens of text: the calibrated table has many rows.
TOKENS = {"calibrated": 16384, "layers": 16384, "off-grid": 16384}
# Benchmarks that run peers too, and the solvers of ours that they run unless others are named.
OURS = {"calibrated": ["rtn", "gptq"], "layers": ["gptq"]}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; ``--peers`` without a name of a benchmark is ``calibrated``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS, nargs="?")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="scratch folder")
    parser.add_argument("--rounds", type=_count, default=3, help="alternating runs of each")
    parser.add_argument("--model", help="a bf16 folder or a GGUF file instead of SmolLM2's GGUF")
    parser.add_argument("--text", default="calibration/heldout.jsonl", help="text to measure on")
    parser.add_argument(
        "--tokens", type=_count, help="tokens to measure on (quality: 65536, calibrated: 16384)"
    )
    parser.add_argument(
        "--only", nargs="+", help="peers' settings whose names hold a WORD, or end with a WORD$"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="stream, walk: size of the source")
    parser.add_argument("--memory", type=float, default=8.0, help="walk: GB that it is planned for")
    parser.add_argument(
        "--source", choices=["llama", "scout"], default="llama", help="stream, walk: shape of the source"
    )
    parser.add_argument("--no-copy", action="store_true", help="stream: without the plain copy")
    parser.add_argument("--search", nargs="+", default=["minmax", "full"], help="stream: searches to time")
    group = parser.add_argument_group("calibrated and layers")
    group.add_argument("--peers", type=_peers, help=f"of {','.join(PEERS)}")
    group.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0])
    group.add_argument(
        "--ours",
        nargs="+",
        help='solvers: names, or options as JSON {"kind": ...}; by default rtn gptq, or gptq',
    )
    group.add_argument("--samples", type=_count, default=128, help="calibration rows")
    group.add_argument("--length", type=_count, default=1024, help="tokens of a row")
    group.add_argument(
        "--calibration", nargs="+", metavar="FILE", help="texts to calibrate on, instead of the shipped"
    )
    group.add_argument("--limit-minutes", type=float, default=120, help="a run is stopped after this")
    group.add_argument("--name", help="of the result file, instead of calibrated-SCHEME or layers-SHAPE")
    group.add_argument("--shape", choices=SHAPES, default="llama-8b", help="layers: whose layers")
    group.add_argument("--layers", type=_count, default=3, help="layers: how many")
    group = parser.add_argument_group("off-grid")
    group.add_argument(
        "--train", nargs="+", metavar="FILE", help="texts to train on: neither calibration nor --text"
    )
    group.add_argument("--steps", type=_count, default=200, help="of training")
    group.add_argument("--step-tokens", type=_count, default=8192, help="tokens of a step")
    group.add_argument("--rate", type=float, default=5e-5, help="largest learning rate")
    group.add_argument("--folder", type=Path, help="for the tuned model, instead of WORK/off-grid")
    group = parser.add_argument_group("kv, in windows of --length tokens")
    group.add_argument("--formats", nargs="+", choices=list(FORMATS), metavar="FORMAT", help="instead of all")
    group.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what is read of them")
    group.add_argument(
        "--needle", nargs="+", type=_count, metavar="TOKENS", help="hide needles in such texts"
    )
    group = parser.add_argument_group("budget, --rounds random mixes")
    group.add_argument(
        "--recipe", default="recipes/smollm2-auto.yaml", help="with scheme auto, a bits budget"
    )
    group.add_argument("--divergence-rows", type=_count, default=4, help="that groups alone are tried on")
    _context_options(parser.add_argument_group("context"))
    _roofline_options(parser.add_argument_group("roofline"))
    options = parser.parse_args(words)
    if options.benchmark is None:
        if options.peers is None:
            parser.error("name a benchmark, or --peers for the calibrated one")
        options.benchmark = "calibrated"
    if options.benchmark in OURS:
        if options.peers is None:
            options.peers = list(PEERS) if options.benchmark == "calibrated" else ["llmcompressor"]
        options.ours = options.ours or OURS[options.benchmark]
    if len(options.adapter_lengths or [0]) != len(options.adapter_steps or [0]):
        parser.error("--adapter-steps and --adapter-lengths are as many")
    if options.benchmark == "off-grid" and not options.train:
        parser.error("off-grid needs --train FILE")
    if options.tokens is None:
        options.tokens = TOKENS.get(options.benchmark, 65536)
    return options


def _context_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--factors", nargs="+", type=_count, default=[4], help="times the trained length")
    group.add_argument("--documents", default="calibration/long/heldout.jsonl.xz", help="to measure on")
    group.add_argument(
        "--most-documents", type=_count, default=12, help="of them, if so many are long enough"
    )
    group.add_argument(
        "--long-train", default="calibration/long/train.jsonl.xz", help="to search and train on"
    )
    group.add_argument("--trials", type=_count, default=4, help="hidden numbers of a length and depth")
    group.add_argument("--objective", choices=["perplexity", "needle"], default="perplexity")
    group.add_argument("--population", type=_count, default=16, help="of the search")
    group.add_argument("--generations", type=_count, default=8, help="of the search")
    group.add_argument("--no-search", action="store_true", help="train under YaRN instead")
    group.add_argument("--search-documents", type=_count, default=2)
    group.add_argument("--accept-documents", type=_count, default=4)
    methods, kinds = ["linear", "ntk", "yarn"], ["passkey", "needle"]
    group.add_argument("--methods", nargs="*", choices=methods, default=methods, help="scalings")
    group.add_argument("--kinds", nargs="*", choices=kinds, default=kinds, help="of hidden numbers")
    group.add_argument(
        "--few", action="store_true", help="hide them at the target length only, and not for searched factors"
    )
    group.add_argument("--adapter-steps", nargs="*", type=_count, default=[200], help="of each length")
    group.add_argument("--adapter-lengths", nargs="*", type=_count, help="in turn; by default the target")
    group.add_argument("--control", action="store_true", help="train on as many short sequences too")
    group.add_argument("--adapter-tokens", type=_count, default=0, help="of a step; by default one sequence")
    group.add_argument("--adapter-rate", type=float, default=2e-4, help="largest learning rate of adapters")
    group.add_argument("--rank", type=_count, default=32, help="of adapters")
    group.add_argument("--retrieval", type=float, default=0.6, help="share of sequences with hidden facts")


def _roofline_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--shapes", nargs="+", choices=ROOFLINE_SHAPES, help="by default 8B and 1B on a GPU")
    group.add_argument("--bits", nargs="+", type=int, choices=[16, 4], default=[16, 4], help="16 before 4")
    group.add_argument("--batches", nargs="+", type=_count, default=[1, 8], help="sequences at once")
    group.add_argument("--decode-context", type=_count, default=1024, help="tokens of each")
    group.add_argument("--eager", action="store_true", help="compile nothing between products")
    group.add_argument("--minutes", type=float, default=2.5, help="nothing new is begun after these")


def result_name(options: argparse.Namespace) -> str:
    """The result file's name without its ending."""
    if options.benchmark == "calibrated":
        return str(options.name or f"calibrated-{options.scheme}")
    if options.benchmark == "layers":
        return str(options.name or f"layers-{options.shape}")
    if options.benchmark in ("stream", "walk"):
        shape = "" if options.source == "llama" else f"{options.source}-"
        return f"{options.benchmark}-{shape}{options.gigabytes:g}gb"
    if options.benchmark == "roofline":
        return str(options.name or f"roofline-{'gpu' if 'accelerator' in machine() else 'cpu'}")
    if options.benchmark == "context":
        return f"context-{'-'.join(f'x{factor}' for factor in options.factors)}"
    return str(options.benchmark)


def main() -> None:
    """Runs one benchmark and stores its result."""
    options = parse(sys.argv[1:])
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    options.result_name = result_name(options)
    try:
        result = BENCHMARKS[options.benchmark](options)
    except Failed as error:
        raise SystemExit(f"error: {error}") from error
    stored = store(options.result_name, result)
    print(f"\nwritten to {stored.relative_to(ROOT)}")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown peer {unknown[0]!r}; known: {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    main()
