"""The layers of TTSR (`ragsr.models.ttsr`): the texture extractor, and the main network that joins textures to images.

Source: Yang et al., Learning Texture Transformer Network for Image Super-Resolution, CVPR 2020, Sec. 3.2 and 3.3. Names
and shapes of the weights are those of the authors' checkpoints; attributes with capitals (`MainNet`, `SFE`, `RB11`)
come from there. Beware: of the features, level 1 is the finest and level 3 the coarsest, with one cell per low-quality
pixel; the digits in the main network's `x1`, `ex12` or `conv12` (from 1 to 2) count its scales from the coarsest.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragsr.ops import gather_fold

CELLS = (4, 2, 1)  # pixels along a side of a cell of level 1, 2, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on which VGG19 was trained

Levels = tuple[Tensor, Tensor, Tensor]  # [B, 64, 4h, 4w], [B, 128, 2h, 2w], [B, 256, h, w]


Margins = tuple[int, int, int, int]  # low-quality pixels at the left, right, top and bottom that are context


@dataclass(frozen=True)
class Transferred:
    """What the references give to the image."""

    score: Tensor  # S [B, 1, h, w]: the cosine of the best match, in [-1, 1]
    index: Tensor  # int64 [B, h, w]: where on the canvas it lies, in cells, row-major
    canvas: Levels

    def level(self, number: int) -> Tensor:
        """Sec. 3.2, transfer: T [B, 256, h, w] for level 3, [B, 128, 2h, 2w] for 2, [B, 64, 4h, 4w] for 1."""
        cell = CELLS[number - 1]
        return gather_fold(self.canvas[number - 1], self.index, patch=3 * cell, stride=cell)

    def part(self, rows: slice, columns: slice) -> "Transferred":
        return replace(self, score=self.score[..., rows, columns], index=self.index[..., rows, columns])


def enlarge(x: Tensor, times: int) -> Tensor:
    """Bicubic, as everywhere in TTSR; a = -0.75."""
    return F.interpolate(x, scale_factor=times, mode="bicubic", align_corners=False)


# ------------------------------------------------------------------ learnable texture extractor


class TextureExtractor(nn.Module):
    """VGG19 up to relu3_1; the numbers are the layers' places in VGG19."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1 = numbered(0, conv3(3, 64), relu())
        self.slice2 = numbered(2, conv3(64, 64), relu(), nn.MaxPool2d(2), conv3(64, 128), relu())
        self.slice3 = numbered(7, conv3(128, 128), relu(), nn.MaxPool2d(2), conv3(128, 256), relu())
        self.sub_mean = normalisation()

    def coarsest(self, image: Tensor) -> Tensor:
        """Level 3 alone: the finer ones are forgotten on the way."""
        return self.slice3(self.slice2(self.slice1(self.normalised(image)))).contiguous()

    def forward(self, image: Tensor) -> Levels:
        """[B, 3, H, W] in [-1, 1], sides multiples of 4 -> [B, 64, H, W], [B, 128, H/2, W/2], [B, 256, H/4, W/4]"""
        one = self.slice1(self.normalised(image))
        two = self.slice2(one)
        return one.contiguous(), two.contiguous(), self.slice3(two).contiguous()

    def normalised(self, image: Tensor) -> Tensor:
        return self.sub_mean(((image + 1) / 2).contiguous(memory_format=fast_layout(image.device)))


def numbered(first: int, *layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((str(first + i), layer) for i, layer in enumerate(layers)))


def normalisation() -> nn.Conv2d:
    """(x - mean) / std as the checkpoints keep it: a 1 × 1 convolution that is never trained."""
    layer = conv1(3, 3)
    std = torch.tensor(STD)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(1 / std)[..., None, None])
        layer.bias.copy_(-torch.tensor(MEAN) / std)  # type: ignore[union-attr]
    return layer.requires_grad_(False)


def relu() -> nn.Module:
    """In place, as after every convolution here: its own output is needed by nobody, and may take gigabytes."""
    return nn.ReLU(inplace=True)


def conv1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


# ------------------------------------------------------------------ main network


