"""`FusionNet`, the network of the model `refnet`: a small ×4 super-resolver that can look at registered references.

    low ─▶ head ─▶ before ─┬────────▶ + ─▶ after ─▶ tail ─▶ pixel shuffle ─▶ + ─▶ restored
                           │          ▲                                      ▲
    clues of a reference ─▶ guide ─▶ value · share           detail · gate · share      enlarged

Everything but the last sum runs on the grid of the low-quality image. A reference arrives registered with the image
(`ragsr.models.alignment`), as `CLUES` maps at output size, which are unshuffled onto that grid. Every reference goes
through the same `guide`; a soft-max over the references and over "none of them" shares the work out at every pixel, so
the number of references is free, their order does not matter, and without any the network is a plain residual
super-resolver.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLUES = 6  # maps per reference: detail (3), difference of luma (1), likeness (1), trust (1)
LEVELS = (8.0, 8.0, 8.0, 8.0, 1.0, 1.0)  # what brings each of them to about one


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), without normalisation, as in EDSR (Lim et al., CVPRW 2017, Sec. 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Guide(nn.Module):
    """What one reference has to say: features to add, how sure it is (a logit), and how much of its detail to take."""

    def __init__(self, channels: int, scale: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(CLUES * scale**2, channels, 3, padding=1)
        self.join = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.value = nn.Conv2d(channels, channels, 3, padding=1)
        self.verdict = nn.Conv2d(channels, 1 + scale**2, 3, padding=1)

    def forward(self, x: Tensor, clues: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, C, h, w], clues [B, CLUES·s², h, w] -> value [B, C, h, w], logit [B, 1, h, w], gate [B, s², h, w]."""
        e = self.body(F.relu(self.join(torch.cat((x, F.relu(self.head(clues))), dim=1))))
        logit, gate = self.verdict(e).split((1, self.verdict.out_channels - 1), dim=1)
        return self.value(e), logit, gate.sigmoid()


class FusionNet(nn.Module):
    """low [B, 3, h, w] in [0, 1], enlarged [B, 3, s·h, s·w], clues each [B, CLUES, s·h, s·w] -> restored and weight.

    `enlarged` is what the network corrects (bicubic, back-projected). The weight [B, 1, s·h, s·w] in [0, 1] says how
    much of the references' detail was taken at a pixel.
    """

    def __init__(
        self, channels: int = 64, before: int = 4, after: int = 4, guide_blocks: int = 2, scale: int = 4
    ) -> None:
        super().__init__()
        self.config = {
            "channels": channels,
            "before": before,
            "after": after,
            "guide_blocks": guide_blocks,
            "scale": scale,
        }
        self.scale = scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.before = nn.Sequential(*(ResidualBlock(channels) for _ in range(before)))
        self.guide = Guide(channels, scale, guide_blocks)
        self.after = nn.Sequential(*(ResidualBlock(channels) for _ in range(after)))
        self.tail = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        for layer in (
            self.tail,
            self.guide.value,
            self.guide.verdict,
        ):  # it begins as: enlarged + a quarter of the detail
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, low: Tensor, enlarged: Tensor, clues: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        first = self.head(low - 0.5)
        x = self.before(first)
        borrowed, detail, weight = self._borrow(x, clues) if clues else (0, 0, torch.zeros_like(enlarged[:, :1]))
        residual = self.tail(self.after(x + borrowed) + first)
        return enlarged + F.pixel_shuffle(residual.float(), self.scale) + detail, weight

    def _borrow(self, x: Tensor, clues: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Over all references: features to add [B, C, h, w], detail to add, and how much of it was taken."""
        levels = x.new_tensor(LEVELS).view(1, CLUES, 1, 1)
        said = [self.guide(x, F.pixel_unshuffle(one * levels, self.scale).to(x.dtype)) for one in clues]
        logits = torch.cat([torch.zeros_like(said[0][1]), *(logit for _, logit, _ in said)], dim=1).float()
        shares = logits.softmax(dim=1)[:, 1:].split(1, dim=1)
        gates = [
            F.pixel_shuffle(gate.float() * share, self.scale) for (_, _, gate), share in zip(said, shares, strict=True)
        ]
        value = sum(share.to(v) * v for (v, _, _), share in zip(said, shares, strict=True))
        detail = sum(gate * one[:, :3] for gate, one in zip(gates, clues, strict=True))
        return torch.as_tensor(value), torch.as_tensor(detail), torch.stack(gates).sum(0)
