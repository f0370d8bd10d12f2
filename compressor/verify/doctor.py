"""What this machine has for compressing and serving, and what of it is missing or broken, with the mend."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from compressor.device import available_memory_bytes, has_fast_bfloat16, multiplied_natively
from compressor.errors import UserError
from compressor.schemes import parse_scheme
from compressor.verify.engine import PYTHON_VARIABLE, find_engine_python
from compressor.verify.process import engine_environment
from compressor.verify.tried import TRIED, nearest

State = Literal["ok", "warning", "broken"]
PACKAGE = "compressor"
LEAST_FREE_BYTES = 10_000_000_000
# Recipe spelling of each scheme -> its row in the table of what was tried.
FORMATS = {
    "nvfp4": "NVFP4",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "fp8_dynamic": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "int4": "W4A16 g64",
    "int8": "W8A16",
}
# Imported names: builds of vLLM for other devices are packages of other names.
_ENGINE_MODULES = ("vllm", "torch", "transformers", "compressed_tensors")
_ENGINE_TIMEOUT_S = 60.0
_HUB_TIMEOUT_S = 4.0
_PROBE = (
    "import json, sys; from importlib import metadata as m\n"
    "named = m.packages_distributions()\n"
    "found = {n: m.version(named[n][0]) for n in sys.argv[1:] if n in named}\n"
    "print(json.dumps(found | {'python': sys.version.split()[0]}))\n"
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of what (``torch``, ``disk``, ``hub``, ``engine``).
        state: ``broken`` is what no run can do without; ``warning`` what some commands miss.
        what: one sentence.
        fix: what to do about it; "" where nothing is wrong.
    """

    name: str
    state: State
    what: str
    fix: str = ""


@dataclass
class Health:
    """What was found.

    Attributes:
        versions: Python and every package that this one needs -> version; None where it is missing.
        devices: accelerators, then the CPU: name, memory, what it multiplies natively.
        disks: folders of output and workspace: free and total bytes, whether they can be written.
        hub: endpoint, whether it answers (None: not asked), whether a token is there. Never the token.
        engine: the interpreter that ``compress verify`` would run, and versions in it; empty without one.
        formats: what this project writes: native here, and what was tried of it in the engine.
        checks: everything that is told.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    disks: list[dict[str, Any]] = field(default_factory=list)
    hub: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    formats: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether something is that no run can do without."""
        return any(check.state == "broken" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def examine(
    places: Mapping[str, Path], engine_python: Path | None = None, *, offline: bool = False
) -> Health:
    """Looks at everything; takes some seconds, for torch and the engine's Python are started.

    Args:
        places: ``output`` and ``workspace`` -> folder, which need not exist.
        engine_python: as of ``compress verify``.
        offline: whether the Hub is left alone.
    """
    health = Health()
    _packages(health)
    _devices(health)
    for name, place in places.items():
        _disk(health, name, place)
    _hub(health, offline=offline)
    _engine(health, engine_python)
    _formats(health)
    return health


def _packages(health: Health) -> None:
    """Versions against what this package asks for."""
    from packaging.requirements import Requirement

    health.versions = {"python": platform.python_version(), PACKAGE: metadata.version(PACKAGE)}
    wrong = []
    for text in metadata.requires(PACKAGE) or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            found = None
        health.versions[needed.name] = found
        if found is None:
            wrong.append(f"{needed.name} is missing")
        elif not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} is {found}, {needed.specifier} is needed")
    told = "; ".join(wrong) or f"{len(health.versions) - 2} packages as needed"
    fix = "pip install -c constraints.txt compressor, in an environment of its own" if wrong else ""
    health.checks.append(Check("packages", "broken" if wrong else "ok", told, fix))


def _devices(health: Health) -> None:
    from compressor.device import accelerators, device_name

    try:
        found = accelerators()
        cpu = platform.processor() or platform.machine() if found else device_name()
    except Exception as error:  # whatever a broken build raises, the user needs it told
        what = f"torch does not work: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        health.checks.append(Check("torch", "broken", what, "install torch again for this machine"))
        return
    for one in found:
        native = multiplied_natively(one.capability)
        health.devices.append({"kind": "cuda", **asdict(one), "native": native})
    memory = available_memory_bytes()
    native = ("bf16",) if has_fast_bfloat16() else ()
    cores = os.cpu_count() or 1
    health.devices.append(
        {"kind": "cpu", "name": cpu, "free_bytes": memory, "cores": cores, "native": native}
    )
    if not found and Path("/dev/nvidiactl").exists():
        what = "the machine has an NVIDIA driver, and torch cannot use it"
        fix = "install a build of torch for CUDA that the driver is new enough for (nvidia-smi names both)"
        health.checks.append(Check("devices", "warning", what, fix))
    else:
        told = ", ".join(one.name for one in found) or "no accelerator: everything runs on the CPU"
        health.checks.append(Check("devices", "ok", told))


