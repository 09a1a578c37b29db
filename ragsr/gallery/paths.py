"""How a gallery names its images: relative to its folder, with forward slashes, links resolved."""

import os
from pathlib import Path


def stored_path(folder: Path, path: Path) -> str:
    """How the gallery in `folder` (resolved) names an image."""
    return Path(os.path.relpath(path.resolve(), folder)).as_posix()


def absolute_path(folder: Path, stored: str) -> Path:
    """The image that `stored` names."""
    return Path(os.path.normpath(os.path.join(folder, stored)))


def is_utf8(path: str) -> bool:
    """Whether the database can hold it: file names may be any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def at_or_below(folder: Path, path: Path) -> tuple[str, list[str]]:
    """An SQL condition on `path` for a file, or for all below a folder, and its values. It is found by the index.

    '0' is the character behind '/': what begins with 'a/' lies between 'a/' and 'a0'.
    """
    stored = stored_path(folder, path)
    above = "" if stored == "." else f"{stored}/"
    if above.replace("../", ""):
        return "path = ? OR (path >= ? AND path < ?)", [stored, above, f"{stored}0"]
    # the gallery's own folder, or one above it: all but what goes further up
    return "path < ? OR path >= ?", [f"{above}../", f"{above}..0"]
