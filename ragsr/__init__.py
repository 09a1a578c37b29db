"""ragsr restores a low-quality photo with the help of good ones.

    import ragsr

    with ragsr.Gallery.create("photos.ragsr") as gallery:
        gallery.add(["photos/"])
        restored = ragsr.restore("small.jpg", gallery=gallery)
    ragsr.save_image(restored.image, "big.png")

The ops stand apart in `ragsr.ops`, which needs nothing but torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragsr.codes import load_encoder
    from ragsr.errors import InputError
    from ragsr.gallery import Gallery, Hit
    from ragsr.image import load_image, save_image
    from ragsr.metrics import psnr, ssim
    from ragsr.pipelines import Restored, restore
    from ragsr.search import Index

__all__ = [
    "Gallery",
    "Hit",
    "Index",
    "InputError",
    "Restored",
    "load_encoder",
    "load_image",
    "psnr",
    "restore",
    "save_image",
    "ssim",
]

HOMES = {
    "Gallery": "gallery",
    "Hit": "gallery",
    "Index": "search",
    "InputError": "errors",
    "Restored": "pipelines",
    "load_encoder": "codes",
    "load_image": "image",
    "psnr": "metrics",
    "restore": "pipelines",
    "save_image": "image",
    "ssim": "metrics",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, so that `import ragsr.ops` stays as light as torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'ragsr' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ragsr.{HOMES[name]}"), name)
    globals()[name] = value
    return value
