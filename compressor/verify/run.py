"""One verification: structure, values, transformers, then the engine; stops early where the rest is moot."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError, UserError
from compressor.progress import Progress
from compressor.report.model import utc_now
from compressor.report.verification import EngineFacts, Verification, VerifyCheck
from compressor.verify.base import Check
from compressor.verify.engine import find_engine_python
from compressor.verify.folded import folded_source
from compressor.verify.inputs import factory_of, find_source, missing_room
from compressor.verify.record import record
from compressor.verify.scaled import scaled_source
from compressor.verify.serving import Questions, question_engine
from compressor.verify.spec import VerifySpec
from compressor.verify.structure import check_structure


def verify(spec: VerifySpec, progress: Progress) -> Verification:
    """Verifies the folder and records the result in its report, where it has one.

    Raises:
        UserError: there is no checkpoint, no text, or no engine although one was insisted on.
    """
    if not spec.checkpoint.is_dir():
        raise CheckpointError("no such folder", where=str(spec.checkpoint), fix="name a checkpoint's folder")
    python = find_engine_python(spec.engine_python, spec.checkpoint) if spec.engine != "none" else None
    if spec.engine == "vllm" and python is None:
        raise UserError(
            "no environment with vLLM was found",
            where="--engine vllm",
            fix="make one with `bash scripts/serve_env.sh`, or name its interpreter with --engine-python",
        )
    checks = check_structure(spec.checkpoint, progress)
    engine = None
    if any(check.status == "failed" for check in checks):
        checks.append(Check("models", "skipped", "the structure is broken, so nothing was loaded"))
    else:
        engine = _check_models(spec, python, checks, progress)
    insisted = spec.engine == "vllm"
    proven = engine is not None and engine.verdict == "agrees"
    refuted = engine is not None and engine.verdict in ("disagrees", "failed")
    found = Verification(
        created=utc_now(),
        passed=all(check.status != "failed" for check in checks) and not refuted and (proven or not insisted),
        checks=tuple(VerifyCheck(name=c.name, status=c.status, detail=c.detail) for c in checks),
        engine=engine,
    )
    record(spec.checkpoint, found, progress)
    return found


def _check_models(
    spec: VerifySpec, python: Path | None, checks: list[Check], progress: Progress
) -> EngineFacts | None:
    """Adds the checks of values and of both loads; returns what the engine said, if it was asked."""
    from compressor.verify.meaning import check_meaning
    from compressor.verify.models import Reference, check_quality, check_source_values, load_reference

    named = find_source(spec.checkpoint, spec.source, spec.revision, spec.cache, progress, spec.from_)
    source, scaling = scaled_source(spec.checkpoint, named)
    checks += scaling
    if source is not None:
        checks.append(check_meaning(spec.checkpoint, source, near=spec.cache.parent))
        folded, fold = folded_source(spec.checkpoint, source)
        checks += [*fold, *check_source_values(spec.checkpoint, folded, progress)]
    unread = [check for check in checks if check.name == "config" and check.status == "skipped"]
    factory = factory_of(spec.checkpoint)
    if unread:
        reference = Reference(Check("transformers", "skipped", unread[0].detail))
    elif factory:
        text = f"its model is made by {factory}, code of a package that is not run here"
        reference = Reference(Check("transformers", "skipped", text))
    else:
        reference = load_reference(spec, source, progress)
    checks.append(reference.check)
    if reference.check.status == "passed":
        checks += check_quality(spec.checkpoint, reference)
    if any(check.status == "failed" for check in checks):
        return None
    if factory:
        checks.append(Check("engine", "skipped", "vLLM does not know the model"))
        return None
    if python is None:
        reason = "not asked for" if spec.engine == "none" else "no environment with vLLM was found"
        checks.append(Check("engine", "skipped", f"{reason}; see `bash scripts/serve_env.sh`"))
        return None
    # A GGUF source is written out here for the engine: not into a temporary file system in memory.
    spec.cache.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="verify.tmp-", dir=spec.cache.parent) as scratch:
        facts = question_engine(
            Questions(
                python=python,
                checkpoint=spec.checkpoint,
                source=_source_of_floor(source, Path(scratch), progress),
                reference=reference,
                dtype=spec.dtype,
                server=spec.server,
                timeout_s=spec.timeout_s,
                env=spec.engine_env,
                scratch=Path(scratch),
            ),
            progress,
        ).facts
        if facts.verdict in ("failed", "disagrees"):
            progress.warn(f"what the engine wrote is kept in {_kept_logs(Path(scratch), spec.cache.parent)}")
        return facts


def _source_of_floor(source: Source | None, scratch: Path, progress: Progress) -> Source | None:
    """What the engine's noise floor is measured on; None without a source, or without room for it."""
    reason = "" if source is None else missing_room(source, scratch)
    if reason:
        progress.warn(f"no noise floor is measured: {reason}")
    return None if reason else source


def _kept_logs(scratch: Path, folder: Path) -> Path:
    """All logs of the engine's processes, oldest first, in one file of ``folder``."""
    logs = sorted(scratch.rglob("*.log"), key=lambda log: log.stat().st_mtime)
    kept = folder / f"engine-{utc_now().replace(':', '')}.log"
    kept.write_bytes(b"\n".join(log.read_bytes() for log in logs))
    return kept
