"""Files beside the weights: which go along, and which are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.layout import card_license, is_side_file
from compressor.errors import CheckpointError
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "single")


def test_side_files(original: Path, tmp_path: Path) -> None:
    """Tokenizer, template, generation config and licence go along; weights, config and code do not."""
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    for name in ("LICENSE.txt", "modeling_evil.py", "README.md", "optimizer.pt"):
        (folder / name).write_text(name)
    out = tmp_path / "out"
    out.mkdir()
    names = FolderSource(folder).write_side_files(out)
    assert names == sorted(file.name for file in out.iterdir())
    assert names == [
        "LICENSE.txt",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


CARRIED = (
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "cl100k.tiktoken",
    "additional_chat_templates/tool_use.jinja",
)


def test_side_files_of_other_tokenizers(original: Path, tmp_path: Path) -> None:
    """They go along, templates in their folder; folders, temporary files and what is no template stay."""
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / "additional_chat_templates" / "nested.jinja").mkdir(parents=True)
    for name in (*CARRIED, "LICENSE.tmp-1", "additional_chat_templates/notes.txt", "NOTICE\n"):
        (folder / name).write_text(name)
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES" / "MIT.txt").write_text("MIT")
    out = tmp_path / "out"
    out.mkdir()
    names = FolderSource(folder).write_side_files(out)
    assert set(CARRIED) < set(names)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == set(names)
    assert not {name for name in names if "tmp" in name or "LICENSE" in name or "notes" in name}
    assert (out / CARRIED[-1]).read_text() == CARRIED[-1]


@pytest.mark.parametrize(
    "name, carried",
    [
        ("original/tokenizer.model", False),
        ("LICENSE/../../evil", False),
        ("original/x.tiktoken", False),
        ("additional_chat_templates/a/b.jinja", False),
        ("../additional_chat_templates/b.jinja", False),
        ("additional_chat_templates/rag.jinja", True),
        ("additional_chat_templates/rag.tmp-7.jinja", False),
        ("tokenizer.model.v11", True),
        ("tokenizer.model.values", False),
        ("LICENSE-2.0", True),
        ("LICENSE\udcff", False),
        ("License.txt", True),
        ("notice.md", True),
        ("COPYING", True),
        ("license.tmp-1", False),
        ("processor_config.json", True),
        ("preprocessor_config.json", True),
        ("video_preprocessor_config.json", True),
        ("chat_template.json", True),
        ("processing_evil.py", False),
    ],
)
def test_names_of_side_files(name: str, carried: bool) -> None:
    """Of subfolders only the templates', and no name that leads elsewhere or is temporary."""
    assert is_side_file(name) == carried


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "additional_chat_templates/t.jinja", "NOTICE-dangling"]
)
def test_side_file_that_is_a_link_out_is_refused_at_once(original: Path, tmp_path: Path, name: str) -> None:
    """When the folder is opened, not when the result is put together."""
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    target = tmp_path / "secret"
    if "dangling" not in name:
        target.write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of the folder"):
        FolderSource(folder)


def test_license_of_a_card() -> None:
    """Found in front matter with either line ending; a card without one is told in no time."""
    assert card_license(b"---\ntags:\n- a\nlicense: apache-2.0\n---\n") == "apache-2.0"
    assert card_license(b"---\r\ntags: a\r\nlicense: mit\r\n---\r\n") == "mit"
    assert card_license(b"# Model\nlicense: mit\n") is None
    # Ambiguous line endings would take 2 to the power of the lines.
    assert card_license(b"---\r\n" + b"tag: a\r\n" * 2000) is None
