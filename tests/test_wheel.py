"""The installed wheel: recipes and texts are inside, and the same relative paths work from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel leaves it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def _python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -P keeps the current folder off the path; the editable install of the checkout comes after PYTHONPATH.
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """The tests below would prove nothing if the checkout were imported."""
    done = _python(installed, tmp_path, "-c", "import compressor; print(compressor.__file__)")
    assert done.stdout.strip() == str(installed / "compressor" / "__init__.py")


def test_shipped_recipes_resolve_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """Each listed path can be planned or at least loaded from an unrelated folder."""
    listed = _python(installed, tmp_path, "-m", "compressor", "recipes")
    paths = [line.split()[0] for line in listed.stdout.splitlines()]
    assert "recipes/smollm2-nvfp4.yaml" in paths
    done = _python(installed, tmp_path, "-m", "compressor", "plan", "recipes/scout-nvfp4.yaml")
    assert done.returncode == 0, done.stderr
    assert "planned from shipped headers" in done.stdout


def test_shipped_texts_and_licences_are_inside(installed: Path) -> None:
    """Texts, task items and the licences that they need travel with the wheel."""
    data = installed / "compressor" / "_data"
    texts = (
        "heldout.jsonl",
        "default.yaml",
        "chat.jsonl",
        "piqa/piqa.yaml",
        "openbookqa/NOTICE",
        "README.md",
    )
    for name in (f"calibration/{text}" for text in texts):
        assert (data / name).is_file(), name
    assert list(installed.glob("compressor-*.dist-info/licenses/LICENSE"))
