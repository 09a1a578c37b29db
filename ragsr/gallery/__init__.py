"""Gallery: a set of reference images on disk with their codes.

The images stay where they are; the gallery folder holds `gallery.db` with their relative paths and their codes, so that
folder and images can move together. `gallery.index` beside it is derived: the codes again, as they are searched.

`gallery.py` is the class, `add.py` how images come in, `query.py` what is searched for, `hits.py` how they are found,
`patches.py` parts of images, `augment.py` how it grows by images that a diffusion model makes; `file.py`, `meta.py`,
`paths.py`, `extras.py` (features and patches) and `generated.py` are the database, `index.py` the index.
docs/gallery_format.md has the format.
"""

from ragsr.gallery.add import Report
from ragsr.gallery.augment import Augmentation, RejectionRule, augment_gallery
from ragsr.gallery.gallery import Gallery, Info
from ragsr.gallery.hits import Hit

__all__ = ["Augmentation", "Gallery", "Hit", "Info", "RejectionRule", "Report", "augment_gallery"]
