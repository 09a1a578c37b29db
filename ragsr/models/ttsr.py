"""`ttsr`: the texture transformer, ×4 super-resolution that takes its texture from references.

    low ───────────────────────────────────────────▶ MainNet ──▶ image
    low enlarged ──▶ LTE ──▶ search ──▶ transfer ──────▲
    references ────▶ LTE ─────▲───────────▲

LTE, the learnable texture extractor, is the first layers of VGG19. The search finds for every patch of the enlarged
image its best match in the references blurred likewise; the transfer brings that place's sharp features over, at three
levels; the main network adds them, weighted with the score S of the match.

The layers, and what their names mean, are in `ragsr.models.ttsr_net`. The N×N' relevance of all patches is never
stored.

Source: Yang et al., Learning Texture Transformer Network for Image Super-Resolution, CVPR 2020, Sec. 3.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.models.loading import WEIGHTS, load_into, load_weights, save_folder
from ragsr.models.ttsr_net import CELLS, Levels, MainNet, Margins, TextureExtractor, Transferred, enlarge
from ragsr.models.views import check_image, usable
from ragsr.ops import correlation_topk

SCALE = 4
BAND = 1 << 16  # low-quality pixels searched for at a time: half a gigabyte of features on the way
FEATURE_REACH = 6  # low-quality pixels around a cell of level 3: bicubic enlargement 2, LTE 13 fine pixels and so 4
FIRST = "MainNet.SFE.conv_head.weight"  # what a checkpoint of TTSR is recognised by


@dataclass(frozen=True)
class Textures:
    """References as the network uses them. There may be none."""

    searched: tuple[Tensor, ...]  # per reference: level 3 of its blurred version, [B, 256, h_r, w_r]
    canvas: Levels | None  # the sharp features of all of them, below each other

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Heights and widths of what is searched."""
        return [x.shape[2] for x in self.searched], [x.shape[3] for x in self.searched]


# ------------------------------------------------------------------ the model


