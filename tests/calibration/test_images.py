"""Files of conversations with images: what is read of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.calibration.images import conversations, image_prompts, images_sha256
from compressor.calibration.spec import ImagesSpec
from compressor.errors import UserError
from compressor.progress import Silent


def _file(folder: Path, *parts: dict[str, Any]) -> Path:
    from PIL import Image

    (folder / "shown").mkdir(exist_ok=True)
    Image.new("RGB", (2, 2)).save(folder / "outside.png")
    Image.new("RGB", (2, 2)).save(folder / "shown" / "inside.png")
    path = folder / "shown" / "pictures.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": list(parts)}]}) + "\n")
    return path


def test_no_image_of_another_folder(tmp_path: Path) -> None:
    """Neither by its path nor by a link; a link to an image beside the file is one of that folder."""
    path = _file(tmp_path, {"type": "image", "path": "link.png"})
    link = path.parent / "link.png"
    link.symlink_to(path.parent / "inside.png")
    assert images_sha256(path)[1] == 1
    link.unlink()
    link.symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match="outside of the file's folder"):
        images_sha256(path)


@pytest.mark.parametrize("name", ["a" * 300, "a\0.png", "\ud800.png", "loop.png"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    """The fault of a missing image, not the system's."""
    path = _file(tmp_path, {"type": "image", "path": name})
    (path.parent / "loop.png").symlink_to(path.parent / "loop.png")
    with pytest.raises(UserError, match="there is no image"):
        list(conversations(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Named with their line; a byte-order mark is none of them."""
    path = _file(tmp_path, {"type": "image", "path": "inside.png"})
    good = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert images_sha256(path)[1] == 1
    path.write_bytes(good + b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match="not JSON") as raised:
        images_sha256(path)
    assert raised.value.where == f"{path}:2"


def test_a_text_opens_nothing(tmp_path: Path) -> None:
    """Keys that its type does not ask for, a path among them, are neither followed nor handed on."""
    part = {"type": "text", "text": "hello", "path": "../outside.png", "url": "file:///etc/passwd"}
    path = _file(tmp_path, part)
    seen = []

    class Processor:
        def apply_chat_template(self, messages: Any, **_: object) -> Any:
            seen.append(messages)
            raise ValueError("enough")

    with pytest.raises(UserError, match="enough"):
        image_prompts(ImagesSpec("shown", path, *images_sha256(path)), Processor(), 8, 0, Silent())
    assert seen == [[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]]
