"""RefSR: restore a low-quality photo with references, iRAG's path.

    photo ──▶ retrieve ──▶ prepare ──▶ restore ───────────▶ diffuse ──▶ picture
              gallery,     once per    tiles, each sees     if asked
              by hash      reference   the whole references for

Without diffusion the restored picture, which keeps to the photo and its references, is the result. With it, it is the
intermediate result, to which the second stage (`ragsr.pipelines.diffusion`) gives detail of its own.

Source: iRAG Sec. 3, Fig. 2 (hash retrieval, reference-based super-resolution, conditioned diffusion).
"""

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from ragsr.errors import InputError
from ragsr.gallery import Gallery, Hit
from ragsr.image import MAX_PIXELS, image_to_tensor, load_image, load_reduced, tensor_to_image, to_rgb
from ragsr.models import views
from ragsr.models.resample import resize
from ragsr.tiling import Part, PartCall, at_least, restore_parts, tile_size

if TYPE_CHECKING:  # diffusers takes seconds to import, and few need it
    from ragsr.pipelines.diffusion import DiffusionStage
    from ragsr.pipelines.refir_explain import Explanation

REFERENCE = "reference"  # the folder of the first stage in that of a model with two
REMEMBERED = 4  # prepared sets of references that are kept: the photos of a folder often share one
MOST_OF_TILES = 4  # references that are found for single tiles, besides those of the whole photo
BAND = 256  # rows
REDUCING_GAP = 3.0  # times the wanted sides to which Pillow may go in one cheap step


