"""Where shipped recipes, header sets and texts are: the same relative path works from any folder.

In an installed wheel they lie in ``compressor/_data``; in a checkout beside the package.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from compressor.errors import UserError


def shipped_root() -> Path:
    """The folder that holds ``recipes/`` and ``calibration/``."""
    packaged = files("compressor") / "_data"
    if packaged.is_dir():
        with as_file(packaged) as folder:
            return folder
    return Path(__file__).resolve().parent.parent


def find(path: str, *, beside: Path | None = None, what: str = "file") -> Path:
    """The file or folder that ``path`` names.

    Looked for as given (absolute, or from the current folder), then from ``beside`` (the folder of the
    recipe that names it), then among the shipped files.

    Raises:
        UserError: it is in none of these places.
    """
    # "~" is not expanded: recipes come from strangers, and shells expand it for those who type it.
    asked = Path(path)
    places = [asked] if asked.is_absolute() else [asked, *([beside / asked] if beside else [])]
    if not asked.is_absolute() and ".." not in asked.parts:
        places.append(shipped_root() / asked)
    places = list(dict.fromkeys(place.absolute() for place in places))
    for place in places:
        try:
            if place.exists():
                return place.resolve()
        except OSError as error:
            raise UserError(f"no usable path of a {what}: {error.strerror}", where=path[:200]) from error
    looked = ", ".join(map(str, places))
    raise UserError(f"no such {what}: {path}", fix=f"looked for {looked}")
