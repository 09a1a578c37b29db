"""The adversarial loss of iRAG's Eq. 6: a critic learns to tell made pictures from true ones, patch by patch.

Both losses come from one pass and serve one step of one optimiser: what the made picture learns goes through a copy of
the critic that stands still, and the critic sees the made picture as a constant.

Source: Isola et al., Image-to-Image Translation with Conditional Adversarial Networks, CVPR 2017, Sec. 3.2.2 (patches);
the hinge loss: Lim and Ye, Geometric GAN, 2017, Eq. 8 and 9.
"""

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

WIDTHS = (32, 64, 128)
LEAK = 0.2


class PatchCritic(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> how true every patch looks, [B, 1, H/8, W/8]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def adversarial(critic: PatchCritic, made: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, 3, H, W] twice: what `made` shall lower, [B], and what the critic shall, []."""
    still = {name: x.detach() for name, x in critic.named_parameters()}
    for_made = -functional_call(critic, still, (made,)).float().mean((1, 2, 3))
    looks_true, looks_made = critic(truth).float(), critic(made.detach()).float()
    return for_made, (F.relu(1 - looks_true).mean() + F.relu(1 + looks_made).mean()) / 2
