"""Weights between those a backbone began with and those it came to.

A few hundred photos teach a network what bad copies look like, and it forgets some of what a million taught it before.
On the straight line between the two networks lie ones that know both:

    θ = (1 − share) · θ_begun + share · θ_trained

The share is chosen on held-out photos, as the checkpoint was.

Source: M. Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, Eq. 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ragsr.codes.hashing import WIDTH, Backbone
from ragsr.training.hash import Material, embed

SHARES = (0.25, 0.5, 0.75, 1.0)


def blend(
    begun: Mapping[str, Tensor], trained: Mapping[str, Tensor], material: Material, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The best backbone on the line, and per share what it reached: hit rate at 1 plus that at 5, by features.

    The mean of the features moves with the weights and is taken anew.
    """
    found = {share: between(begun, trained, share, material, device) for share in SHARES}
    merits = {share: merit(backbone, material) for share, backbone in found.items()}
    best = max(SHARES, key=lambda share: merits[share])  # of equals the one that moved least
    return found[best].state_dict(), {str(share): round(value, 4) for share, value in merits.items()} | {"chosen": best}


def between(
    begun: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float, material: Material, device: torch.device
) -> Backbone:
    backbone = Backbone(WIDTH).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs
    weights = {
        name: torch.lerp(begun.get(name, x).float().to(x.device), x.float(), share) for name, x in trained.items()
    }
    backbone.load_state_dict(weights)
    backbone.centre.data = embed(backbone.net, material.views.firsts()).mean(0)
    return backbone


def merit(backbone: Backbone, material: Material) -> float:
    def code(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = embed(backbone, pictures)
        return F.normalize(features, dim=1).sign(), features  # the codes are not judged

    measured = material.check.measure(code)
    return measured["hit@1_float"] + measured["hit@5_float"]
