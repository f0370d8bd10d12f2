"""A processor of images for the tiny Gemma 3, and a file of conversations with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.model.wrappers import IMAGE_ID

# What the byte tokenizer calls the bytes 0xFA to 0xFC, which no UTF-8 text has.
IMAGE, BEGIN, END = "\u00fa", "\u00fb", "\u00fc"
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    + BEGIN
    + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def write_processor(folder: Path) -> None:
    """Adds a processor to the folder of the tiny Gemma 3, which has the byte tokenizer."""
    from transformers import AutoTokenizer, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=marks)
    assert tokenizer.convert_tokens_to_ids(IMAGE) == IMAGE_ID
    made = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
        image_seq_length=4,
    )
    made.save_pretrained(folder)


def write_conversations(folder: Path, count: int = 4) -> Path:
    """``count`` conversations, each with an image of its own beside the file."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        image = Image.new("RGB", (56, 56), (40 * number, 90, 200 - 30 * number))
        image.putpixel((number, 2 * number), (255, 255, 255))
        image.save(folder / f"{number}.png")
        content: list[dict[str, Any]] = [
            {"type": "image", "path": f"{number}.png"},
            {"type": "text", "text": f"What is in picture {number}?"},
        ]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A point."}]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
