"""What a first recipe for a model should say, and why: choices held against the planner's own checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compressor.calibration.spec import DEFAULT_LENGTH, DEFAULT_SAMPLES
from compressor.drafts.native_table import runnable_family
from compressor.errors import CheckpointError, UserError
from compressor.model.families import family_for
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.kv_choice import BF16, kv_options, no_smaller
from compressor.planner.starter_parts import LARGE_BYTES, Found, Goal, Section
from compressor.planner.starter_source import open_named
from compressor.planner.starter_weights import choose_weights
from compressor.recipe.gpus import GPUS, Gpu
from compressor.rope.checked import check_positions
from compressor.stages.base import needs_data

_WINDOW = 1024


@dataclass(frozen=True)
class Starter:
    """A recipe that is not written yet.

    Attributes:
        label: the model.
        gpu: that it is for.
        goal: what for.
        scheme: label of the chosen scheme.
        bytes_before: of the weights in 16 bit.
        bytes_after: of the weights as they will be stored.
        sections: in the recipe's order.
    """

    label: str
    gpu: Gpu
    goal: Goal
    scheme: str
    bytes_before: int
    bytes_after: int
    sections: tuple[Section, ...]

    def without(self, name: str, reason: str) -> Starter:
        """The same with a section left out, and the reason in its place."""
        kept = tuple(
            Section(one.name, None, (reason,), one.value) if one.name == name else one
            for one in self.sections
        )
        return replace(self, sections=kept)


def gpu_named(name: str) -> Gpu:
    """The GPU of the table that ``name`` is, or is the beginning of (``h100``).

    Raises:
        UserError: none, or several.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    found = [gpu for known, gpu in GPUS.items() if known.startswith(wanted)] if wanted else []
    exact = GPUS.get(wanted)
    if exact is not None or len(found) == 1:
        return exact or found[0]
    what = f"no GPU is called {name!r}" if not found else f"{name!r} may be several GPUs"
    raise UserError(what, where="--gpu", fix=f"one of {', '.join(GPUS)}; others: `serve.gpu` in the recipe")


def make_starter(model: str, gpu: Gpu, goal: Goal, *, revision: str | None = None) -> Starter:
    """Chooses every section.

    Args:
        model: as ``model.source`` of a recipe, or a folder of shipped headers.
        gpu: that the result is to be served on.
        goal: ``memory``: the smallest weights and cache; ``speed``: the least arithmetic, for many users;
            ``quality``: 8 bits.
        revision: of a Hub id.

    Raises:
        CheckpointError: the source cannot be opened, or is quantized in a way that is not read.
        UserError: nothing in it can be compressed.
    """
    source, told = open_named(model, revision)
    found = Found(source, gpu, goal)
    weights = choose_weights(found)
    kv = _kv_cache(found)
    large = found.bytes_16bit > LARGE_BYTES
    needed = any(needs_data(claim) for claim in found.claims) or (kv.value or {}).get("calibrate", False)
    sections = (
        told,
        _context(found),
        weights,
        kv,
        _drafts(found),
        _calibration(found, needed=needed),
        _evaluate(found, large=large),
        _serve(found),
    )
    after = sum(claim.result_bytes for claim in found.claims)
    schemes = list(dict.fromkeys(claim.stored.label for claim in found.claims if claim.stored))
    label = str(told.value["source"])
    return Starter(label, gpu, goal, schemes[0], found.bytes_16bit, after, sections)


