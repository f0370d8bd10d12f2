"""Calibration with images: the source's processor makes rows of conversations, and blocks hear them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError
from compressor.model.load import set_dtype
from compressor.numerics.input_ranges import RangeSums, best_e4m3_scale
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.stages.tokens import Shown, calibration_tokens
from tests.calibration.pictures import write_conversations, write_processor
from tests.model.wrappers import IMAGE_ID, WRAPPERS
from tests.tiny import tiny_llama

from .cases import write_recipe

TEXT = "Five wizards quickly jump over my boxed vintage. " * 40


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper with its processor."""
    folder = WRAPPERS["gemma3_with_tower"](tmp_path_factory.mktemp("gemma") / "model")
    write_processor(folder)
    return folder


def _recipe(folder: Path, source: Path, weights: str, images: str, length: int = 64) -> Path:
    (folder / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(folder / "shown.txt"))
    rest = f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 2, sequence_length: {length}"
    return write_recipe(
        folder / "recipe.yaml", source, weights, f"{rest}, images: {images}}}\nevaluate: null"
    )


def _scale(source: Path, shown: Shown, dtype: torch.dtype) -> float:
    """What fits the inputs of the first block's last product, over every row, in an ordinary pass."""
    model = set_dtype(AutoModelForImageTextToText.from_pretrained(source), dtype).eval()
    heard, found = RangeSums(48, "cpu"), []
    layer = model.model.language_model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    rows: list[dict[str, Any]] = [{"input_ids": row[None]} for row in shown.ids_NT]
    with torch.no_grad():
        for row in (*rows, *shown.prompts):
            model(**{k: t.to(dtype) if t.is_floating_point() else t for k, t in row.items()}, use_cache=False)
    assert len(found) == len(rows) + len(shown.prompts)
    for x_NI in found:
        heard.add(x_NI)
    return best_e4m3_scale(heard.result())


def test_blocks_hear_images(gemma: Path, tmp_path: Path) -> None:
    """A static range of inputs is that of an ordinary forward pass over texts and images; all is reported."""
    pictures = write_conversations(tmp_path / "pictures")
    images = f"{{path: {json.dumps(str(pictures))}, num_samples: 3}}"
    recipe = _recipe(tmp_path, gemma, "{scheme: fp8_static}", images)
    done = compressor.run(recipe, output=tmp_path / "out", progress=Silent())
    made = done.report.calibration
    assert made is not None
    assert made.samples == 5
    assert {text.name: text.tokens for text in made.texts}[str(pictures)] == 3 * 56

    plan = make_plan(load_recipe(str(recipe)), output=tmp_path / "other")
    assert plan.calibration is not None
    assert plan.walk is not None
    assert plan.calibration.tokens == 5 * 64
    shown = calibration_tokens(FolderSource(gemma), plan.calibration, tmp_path / "stage", Silent())
    again = calibration_tokens(FolderSource(gemma), plan.calibration, tmp_path / "stage", Silent())
    for prompt, same in zip(shown.prompts, again.prompts, strict=True):
        assert prompt.keys() == same.keys()
        assert all(torch.equal(tensor, same[name]) for name, tensor in prompt.items())
        assert int((prompt["input_ids"] == IMAGE_ID).sum()) == 4
    stored = load_file(done.output / "model.safetensors")
    scale = stored["language_model.model.layers.0.mlp.down_proj.input_scale"].float()
    dtype = getattr(torch, plan.walk.walk.dtype)
    expected = _scale(gemma, shown, dtype)
    # Stored in bfloat16.
    torch.testing.assert_close(scale, torch.full_like(scale, expected), rtol=2**-8, atol=0)
    without = _scale(gemma, Shown(shown.ids_NT, {}), dtype)
    assert abs(without / expected - 1) > 2**-6


def test_gptq_with_images(gemma: Path, tmp_path: Path) -> None:
    """Rows of other lengths than the texts' pass every step; the towers stay."""
    pictures = write_conversations(tmp_path / "pictures")
    recipe = _recipe(
        tmp_path, gemma, "{scheme: int8, solver: gptq}", f"{{path: {json.dumps(str(pictures))}}}"
    )
    done = compressor.run(recipe, output=tmp_path / "out", progress=Silent())
    assert done.report.calibration is not None
    assert done.report.calibration.samples == 6
    before, after = load_file(gemma / "model.safetensors"), load_file(done.output / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if "vision" in name)
    assert (done.output / "processor_config.json").is_file()


def _fault(folder: Path, source: Path, images: str, weights: str = "{scheme: fp8_static}") -> str:
    with pytest.raises(PlanError) as raised:
        compressor.plan(_recipe(folder, source, weights, images), output=folder / "out")
    return str(raised.value)


def test_a_plan_checks_images(gemma: Path, tmp_path: Path) -> None:
    """Models, processors, files and what does not calibrate on images, before anything is run."""
    pictures = write_conversations(tmp_path / "pictures")
    given = f"{{path: {json.dumps(str(pictures))}}}"
    assert "takes no images" in _fault(tmp_path, tiny_llama(tmp_path / "llama"), given)
    bare = WRAPPERS["gemma3_with_tower"](tmp_path / "bare")
    assert "neither processor_config.json nor preprocessor_config.json" in _fault(tmp_path, bare, given)
    learned = "{scheme: int8, solver: learned}"
    assert "solver learned calibrates on texts only" in _fault(tmp_path, gemma, given, learned)
    many = f"{{path: {json.dumps(str(pictures))}, num_samples: 9}}"
    assert "it holds 4 conversations, 9 are asked for" in _fault(tmp_path, gemma, many)
    (pictures.parent / "2.png").unlink()
    assert "there is no image '2.png'" in _fault(tmp_path, gemma, given)
    pictures.write_text(pictures.read_text().replace('"2.png"', '"../2.png"'))
    assert "lies outside of the file's folder" in _fault(tmp_path, gemma, given)
    pictures.write_text('{"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}]}]}\n')
    assert "neither a text nor an image" in _fault(tmp_path, gemma, given)
    pictures.write_text("{}\n")
    assert "a list of `messages`" in _fault(tmp_path, gemma, given)
    pictures.write_text("\n")
    assert "it holds no conversations" in _fault(tmp_path, gemma, given)
    text = json.dumps(str(tmp_path / "shown.txt"))
    assert "read from JSON lines" in _fault(tmp_path, gemma, f"{{path: {text}}}")


def test_another_image_is_another_calibration(gemma: Path, tmp_path: Path) -> None:
    """The key of the walk counts the images' contents, not only the file that names them."""
    pictures = write_conversations(tmp_path / "pictures")
    recipe = _recipe(tmp_path, gemma, "{scheme: fp8_static}", f"{{path: {json.dumps(str(pictures))}}}")
    first = make_plan(load_recipe(str(recipe)), output=tmp_path / "out").calibration
    (pictures.parent / "1.png").write_bytes((pictures.parent / "2.png").read_bytes())
    second = make_plan(load_recipe(str(recipe)), output=tmp_path / "out").calibration
    assert first is not None
    assert second is not None
    assert first.content != second.content
