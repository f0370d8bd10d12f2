"""``compress doctor``: what is told, what counts as broken, and that the token never is."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from compressor import device
from compressor.cli.main import cli
from compressor.device import Accelerator, multiplied_natively
from compressor.schemes import BUILTIN_SCHEMES, parse_scheme
from compressor.verify import doctor
from compressor.verify.doctor import FORMATS, Check, Health, examine
from compressor.verify.engine import PYTHON_VARIABLE
from compressor.verify.tried import TRIED, nearest
from tests.checkpoint.fake_hub import serve
from tests.cli.test_main import compress

RESULTS = Path(__file__).parents[2] / "bench" / "results"
TOKEN = "hf_" + "x" * 30


def check(health: Health, name: str) -> Check:
    """The first check of a name."""
    return next(one for one in health.checks if one.name == name)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders that are not there yet, in a place of its own without an engine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    return {"output": tmp_path / "out", "workspace": tmp_path / "out" / "space"}


def test_this_machine(places: dict[str, Path]) -> None:
    """Nothing is broken where these tests run; every package has its version."""
    health = examine(places, offline=True)
    assert not health.broken, health.checks
    assert health.versions["torch"] == metadata.version("torch")
    assert None not in health.versions.values()
    assert health.hub["reachable"] is None
    assert [disk["name"] for disk in health.disks] == ["output", "workspace"]
    assert not places["output"].exists()
    assert {row["scheme"] for row in health.formats} == set(FORMATS)
    json.dumps(health.to_json())


def test_missing_and_old_packages(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Are broken, each named, with what is needed."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise metadata.PackageNotFoundError(name)
        return "5.1.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    health = examine(places, offline=True)
    found = check(health, "packages")
    assert found.state == "broken"
    assert "accelerate is missing" in found.what
    assert "transformers is 5.1.0, <5.18,>=5.17 is needed" in found.what
    assert found.fix


def test_torch_that_cannot_be_used(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises is told as one line."""

    def broken() -> None:
        raise OSError("libcudart.so.13: cannot open\nshared object file")

    monkeypatch.setattr(device, "accelerators", broken)
    found = check(examine(places, offline=True), "torch")
    assert (found.state, "cannot open shared object file" in found.what) == ("broken", True)