def _disk(health: Health, name: str, place: Path) -> None:
    """Of the folder, or of the nearest one above it that is there."""
    present = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    usage, writable = shutil.disk_usage(present), present.is_dir() and os.access(present, os.W_OK | os.X_OK)
    row = {"name": name, "path": str(place), "free_bytes": usage.free, "total_bytes": usage.total}
    health.disks.append({**row, "writable": writable})
    if not writable:
        what, fix = f"{name}: {present} cannot be written", f"name another folder with --{name}"
        health.checks.append(Check("disk", "broken", what, fix))
    elif usage.free < LEAST_FREE_BYTES:
        what = f"{name}: {usage.free / 1e9:.1f} GB free at {present}"
        fix = "`compress clean` shows what a workspace holds; a plan says what a run needs"
        health.checks.append(Check("disk", "warning", what, fix))
    else:
        health.checks.append(Check("disk", "ok", f"{name}: {usage.free / 1e9:,.0f} GB free at {present}"))


def _hub(health: Health, *, offline: bool) -> None:
    from huggingface_hub import constants, get_token

    has_token = bool(get_token())
    health.hub = {"endpoint": constants.ENDPOINT, "reachable": None, "token": has_token}
    if offline or constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "--offline"
        health.checks.append(Check("hub", "ok", f"not asked ({why})"))
        return
    problem = _unreachable(constants.ENDPOINT)
    health.hub["reachable"] = problem is None
    if problem is not None:
        fix = "local folders, GGUF files and shipped headers work without; a mirror is named by HF_ENDPOINT"
        health.checks.append(Check("hub", "warning", f"{constants.ENDPOINT} does not answer: {problem}", fix))
        return
    fix = "" if has_token else "gated models need one: `hf auth login`, or HF_TOKEN"
    told = f"{constants.ENDPOINT} answers; {'a token is there' if has_token else 'no token'}"
    health.checks.append(Check("hub", "ok", told, fix))


def _unreachable(endpoint: str) -> str | None:
    """Why nobody answers there; any answer is one. No token is sent."""
    if not endpoint.startswith(("http://", "https://")):
        return "no http address"
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return " ".join(str(reason).split())[:120] or type(error).__name__
    return None


def _engine(health: Health, given: Path | None) -> None:
    """vLLM's interpreter and what is in it; nothing of vLLM is imported."""
    fix = f"`bash scripts/serve_env.sh` makes .venv-serve; or name one in {PYTHON_VARIABLE}"
    try:
        python = find_engine_python(given)
    except UserError as error:
        health.checks.append(Check("engine", "broken", f"{error.where}: {error.what}", error.fix))
        return
    if python is None:
        what = "no vLLM: `compress verify` checks files only"
        health.checks.append(Check("engine", "warning", what, fix))
        return
    versions = _versions_in(python)
    health.engine = {"python": str(python), "versions": versions}
    version = versions.get("vllm")
    if version is None:
        what = f"{python} does not tell its versions"
        health.checks.append(Check("engine", "warning", what, fix))
    elif version not in {one.version for one in TRIED}:
        known = ", ".join(sorted({one.version for one in TRIED}))
        what = f"vLLM {version} was not tried with this project's formats; {known} were"
        health.checks.append(Check("engine", "warning", what, "`compress verify CHECKPOINT` tries it"))
    else:
        health.checks.append(Check("engine", "ok", f"vLLM {version} at {python}"))


def _versions_in(python: Path) -> dict[str, str]:
    """Of the engine's packages in its own environment; empty where it cannot be asked."""
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE, *_ENGINE_MODULES],
            env=engine_environment(python, {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ENGINE_TIMEOUT_S,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {str(name): str(value) for name, value in found.items()}


def _formats(health: Health) -> None:
    """Each scheme on this machine: whether a device multiplies it, what was tried of it in such an engine."""
    on_gpu = any(device["kind"] == "cuda" for device in health.devices)
    native: Sequence[str] = next((device["native"] for device in health.devices), ())
    version = (health.engine.get("versions") or {}).get("vllm") or ""
    for spelt, label in FORMATS.items():
        arithmetic = parse_scheme(spelt).arithmetic
        tried = nearest(label, version, on_gpu=on_gpu)
        health.formats.append(
            {
                "scheme": spelt,
                "format": label,
                "arithmetic": arithmetic,
                "native": arithmetic in native,
                "tried": None if tried is None else {**asdict(tried), "told": tried.told()},
            }
        )