class Model(Protocol):
    """A reference-based restoration model, as `ragsr.models.load_model` gives it."""

    name: str
    scale: int
    context: int  # low-quality pixels around a tile on which the tile depends

    def prepare(self, references: Sequence[Tensor]) -> Any:
        """All that depends on the references alone; each is [1, 3, H, W] in [0, 1]. There may be none."""
        ...

    def __call__(self, low: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        """[1, 3, h, w] -> restored [1, 3, h·scale, w·scale] and the weight of the references [1, 1, same]."""
        ...


@runtime_checkable
class PhotoModel(Model, Protocol):
    """A model that looks at a photo as a whole once, before its tiles."""

    def for_photo(
        self, low: Tensor, prepared: Any
    ) -> Callable[[Tensor, slice, slice, tuple[int, int, int, int]], tuple[Tensor, Tensor]]:
        """Do for the photo [1, 3, h, w] what its tiles share. What comes back restores any part of it, from its pixels,
        the rows and columns they come from, and how many of them at the left, right, top and bottom are context: what
        is answered there counts for nothing.
        """
        ...


@runtime_checkable
class SavedModel(Model, Protocol):
    """A model with weights of its own."""

    def save(self, folder: Path) -> None:
        """Write a folder that `ragsr.models.load_model` reads."""
        ...


@dataclass(frozen=True)
class Reference:
    """A reference that was used, and how near the search found it."""

    path: Path | None  # None for a picture in memory
    distance: int | None = None  # differing bits of the codes; None where no search was made
    score: float | None = None  # in [0, 1], see `Gallery.search`
    note: str | None = None  # what was done to it before use, if anything
    generated: bool = False  # made by a diffusion model: see `ragsr gallery augment`
    cosine: float | None = None  # of the features, where the gallery keeps them
    region: tuple[int, int, int, int] | None = None  # left, top, right, bottom: where it is most like the photo


@dataclass(frozen=True)
class Restored:
    """A restored photo and where it comes from."""

    image: Image.Image
    references: list[Reference]  # nearest first
    weight: Tensor  # float32 [1, 1, H, W] in [0, 1]: how much of each pixel came from the references
    milliseconds: dict[str, float]  # per stage: load, search, prepare, restore, diffuse, save
    rejected: list[Reference] = field(default_factory=list)  # found, and not like enough to be of use
    explanation: "Explanation | None" = None  # of refir, on request

    @property
    def reference_share(self) -> float:
        """The mean of `weight`."""
        return float(self.weight.mean())


class RefSRPipeline:
    """Restores photos one by one; what it prepared for the last sets of references is kept."""

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "cpu",
        tile: int | str = "auto",
        seed: int = 0,
        diffusion: "DiffusionStage | None" = None,
        steps: int = 10,  # of the diffusion
    ) -> None:
        self.model, self.diffusion = model, diffusion
        self.steps = None if diffusion is None else steps
        self.device = torch.device(device)
        self.tile = tile_size(tile)
        self.seed = seed  # for models that draw random numbers
        self._prepared: OrderedDict[tuple[object, ...], tuple[Any, list[str | None]]] = OrderedDict()

    @property
    def scale(self) -> int:
        return self.model.scale

    @torch.no_grad()
    def __call__(
        self,
        photo: str | Path | Image.Image | Tensor,  # a tensor is [1, 3, h, w] in [0, 1]
        references: Sequence[str | Path | Image.Image] = (),
        gallery: Gallery | None = None,
        k: int = 1,
        threshold: float | None = None,
        **of_diffusion: Any,
    ) -> Restored:
        """Restore one photo with `references`, or with the k nearest of `gallery`, or with neither.

        What is found with a score below `threshold` (None: that of the gallery's encoder) is not used: a wrong
        reference does harm. `of_diffusion` are options of `DiffusionStage.__call__`, such as `start`, `colour`,
        `generator` and `callback_on_step_end`; `InputError` where there is no diffusion.
        """
        if of_diffusion and self.diffusion is None:
            raise InputError(f"{next(iter(of_diffusion))} is an option of a diffusion, and this pipeline has none")
        milliseconds: dict[str, float] = {}
        with timed(milliseconds, "load"):
            low = self.load(photo)
        with timed(milliseconds, "search"):
            rejected: list[Reference] = []
            found = named(references)
            if gallery is not None:
                found, rejected = self.retrieve(gallery, low, k, threshold)
        with timed(milliseconds, "prepare"):
            prepared, notes = self.prepare(
                references if gallery is None else [hit.path for hit in found if hit.path is not None]
            )
            found = [replace(one, note=note) for one, note in zip(found, notes, strict=True)]
        with timed(milliseconds, "restore"):
            restored, weight = self.restore(low, prepared)
        if self.diffusion is not None and self.steps is not None:
            with timed(milliseconds, "diffuse"):
                restored = self.diffuse(self.diffusion, low, restored, self.steps, **of_diffusion)
        return Restored(picture_of(restored), found, weight, milliseconds, rejected)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both stages to a folder that `load_pipeline(model=folder, quality="rich")` reads."""
        if self.diffusion is None or not isinstance(self.model, SavedModel):
            what = "has no diffusion" if self.diffusion is None else f"begins with {self.model.name}, without weights"
            raise InputError(f"a pipeline that {what} cannot be saved; give it a reference stage and a diffusion stage")
        self.diffusion.save_pretrained(folder)
        self.model.save(Path(folder) / REFERENCE)

    def load(self, photo: str | Path | Image.Image | Tensor) -> Tensor:
        """The photo as a tensor [1, 3, h, w], checked."""
        low = photo if isinstance(photo, Tensor) else image_to_tensor(as_picture(photo))
        check_low(low, self.model.scale)
        return low.detach().float().cpu()

    def retrieve(
        self, gallery: Gallery, low: Tensor, k: int, threshold: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        """The k nearest images of the gallery: those of use, and those with a score below `threshold`.

        Of a gallery with patches, a photo larger than a tile also gets what is most like its single tiles.
        """
        picture = tensor_to_image(low)
        hits = gallery.search(picture, k)
        if not hits:
            raise InputError(
                f"{gallery.folder}: none of its images is on disk; ragsr gallery info {gallery.folder} lists them"
            )
        least = gallery.encoder.threshold if threshold is None else threshold
        if gallery.keeps_patches and max(picture.size) > self.tile:
            hits += of_tiles(gallery.search_regions(picture, self.tile), {hit.path for hit in hits}, least)
        found = [
            Reference(h.path, h.distance, h.score, generated=h.generated, cosine=h.cosine, region=h.region)
            for h in hits
        ]
        of_use = [hit.score >= least for hit in hits]
        return list(compress(found, of_use)), [one for one, useful in zip(found, of_use, strict=True) if not useful]

    def prepare(self, references: Sequence[str | Path | Image.Image]) -> tuple[Any, list[str | None]]:
        """What the model needs to know of the references, and a note on each that had to be reduced.

        Both are remembered while the same files are asked for.
        """
        key = tuple(map(fingerprint, references))
        if key not in self._prepared:
            self._prepared[key] = self._prepare(references)
        self._prepared.move_to_end(key)
        while len(self._prepared) > REMEMBERED:
            self._prepared.popitem(last=False)
        return self._prepared[key]

    def restore(self, low: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        """[1, 3, h, w] -> [1, 3, H, W] and the weight of the references [1, 1, H, W], tile by tile."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            restore_part = self.for_photo(at_least(low).to(self.device), prepared)
            return restore_parts(restore_part, low, self.model.scale, self.tile, self.model.context)

    def diffuse(self, stage: "DiffusionStage", low: Tensor, intermediate: Tensor, steps: int, **options: Any) -> Tensor:
        """The second stage: the photo [1, 3, h, w] and the intermediate result [1, 3, H, W] -> [1, 3, H, W]."""
        height, width = intermediate.shape[-2:]
        enlarged = resize(low, (height, width)).clamp(0, 1)
        own = {"generator": torch.Generator().manual_seed(self.seed)}  # on the CPU: one noise for every device
        return stage(enlarged, intermediate, num_inference_steps=steps, **(own | options))

    def for_photo(self, low: Tensor, prepared: Any) -> PartCall:
        """What restores the tiles of this photo."""
        if not isinstance(self.model, PhotoModel):
            return lambda part: self.model(part.pixels.to(self.device), prepared)
        restore = self.model.for_photo(low, prepared)

        def restore_part(part: Part) -> tuple[Tensor, Tensor]:
            return restore(part.pixels.to(self.device), part.rows, part.columns, part.margins)

        return restore_part

    def _prepare(self, references: Sequence[str | Path | Image.Image]) -> tuple[Any, list[str | None]]:
        tensors, notes = [], []
        for number, reference in enumerate(references, 1):
            picture, note = read_reference(reference, number)
            tensors.append(image_to_tensor(picture).to(self.device))
            notes.append(note)
        return self.model.prepare(tensors), notes


