"""Hub sources against a fake Hub on this machine; the library runs in a clean subprocess."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.folder import FolderSource
from tests.checkpoint.fake_hub import COMMIT, REPO, FakeHub, serve
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with files that must never be fetched."""
    # wide enough that shards are larger than the first range request
    folder = tiny_llama(tmp_path_factory.mktemp("hub") / "model", shards=2, hidden=128)
    for name in ("pytorch_model.bin", "modeling_tiny.py", "README.md"):
        (folder / name).write_bytes(b"x" * 1000)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path) -> Iterator[FakeHub]:
    """The fake Hub with a copy of the model."""
    with serve(Path(shutil.copytree(model, tmp_path / "hub"))) as running:
        yield running


def call(url: str, cache: Path, code: str) -> str:
    """What ``code`` prints in a fresh process whose Hub is ``url``; faults are printed too."""
    program = (
        "import json, sys\nfrom pathlib import Path\n"
        "from compressor.checkpoint.sources import open_source\nfrom compressor.errors import UserError\n"
        f"cache, repo, commit = Path({str(cache)!r}), {REPO!r}, {COMMIT!r}\n"
        f"try:\n    {code}\nexcept UserError as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cache.parent / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_fetches_headers_only(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    """Headers by ranges, small JSON files, no torch, nothing on the disk."""
    code = (
        "s = open_source(repo, planning=True); "
        "print(json.dumps([s.label, s.kind, s.revision, s.config, [str(h) for h in s.headers.values()], "
        "s.fingerprint, [m for m in ('torch', 'transformers') if m in sys.modules]]))"
    )
    label, kind, revision, config, headers, fingerprint, loaded = json.loads(
        call(hub.url, tmp_path / "c", code)
    )
    local = FolderSource(model)
    assert (label, kind, revision) == (f"{REPO}@{COMMIT}", "safetensors", COMMIT)
    assert config == local.config
    assert headers == [str(header) for header in local.headers.values()]
    assert len(fingerprint) == 64
    assert loaded == []
    shards = [name for name in hub.served if name.endswith(".safetensors")]
    assert len(shards) == 2
    for name in shards:
        assert hub.served[name] <= 100_000 < (model / name).stat().st_size
    assert hub.served.keys() - set(shards) == {"config.json", "model.safetensors.index.json"}
    assert not (tmp_path / "c").exists()


def test_reads_one_shard_at_a_time(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    """Reading downloads the tensor's shard alone, once, into the cache; the bits are the Hub's."""
    code = (
        "s = open_source(repo, revision='main', cache=cache); names = list(s.headers); "
        "print(s.read(names[0]).double().sum().item(), s.read(names[0], 3).double().sum().item())"
    )
    whole, row = call(hub.url, tmp_path / "cache", code).split()
    local = FolderSource(model)
    tensor = local.read(next(iter(local.headers)))
    assert (float(whole), float(row)) == (tensor.double().sum().item(), tensor[3].double().sum().item())
    first, second = sorted(model.glob("*.safetensors"))
    assert hub.served[first.name] >= first.stat().st_size
    assert hub.served[second.name] <= 100_000
    before = dict(hub.served)
    call(hub.url, tmp_path / "cache", code)
    assert hub.served[first.name] - before[first.name] <= 100_000
    assert not (tmp_path / "home" / "hub").exists()


def test_side_files_and_folder(hub: FakeHub, tmp_path: Path) -> None:
    """Side files and a folder for transformers; never pickles, code or the README."""
    code = (
        "out = cache.parent / 'out'; out.mkdir(); s = open_source(repo, cache=cache); "
        "print(json.dumps([s.write_side_files(out), sorted(p.name for p in s.model_dir().iterdir())]))"
    )
    side, folder = json.loads(call(hub.url, tmp_path / "cache", code))
    assert side == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert side == [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert folder == sorted([*side, *shards, "config.json", "model.safetensors.index.json"])
    assert hub.served.keys() == set(folder)


def test_side_files_in_folders(hub: FakeHub, tmp_path: Path) -> None:
    """Further chat templates come along in their folder; other folders of such names do not."""
    for name in ("additional_chat_templates/tool_use.jinja", "LICENSES/MIT.txt", "original/tokenizer.model"):
        (hub.folder / name).parent.mkdir()
        (hub.folder / name).write_text(name)
    code = (
        "out = cache.parent / 'out'; out.mkdir(); s = open_source(repo, cache=cache); "
        "print(json.dumps(s.write_side_files(out)))"
    )
    side = json.loads(call(hub.url, tmp_path / "cache", code))
    out = tmp_path / "out"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == side
    assert [name for name in side if "/" in name] == ["additional_chat_templates/tool_use.jinja"]


def test_server_without_ranges(hub: FakeHub, tmp_path: Path) -> None:
    """A server that sends whole files is read no further than the headers reach."""
    hub.ranges = False
    out = call(hub.url, tmp_path / "cache", "print(len(open_source(repo, planning=True).headers))")
    assert int(out) == 21


OPEN = "print(open_source(repo, planning=True).label)"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("gated", "HubUnavailable org/tiny: the repository is gated\n  -> accept the terms on"),
        ("absent", "CheckpointError org/tiny: no such model on the Hub"),
        ("refused", "HubUnavailable org/tiny: the Hub refuses access (HTTP 403)"),
        ("broken", "HubUnavailable org/tiny: the Hub answers HTTP 500"),
    ],
)
def test_faults(hub: FakeHub, tmp_path: Path, fault: str, message: str) -> None:
    """Each answer of the Hub gets one message with the mend."""
    hub.fault = fault
    assert call(hub.url, tmp_path / "cache", OPEN).startswith(message)


def test_no_hub(tmp_path: Path) -> None:
    """No connection: say what works without one."""
    out = call("http://127.0.0.1:9", tmp_path / "cache", OPEN)
    assert "org/tiny: the Hub cannot be reached" in out
    assert "use a local folder, or `model.headers` to plan" in out


def test_falls_back_on_shipped_headers(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    """A plan goes on with shipped headers where the Hub gives none, and says so; a run does not."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    shutil.copy(model / "config.json", shipped)
    rows = [["lm_head.weight", "BF16", [256, 128]]]
    (shipped / "tensors.json").write_text(json.dumps({"source": "org/tiny", "tensors": rows}))
    hub.fault = "gated"
    code = f"s = open_source(repo, planning=True, headers=Path({str(shipped)!r})); print(s.kind, '|', s.note)"
    assert (
        call(hub.url, tmp_path / "cache", code)
        == "headers | planned from shipped headers (the repository is gated)\n"
    )
    code = code.replace("planning=True", "cache=cache")
    assert call(hub.url, tmp_path / "cache", code).startswith("HubUnavailable")
    hub.fault = "absent"
    assert "no such model" in call(hub.url, tmp_path / "cache", code.replace("cache=cache", "planning=True"))


def test_wrong_revision(hub: FakeHub, tmp_path: Path) -> None:
    """An unknown revision is refused; so is a Hub that answers with another commit."""
    out = call(hub.url, tmp_path / "cache", "open_source(repo, revision='v9', planning=True)")
    assert "no revision v9" in out
    out = call(hub.url, tmp_path / "cache", f"open_source(repo, revision={'a' * 40!r}, planning=True)")
    assert f"no revision {'a' * 40}" in out
    hub.lie = True
    out = call(hub.url, tmp_path / "cache", f"open_source(repo, revision={'a' * 40!r}, planning=True)")
    assert f"wrong revision: asked for {'a' * 40}, the Hub answers {COMMIT}" in out


def test_wrong_sha256(hub: FakeHub, tmp_path: Path) -> None:
    """A download that is not what the Hub announced is removed and refused, with both values."""
    hub.lie = True
    code = "s = open_source(repo, cache=cache); s.read('lm_head.weight')"
    out = call(hub.url, tmp_path / "cache", code)
    assert "wrong sha256" in out
    assert "f" * 64 in out
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.exists()]