def _kv_cache(found: Found) -> Section:
    """A format that vLLM serves for the model, if there is one."""
    options, reason = kv_options(found.source.config)
    padded = "vLLM 0.32 pads the pages of all layers to one size, in which {} takes no fewer bytes"
    problems = {option.format: option.problem for option in options}
    problems |= {form: padded.format(form) for form in no_smaller(options) if form != BF16}
    if not options:
        return Section("kv_cache", None, (f"The cache stays in 16 bit: {reason}.",))
    if any(layer.kind == "latent" for layer in kv_layers(found.source.config)[0]):
        told = (
            "Latent attention: nothing is made for its cache; vLLM 0.32 stores FP8 by --kv-cache-dtype fp8."
        )
        return Section("kv_cache", None, (told,))
    small = ("turboquant_4bit_nc", "fp8")
    for form in small if found.goal == "memory" else ("fp8",):
        if problems.get(form) or (form == "fp8" and "fp8" not in found.gpu.flops):
            continue
        calibrate = any(needs_data(claim) for claim in found.claims)
        reach = found.reach or 8192
        contexts = sorted({min(8192, reach), reach})
        value = {"format": form, "calibrate": calibrate, "contexts": contexts, "users": [1, 8]}
        why = (
            "Rotated 4-bit keys and values; vLLM 0.32 serves it by --kv-cache-dtype."
            if form != "fp8"
            else "Half of the cache's bytes at little loss; vLLM 0.32 serves it by --kv-cache-dtype."
        )
        fitted = "Scales are fitted in the same texts." if calibrate else "Without texts nothing is fitted."
        passed = tuple(
            f"Not {one}: {problems[one]}." for one in small[: small.index(form)] if problems.get(one)
        )
        return Section("kv_cache", value, (why, fitted, *(passed if found.goal == "memory" else ())))
    told = next((f": {problems[form]}" for form in small if problems.get(form)), "")
    return Section("kv_cache", None, (f"The cache stays in 16 bit{told}.",))


def _context(found: Found) -> Section:
    reach, findings = found.reach, check_positions(found.source.config)
    if findings:
        told = tuple(f"The source's own positions: {finding.what}." for finding in findings)
        return Section("context", None, told)
    if reach is None:
        return Section("context", None, ("The config does not say how far the model reads.",))
    reason = (
        f"The model reads {reach:,} tokens as it is. Further, without training (measure it: docs/context.md):"
    )
    return Section("context", None, (reason,), {"method": "yarn", "target_length": 4 * reach})


def _drafts(found: Found) -> Section:
    """The source's own prediction layers where it has some; what else there is otherwise."""
    config = found.source.config
    try:
        runnable_family(found.source.headers, config)
    except CheckpointError as error:
        # A trained head is for two architectures, and costs GPU hours.
        if family_for(config).name in ("llama", "llama4"):
            reason = "No prediction layers in the source. A trained EAGLE-3 head proposes tokens; for a GPU:"
            return Section("drafts", None, (reason,), {"kind": "eagle3", "tokens": 3})
        return Section("drafts", None, (f"No drafts: {error.what}.",))
    reason = "The source has prediction layers: kept in 16 bit, they propose tokens that the result verifies."
    return Section("drafts", {"kind": "native", "tokens": 3}, (reason,))


def _calibration(found: Found, *, needed: bool) -> Section:
    reach = found.reach
    length = DEFAULT_LENGTH if reach is None else min(DEFAULT_LENGTH, reach)
    value = {"mixture": "default", "num_samples": DEFAULT_SAMPLES, "sequence_length": length}
    reason = "Shipped prose, code and chat in equal parts; name texts like those that it will be asked for."
    if not needed:
        return Section(
            "calibration", None, (f"Nothing above needs texts. Where something does: {reason}",), value
        )
    return Section("calibration", value, (reason,))


def _evaluate(found: Found, *, large: bool) -> Section:
    reach = found.reach
    window = _WINDOW if reach is None else min(_WINDOW, reach)
    bound = {"memory": "10%", "speed": "5%", "quality": "2%"}[found.goal]
    value = {
        "tokens": 16 * window,
        "context": window,
        "gates": [{"metric": "perplexity", "max_increase": bound}],
    }
    if large:
        reason = (
            f"Measuring means running the {found.bytes_16bit / 1e9:,.0f} GB source as well; where it fits:"
        )
        return Section("evaluate", "null", (reason,), value)
    reason = "Source and result on held-out text; beyond the bound the result is kept aside. Set your own."
    return Section("evaluate", value, (reason,))


def _serve(found: Found) -> Section:
    reach = found.reach
    context = 8192 if reach is None else min(8192, reach)
    reason = "What plan and report compute memory, users, speed and cost for; the result stays the same."
    return Section("serve", {"gpu": found.gpu.name, "context": context, "concurrency": 8}, (reason,))
