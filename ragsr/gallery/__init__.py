"""Gallery: a set of reference images on disk with their codes.

The images stay where they are; the gallery folder holds one file, `gallery.db`, with their relative paths, so that
folder and images can move together.

`gallery.py` is the class, `add.py` how images come in, `file.py` the file; docs/gallery_format.md its format.
"""

from ragsr.gallery.add import Report
from ragsr.gallery.gallery import Gallery, Hit, Info

__all__ = ["Gallery", "Hit", "Info", "Report"]