def test_accelerators(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What they multiply decides the formats' column."""
    blackwell = Accelerator("NVIDIA B200", 180 * 10**9, 170 * 10**9, (10, 0))
    monkeypatch.setattr(device, "accelerators", lambda: (blackwell,))
    health = examine(places, offline=True)
    assert health.devices[0]["native"] == ("bf16", "int8", "fp8", "fp4")
    assert {row["scheme"] for row in health.formats if row["native"]} == set(FORMATS)
    hopper = Accelerator("NVIDIA H100", 80 * 10**9, 70 * 10**9, (9, 0))
    monkeypatch.setattr(device, "accelerators", lambda: (hopper,))
    health = examine(places, offline=True)
    assert "nvfp4" in {row["scheme"] for row in health.formats if not row["native"]}
    assert all(row["tried"] is None or row["tried"]["device"] == "NVIDIA H200" for row in health.formats)


@pytest.mark.parametrize(
    ("capability", "formats"),
    [
        ((7, 0), set()),
        ((7, 5), {"int8"}),
        ((8, 0), {"int8", "bf16"}),
        ((8, 6), {"int8", "bf16"}),
        ((8, 9), {"int8", "bf16", "fp8"}),
        ((9, 0), {"int8", "bf16", "fp8"}),
        ((10, 0), {"int8", "bf16", "fp8", "fp4"}),
        ((12, 0), {"int8", "bf16", "fp8", "fp4"}),
    ],
)
def test_what_is_multiplied(capability: tuple[int, int], formats: set[str]) -> None:
    """Volta, Turing, Ampere, Ada, Hopper, Blackwell."""
    assert set(multiplied_natively(capability)) == formats


def test_a_full_disk_and_one_that_cannot_be_written(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Little space is a warning; a place that is no folder is broken."""
    (tmp_path / "file").write_text("")
    usage = SimpleNamespace(total=10**12, free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    health = examine({"output": places["output"], "workspace": tmp_path / "file" / "below"}, offline=True)
    states = {one.what.partition(":")[0]: one.state for one in health.checks if one.name == "disk"}
    assert states == {"output": "warning", "workspace": "broken"}


def test_the_hub(places: dict[str, Path], tmp_path: Path) -> None:
    """That nobody answers is a warning; that somebody does is told with the token's being there, not it."""
    env = {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), PYTHON_VARIABLE: ""}
    with serve(tmp_path) as hub:
        done = compress("doctor", "--json", cwd=tmp_path, env=env | {"HF_ENDPOINT": hub.url})
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["hub"] == {"endpoint": hub.url, "reachable": True, "token": True}
    assert TOKEN not in done.stdout + done.stderr
    # The server is gone.
    done = compress("doctor", cwd=tmp_path, env=env | {"HF_ENDPOINT": hub.url})
    assert done.returncode == 0
    assert "does not answer" in " ".join(done.stdout.split())
    assert TOKEN not in done.stdout + done.stderr


def test_no_address_is_opened_that_is_none() -> None:
    """An endpoint that names a file is not read."""
    assert doctor._unreachable("file:///etc/hostname") == "no http address"


def test_engines(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is named and is none is broken; none is a warning; one of another version is, too."""
    assert check(examine(places, offline=True), "engine").state == "warning"
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    found = check(examine(places, offline=True), "engine")
    assert (found.state, "no such interpreter" in found.what) == ("broken", True)
    monkeypatch.delenv(PYTHON_VARIABLE)
    monkeypatch.setattr(doctor, "find_engine_python", lambda given: Path(sys.executable))
    monkeypatch.setattr(doctor, "_versions_in", lambda python: {"vllm": "9.9.9"})
    found = check(examine(places, offline=True), "engine")
    assert (found.state, "vLLM 9.9.9 was not tried" in found.what) == ("warning", True)
    monkeypatch.setattr(doctor, "_versions_in", lambda python: {"vllm": "0.32.0"})
    assert check(examine(places, offline=True), "engine").state == "ok"


def test_versions_of_another_interpreter() -> None:
    """This one's, asked as the engine's is."""
    found = doctor._versions_in(Path(sys.executable))
    assert found["torch"] == metadata.version("torch")
    assert found["compressed_tensors"] == metadata.version("compressed-tensors")
    assert doctor._versions_in(Path("/no/such/python")) == {}


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    told = CliRunner().invoke(cli, ["doctor", "--offline"])
    assert told.exit_code == 0, told.output
    assert max(map(len, told.output.splitlines())) <= columns


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 where something is broken, 0 where something is missed."""
    for state, status in (("broken", 1), ("warning", 0)):
        health = Health(checks=[Check("disk", state, "x", "y")])  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "examine", lambda *args, found=health, **named: found)
        assert CliRunner().invoke(cli, ["doctor"]).exit_code == status


def test_what_was_tried_is_what_was_measured() -> None:
    """The table in the package is that of the results, which the wheel does not have."""
    measured: dict[tuple[str, str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in RESULTS.glob("serving-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            if engine := row["engine"]:
                verdict = engine["verdict"] + (", emulated" if engine["plugins"] else "")
                key = engine["version"], engine["device"], row["format"]
                measured[key][verdict].add(row["family"])
    told = {
        (one.version, one.device, one.format): {name: set(some) for name, some in one.families.items()}
        for one in TRIED
    }
    assert told == measured


def test_every_scheme_has_a_row() -> None:
    """But for what nobody tried; labels are those of the schemes."""
    spelt = {str(scheme.model_fields["kind"].default) for scheme in BUILTIN_SCHEMES}
    assert spelt - FORMATS.keys() == {"fp8_static"}
    for name, label in FORMATS.items():
        # Sizes of groups differ; the table calls weight-only MXFP4 by its short name.
        assert label.partition(" ")[0] == parse_scheme(name).label.partition(" ")[0].replace(
            "MXFP4A16", "MXFP4"
        )
    assert nearest("NVFP4A16", "0.32.0", on_gpu=True) == nearest("NVFP4A16", "0.26.0", on_gpu=True)