# ------------------------------------------------------------------ details


@contextmanager
def timed(milliseconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage took."""
    start = time.perf_counter()
    yield
    milliseconds[stage] = (time.perf_counter() - start) * 1000


def named(references: Sequence[str | Path | Image.Image]) -> list[Reference]:
    """References that the user named: there was no search."""
    return [Reference(None if isinstance(r, Image.Image) else Path(r)) for r in references]


def of_tiles(regions: Sequence[Sequence[Hit]], known: set[Path], least: float) -> list[Hit]:
    """The best images of the single tiles that are of use and not `known`: at most `MOST_OF_TILES`, best first."""
    best: dict[Path, Hit] = {}
    for hit in (hits[0] for hits in regions if hits):
        if hit.path not in known and hit.score >= max(least, best[hit.path].score if hit.path in best else 0.0):
            best[hit.path] = hit
    return sorted(best.values(), key=lambda hit: -hit.score)[:MOST_OF_TILES]


def as_picture(source: str | Path | Image.Image) -> Image.Image:
    return source if isinstance(source, Image.Image) else load_image(source)


def read_reference(reference: str | Path | Image.Image, number: int) -> tuple[Image.Image, str | None]:
    """A reference as large as the models use it, and a note if that is less than it was; `InputError` if it is tiny.

    It is reduced while it is a picture: as a tensor it would take three times the memory.
    """
    if isinstance(reference, Image.Image):
        name, picture, full = f"reference {number}", reference, reference.size
    else:
        name, (picture, full) = str(reference), load_reduced(reference, views.MAX_PIXELS)
    if min(full) < views.MIN_SIDE:
        raise InputError(
            f"{name}: {full[0]}x{full[1]} pixels are too few for a reference; both sides must be at least "
            f"{views.MIN_SIDE}: leave it out or find it larger"
        )
    size = usable_size(*picture.size)
    if size == picture.size:
        return picture, None
    reduced = to_rgb(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    return reduced, (
        f"reduced from {full[0]}x{full[1]} to {size[0]}x{size[1]}; "
        f"models use {views.MAX_PIXELS / 1e6:.0f} megapixels of a reference"
    )


def usable_size(width: int, height: int) -> tuple[int, int]:
    """The size with at most `views.MAX_PIXELS` pixels and sides of at least `views.MIN_SIDE`, in shape if possible."""
    shrink = math.sqrt(views.MAX_PIXELS / (width * height))
    if shrink >= 1:
        return width, height
    least, most = views.MIN_SIDE, views.MAX_PIXELS // views.MIN_SIDE
    return min(max(int(width * shrink), least), most), min(max(int(height * shrink), least), most)


def picture_of(restored: Tensor) -> Image.Image:
    """[1, 3, H, W] as a picture, a few rows at a time: a large one need not be in memory once more as numbers."""
    picture = Image.new("RGB", (restored.shape[-1], restored.shape[-2]))
    for top in range(0, picture.height, BAND):
        picture.paste(tensor_to_image(restored[..., top : top + BAND, :]), (0, top))
    return picture


def fingerprint(reference: str | Path | Image.Image) -> tuple[object, ...]:
    """What a prepared reference is remembered by: the file in its present state, or the content of a picture."""
    if isinstance(reference, Image.Image):
        return reference.size, hashlib.sha256(to_rgb(reference).tobytes()).digest()
    path = Path(reference).resolve()
    try:
        state = path.stat()
    except OSError:  # loading it will say what is wrong
        return (path,)
    return path, state.st_mtime_ns, state.st_size


def check_low(low: Tensor, scale: int) -> None:
    if low.ndim != 4 or low.shape[:2] != (1, 3) or 0 in low.shape:
        raise InputError(f"a photo must be a tensor [1, 3, height, width]; this one is {list(low.shape)}")
    height, width = (side * scale for side in low.shape[-2:])
    if height * width > MAX_PIXELS:
        raise InputError(
            f"the result would be {width}x{height} = {height * width / 1e6:.0f} megapixels, and "
            f"{MAX_PIXELS / 1e6:.0f} are allowed; scale the photo down or cut it up first"
        )
    if not low.is_floating_point():
        raise InputError(f"a photo must hold floating-point numbers in [0, 1]; this tensor is {low.dtype}")
    if not low.isfinite().all():
        raise InputError("the photo's tensor holds NaN or infinite values; repair or replace them first")
    if low.min() < 0 or low.max() > 1:
        raise InputError(
            f"the photo's tensor goes from {float(low.min()):.3g} to {float(low.max()):.3g}; values must lie in [0, 1]"
        )