class TTSR:
    """The model `ttsr`: ×4, learned; every image [1, 3, H, W] float32 in [0, 1].

    There are no weights that ragsr may ship. `TTSR.load` reads a checkpoint that you have.
    """

    name = "ttsr"
    scale = SCALE

    def __init__(self, net: "TTSRNet") -> None:
        self.net = net.eval()
        self.context = net.context

    @classmethod
    def load(cls, path: str | Path, scale: int = SCALE) -> Self:
        """From a checkpoint of TTSR or iRAG, of any width and depth, or from a folder that `save` wrote.

        Raises `InputError` where it is none.
        """
        path = Path(path)
        path = path / WEIGHTS if path.is_dir() else path
        if scale != SCALE:
            raise InputError(f"model 'ttsr' enlarges {SCALE} times, not {scale} times; use scale {SCALE}")
        return cls(net_of(load_weights(path), str(path)))

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads; sizes are read from the shapes of the weights."""
        save_folder(folder, {"model": self.name}, self.net)

    @torch.no_grad()
    def prepare(self, references: Sequence[Tensor]) -> Textures:
        """References of any sizes from 8 × 8 pixels, each [1, 3, H, W]; more than 4 megapixels are reduced to 4."""
        fitted = [2 * fit(reference) - 1 for reference in references]
        return self.net.to(fitted[0].device).textures(fitted) if fitted else Textures((), None)

    @torch.no_grad()
    def __call__(self, low: Tensor, prepared: Textures) -> tuple[Tensor, Tensor]:
        """Restore low [1, 3, h, w]: the image [1, 3, 4h, 4w], and S in [0, 1] at that size [1, 1, 4h, 4w]."""
        return self.for_photo(low, prepared)(low, slice(None), slice(None), (0, 0, 0, 0))

    @torch.no_grad()
    def for_photo(
        self, low: Tensor, prepared: Textures
    ) -> Callable[[Tensor, slice, slice, Margins], tuple[Tensor, Tensor]]:
        """Search for a photo [1, 3, h, w] once. What comes back restores any part of it, see `PhotoModel`."""
        check_image("the low-quality image", low, 1)
        net = self.net.to(low.device)
        found = net.transfer_photo(2 * low - 1, prepared)

        @torch.no_grad()
        def restore(part: Tensor, rows: slice, columns: slice, margins: Margins) -> tuple[Tensor, Tensor]:
            here = None if found is None else found.part(rows, columns)
            score = part.new_zeros(1, 1, *part.shape[2:]) if here is None else here.score
            weight = F.interpolate(score.clamp(0, 1), scale_factor=SCALE, mode="bilinear", align_corners=False)
            return (net.MainNet(2 * part - 1, here, margins) + 1) / 2, weight

        return restore


def net_of(weights: dict[str, Tensor], what: str) -> "TTSRNet":
    """The network to which the weights belong, with these weights.

    Every prefix before the names is allowed: `restoration_module.core.` in a checkpoint of iRAG.
    """
    first = next((name for name, x in weights.items() if name.endswith(FIRST) and x.ndim == 4), None)
    if first is None:
        raise InputError(f"{what}: no weights of TTSR, {FIRST} is not among them; use a checkpoint of TTSR or iRAG")
    prefix = first.removesuffix(FIRST)
    own = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    blocks = tuple(count_blocks(own, place) for place in ("SFE.RBs", "RB11", "RB21", "RB31"))
    net = TTSRNet(own[FIRST].shape[0], blocks)
    load_into(net, own, what, optional=("LTE_copy.",))  # only a training loss used the copy
    return net


def count_blocks(names: Iterable[str], place: str) -> int:
    found = (re.match(rf"MainNet\.{re.escape(place)}\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def fit(reference: Tensor) -> Tensor:
    """A reference at no more than `MAX_PIXELS`, its sides continued by reflection to multiples of 4 pixels."""
    reference = usable(reference)
    return F.pad(reference, (0, -reference.shape[3] % SCALE, 0, -reference.shape[2] % SCALE), mode="reflect")


# ------------------------------------------------------------------ the network


class TTSRNet(nn.Module):
    """TTSR at its published size, or another; every image in [-1, 1]."""

    def __init__(
        self,
        channels: int = 64,
        blocks: tuple[int, ...] = (16, 16, 8, 4),  # residual blocks: first on the low image, then per stage
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.MainNet = MainNet(channels, blocks, residual_scale)
        self.LTE = TextureExtractor()
        self.context = self.MainNet.reach[0]

    def forward(self, low: Tensor, enlarged: Tensor, textures: Textures) -> tuple[Tensor, Tensor]:
        """low [B, 3, h, w] and the same enlarged [B, 3, 4h, 4w] -> image [B, 3, 4h, 4w] and S [B, 1, h, w]."""
        found = self.transfer(enlarged, textures)
        score = low.new_zeros(low.shape[0], 1, *low.shape[2:]) if found is None else found.score
        return self.MainNet(low, found), score

    def textures(self, references: Sequence[Tensor]) -> Textures:
        """References [B, 3, H_r, W_r], sides multiples of 4, made ready for any number of images."""
        sharp = [self.LTE(reference) for reference in references]
        return Textures(tuple(self.LTE(blur(reference))[2] for reference in references), canvas_of(sharp))

    def transfer(self, enlarged: Tensor, textures: Textures) -> Transferred | None:
        """Sec. 3.2: where every cell of the enlarged image finds its texture, and how alike it is; None without
        references.
        """
        return self.search(self.LTE.coarsest(enlarged), textures) if textures.searched else None

    def transfer_photo(self, low: Tensor, textures: Textures) -> Transferred | None:
        """`transfer` for a low-quality image of any size: some rows at a time, each with those it depends on."""
        height, rows = low.shape[2], max(1, BAND // low.shape[3])
        if not textures.searched:
            return None
        found = [self.search_rows(low, top, min(height, top + rows), textures) for top in range(0, height, rows)]
        return replace(
            found[0],
            score=torch.cat([band.score for band in found], dim=2),
            index=torch.cat([band.index for band in found], dim=1),
        )

    def search_rows(self, low: Tensor, top: int, bottom: int, textures: Textures) -> Transferred:
        first, last = max(0, top - FEATURE_REACH - 1), min(low.shape[2], bottom + FEATURE_REACH + 1)
        query = self.LTE.coarsest(enlarge(low[:, :, first:last], SCALE))
        above, below = max(0, top - 1), min(low.shape[2], bottom + 1)  # a patch reaches one row further
        found = self.search(query[:, :, above - first : below - first], textures)
        return found.part(slice(top - above, bottom - above), slice(None))

    def search(self, query: Tensor, textures: Textures) -> Transferred:
        """Sec. 3.2, relevance and hard attention: of every 3 × 3 patch the best match in all references.

        The query is level 3 of the enlarged image, [B, 256, h, w]. Of equal scores the earlier reference's counts.
        """
        assert textures.canvas is not None
        score, index, image = correlation_topk(query, textures.searched, k=1, patch=3, padding=1)  # [B, h·w, 1]
        heights, widths = (query.new_tensor(x, dtype=torch.int64) for x in textures.sizes)
        top = (heights + 1).cumsum(0) - heights - 1
        row, column = index // widths[image] + top[image], index % widths[image]
        place = row * textures.canvas[2].shape[3] + column
        grid = query.shape[2:]
        return Transferred(score.view(-1, 1, *grid), place.view(-1, *grid), textures.canvas)


def blur(reference: Tensor) -> Tensor:
    """What `reference` [B, 3, H, W] would be had it been a low-quality image: reduced 4 times and enlarged again.

    Without anti-aliasing, as iRAG does it.
    """
    return enlarge(F.interpolate(reference, scale_factor=1 / SCALE, mode="bicubic", align_corners=False), SCALE)


def canvas_of(references: Sequence[Levels]) -> Levels | None:
    """The references of any sizes below each other, level by level, at the left edge.

    One row of cells of zeros lies between two of them, and zeros lie right of the narrower ones. A texture is brought
    over together with the cells that touch it, and beyond its own reference these must count as zeros.
    """
    if not references:
        return None
    one, two, three = (stack(maps, cell) for maps, cell in zip(zip(*references, strict=True), CELLS, strict=True))
    return one, two, three


def stack(maps: Sequence[Tensor], gap: int) -> Tensor:
    """[B, C, h_r, w_r] -> [B, C, Σ(h_r + gap), max w_r]"""
    width = max(x.shape[3] for x in maps)
    return torch.cat([F.pad(x, (0, width - x.shape[3], 0, gap)) for x in maps], dim=2).contiguous()