class MainNet(nn.Module):
    """Sec. 3.2, soft attention, and 3.3: features of the low image, joined by textures at three resolutions."""

    def __init__(self, channels: int, blocks: tuple[int, ...], residual_scale: float) -> None:
        super().__init__()
        c, (first, second, third, fourth) = channels, blocks

        def run(count: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualBlock(c, residual_scale) for _ in range(count)))

        self.SFE = ShallowFeatures(c, run(first))
        self.conv11_head = conv3(c + 256, c)
        self.RB11 = run(second)
        self.conv11_tail = conv3(c, c)
        self.conv12 = conv3(c, 4 * c)
        self.conv22_head = conv3(c + 128, c)
        self.ex12 = Exchange2(c)
        self.RB21, self.RB22 = run(third), run(third)
        self.conv21_tail, self.conv22_tail = conv3(c, c), conv3(c, c)
        self.conv23 = conv3(c, 4 * c)
        self.conv33_head = conv3(c + 64, c)
        self.ex123 = Exchange3(c)
        self.RB31, self.RB32, self.RB33 = run(fourth), run(fourth), run(fourth)
        self.conv31_tail, self.conv32_tail, self.conv33_tail = conv3(c, c), conv3(c, c), conv3(c, c)
        self.merge_tail = MergeTail(c)
        self.reach = reach(blocks)

    def forward(self, low: Tensor, found: Transferred | None, margins: Margins = (0, 0, 0, 0)) -> Tensor:
        """[B, 3, h, w] -> [B, 3, 4h, 4w] in [-1, 1]; x1, x2, x3 have h, 2h, 4h rows.

        The finer the scale, the more a pixel costs and the fewer around it are still needed: `margins` get narrower
        from stage to stage, and at the end zeros stand where they were.
        """
        _, second, third = self.reach
        low = low.contiguous(memory_format=fast_layout(low.device))
        x1 = self.first_stage(low, found)
        kept, (x1,), found = narrow(margins, second, (x1,), found)
        x1, x2 = self.second_stage(x1, found)
        kept, (x1, x2), found = narrow(kept, third, (x1, x2), found)
        return widen(self.last_stage(x1, x2, found), kept, margins)

    def first_stage(self, low: Tensor, found: Transferred | None) -> Tensor:
        x1 = self.SFE(low)
        x1 = attend(self.conv11_head, x1, found, level=3)
        return x1 + self.conv11_tail(self.RB11(x1))

    def second_stage(self, x1: Tensor, found: Transferred | None) -> tuple[Tensor, Tensor]:
        x2 = F.pixel_shuffle(self.conv12(x1), 2).relu_()
        x2 = attend(self.conv22_head, x2, found, level=2)
        y1, y2 = self.ex12(x1, x2)
        return x1 + self.conv21_tail(self.RB21(y1)), x2 + self.conv22_tail(self.RB22(y2))

    def last_stage(self, x1: Tensor, x2: Tensor, found: Transferred | None) -> Tensor:
        x3 = F.pixel_shuffle(self.conv23(x2), 2).relu_()
        x3 = attend(self.conv33_head, x3, found, level=1)
        y1, y2, y3 = self.ex123(x1, x2, x3)
        x1 = x1 + self.conv31_tail(self.RB31(y1))
        x2 = x2 + self.conv32_tail(self.RB32(y2))
        x3 = x3 + self.conv33_tail(self.RB33(y3))
        return self.merge_tail(x1, x2, x3)


def attend(head: nn.Module, x: Tensor, found: Transferred | None, level: int) -> Tensor:
    """Soft attention: x + head([x, T]) · S, and exactly x without references."""
    if found is None:
        return x
    cell = CELLS[level - 1]
    score = found.score if cell == 1 else enlarge(found.score, cell)
    texture = found.level(level).contiguous(memory_format=fast_layout(x.device))
    return torch.addcmul(x, head(torch.cat((x, texture), dim=1)), score)


