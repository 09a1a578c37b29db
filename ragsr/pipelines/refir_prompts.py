"""A prompt per picture: from a callable, or from a file of tags that any tagger can write.

    photo.jpg: cat, sofa, window      one picture a line: its file name or its path, a colon, what it shows
    # a comment, and empty lines

A path is looked for first, as it is written, then the name alone.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ragsr.errors import InputError
from ragsr.image import tensor_to_image

Captioner = Callable[[Image.Image, Path | None], Any]  # a picture and its file, if it has one -> a prompt


def prompt_for(prompt: Any, picture: Tensor, path: Path | None) -> Any:
    """What the network is told of this picture [1, 3, H, W]: `prompt`, or what it says if it is a `Captioner`."""
    return prompt(tensor_to_image(picture), path) if callable(prompt) else prompt


class TagFile:
    """The tags of many pictures. Raises `InputError` for a file that cannot be read or has a line without a colon."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.tags = Path(path), dict[str, str]()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: the file of tags cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            name, colon, tags = line.partition(": ")
            if line.strip() and not line.startswith("#"):
                if not colon:
                    raise InputError(f"{path}, line {number}: {line!r} is not of the form photo.jpg: cat, sofa, window")
                self.tags[name.strip()] = tags.strip()

    def find(self, path: Path | None) -> str | None:
        """The tags of the picture in this file, if there are any."""
        return None if path is None else self.tags.get(str(path), self.tags.get(path.name))

    def prompt(self, path: Path | None, besides: str | None) -> str:
        """The tags of a photo and what is said besides; warns if it has none."""
        tags = self.find(path)
        if tags is None:
            warnings.warn(f"{self.path} has no tags of {path or 'a picture that is no file'}", stacklevel=3)
        return ", ".join(filter(None, (tags, besides)))