def test_a_download_that_a_kill_left_unchecked(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    """It is checked when it is found; one that was checked is not read again. Its bytes count as held."""
    code = "s = open_source(repo, cache=cache); s.read('lm_head.weight'); print(s.held_bytes)"
    cache = tmp_path / "cache"
    first = call(hub.url, cache, code)
    (shard,) = [path for path in cache.rglob("*.safetensors") if path.exists()]
    assert int(first) == shard.stat().st_size
    blob = shard.resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert call(hub.url, cache, code) == first
    (checked,) = (cache / "checked").iterdir()
    checked.unlink()
    assert "wrong sha256" in call(hub.url, cache, code)
    assert not blob.exists()


def test_unsound_repositories(hub: FakeHub, tmp_path: Path) -> None:
    """Missing shards, pickles only and quantized weights are refused as in a folder."""
    shard = hub.folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    assert "model-00002-of-00002.safetensors: it is missing" in call(hub.url, tmp_path / "cache", OPEN)
    shard.write_bytes(content[:-1])
    assert "truncated shard" in call(hub.url, tmp_path / "cache", OPEN)
    for path in [*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"]:
        path.unlink()
    assert "pickle files can run code" in call(hub.url, tmp_path / "cache", OPEN)


def test_quantized_weights(hub: FakeHub, tmp_path: Path) -> None:
    """Decoded where that is asked for: described by ModelOpt's own file, read by shards."""
    quantized = {"quantization": {"quant_algo": "FP8"}}
    (hub.folder / "hf_quant_config.json").write_text(json.dumps(quantized))
    for path in hub.folder.glob("model*.safetensors*"):
        path.unlink()
    codes = torch.full((4, 6), 2.0).to(torch.float8_e4m3fn)
    scales = {f"a.{name}": torch.tensor(0.5) for name in ("weight_scale", "input_scale")}
    save_file({"a.weight": codes, **scales}, hub.folder / "model.safetensors")
    code = (
        "s = open_source(repo, cache=cache, from_='dequantize'); "
        "print([(h.dtype, h.shape) for h in s.headers.values()], s.read('a.weight').tolist()[0])"
    )
    assert call(hub.url, tmp_path / "c", code).strip() == f"[('BF16', (4, 6))] {[1.0] * 6}"
    assert "model.from: dequantize" in call(hub.url, tmp_path / "c", "open_source(repo, planning=True)")