def fast_layout(device: torch.device) -> torch.memory_format:
    """How convolutions like their input. Those of the CPU would put it in this order first, and their output back."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def reach(blocks: tuple[int, ...]) -> tuple[int, int, int]:
    """On how many low-quality pixels around a pixel its restoration depends: before the first, second and third stage.

    Rounded up part by part. At the coarsest scale, where a step is longest, a residual block reaches 2 pixels, and a
    run of n blocks has a convolution of reach 1 after it. Each of the two exchanges and the merging at the end reach 3:
    bicubic enlargement 2, convolution 1; before the third stage another 1 stands for the score, which is enlarged too.
    The first stage has a convolution before its first run and 1 for the head; beside this run, the search reaches 9:
    bicubic enlargement 2, LTE 13 fine pixels and so 4, patch 1, fold 1, head 1.
    """
    first, second, third, fourth = blocks
    before_third = 3 + (1 + 2 * fourth) + 3 + 1
    before_second = before_third + 3 + (1 + 2 * third)
    return before_second + (1 + 2 * second) + 1 + max(2 + 2 * first, 9), before_second, before_third


def narrow(
    margins: Margins, reach: int, features: Sequence[Tensor], found: Transferred | None
) -> tuple[Margins, list[Tensor], Transferred | None]:
    """Cut margins down to `reach`, of features at the low-quality scale, at twice that and so on, and of what goes
    along.
    """
    left, right, top, bottom = (max(0, margin - reach) for margin in margins)
    height, width = features[0].shape[2:]

    def spans(cell: int) -> tuple[slice, slice]:
        return slice(top * cell, (height - bottom) * cell), slice(left * cell, (width - right) * cell)

    cut = [x[(..., *spans(1 << i))] for i, x in enumerate(features)]
    kept = (margins[0] - left, margins[1] - right, margins[2] - top, margins[3] - bottom)
    return kept, cut, None if found is None else found.part(*spans(1))


def widen(image: Tensor, kept: Margins, margins: Margins) -> Tensor:
    """Zeros where margins were cut off."""
    if kept == margins:
        return image
    return F.pad(image, [4 * (margin - left) for margin, left in zip(margins, kept, strict=True)])


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(channels, channels), conv3(channels, channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.conv2(self.conv1(x).relu_()), alpha=self.scale)


class ShallowFeatures(nn.Module):
    """Features of the low image alone."""

    def __init__(self, channels: int, blocks: nn.Sequential) -> None:
        super().__init__()
        self.conv_head = conv3(3, channels)
        self.RBs = blocks
        self.conv_tail = conv3(channels, channels)

    def forward(self, low: Tensor) -> Tensor:
        x = self.conv_head(low).relu_()
        return x + self.conv_tail(self.RBs(x))


class Exchange2(nn.Module):
    """Sec. 3.3, cross-scale feature integration: each of two scales receives the other, resized."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.conv12, self.conv21 = conv1(c, c), conv3(c, c, stride=2)
        self.conv_merge1, self.conv_merge2 = conv3(2 * c, c), conv3(2 * c, c)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x12 = self.conv12(enlarge(x1, 2)).relu_()
        x21 = self.conv21(x2).relu_()
        return join(self.conv_merge1, x1, x21), join(self.conv_merge2, x2, x12)


class Exchange3(nn.Module):
    """The same between three scales; two steps lead from the finest, x3, down to the coarsest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.conv12, self.conv13, self.conv21 = conv1(c, c), conv1(c, c), conv3(c, c, stride=2)
        self.conv23, self.conv31_1, self.conv31_2 = conv1(c, c), conv3(c, c, stride=2), conv3(c, c, stride=2)
        self.conv32 = conv3(c, c, stride=2)
        self.conv_merge1, self.conv_merge2, self.conv_merge3 = (conv3(3 * c, c) for _ in range(3))

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x12 = self.conv12(enlarge(x1, 2)).relu_()
        x13 = self.conv13(enlarge(x1, 4)).relu_()
        x21 = self.conv21(x2).relu_()
        x23 = self.conv23(enlarge(x2, 2)).relu_()
        x31 = self.conv31_2(self.conv31_1(x3).relu_()).relu_()
        x32 = self.conv32(x3).relu_()
        return (
            join(self.conv_merge1, x1, x21, x31),
            join(self.conv_merge2, x2, x12, x32),
            join(self.conv_merge3, x3, x13, x23),
        )


class MergeTail(nn.Module):
    """All scales at the full size, and from there the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.conv13, self.conv23, self.conv_merge = conv1(c, c), conv1(c, c), conv3(3 * c, c)
        self.conv_tail1, self.conv_tail2 = conv3(c, c // 2), conv1(c // 2, 3)

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        x13 = self.conv13(enlarge(x1, 4)).relu_()
        x23 = self.conv23(enlarge(x2, 2)).relu_()
        x = join(self.conv_merge, x3, x13, x23)
        return self.conv_tail2(self.conv_tail1(x)).clamp(-1, 1)


def join(merge: nn.Module, *x: Tensor) -> Tensor:
    return merge(torch.cat(x, dim=1)).relu_()
