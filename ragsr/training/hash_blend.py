"""The mean of the weights that a backbone began with and those it came to.

A few hundred photos teach a network what bad copies look like, and it forgets some of what a million taught it before.
On the straight line between the two networks lie ones that know both; the middle is a good choice where nothing like
the photos to come is at hand to choose by. Held-out photos are not like them: their queries are made as the training
made its own, and favour the trained end.

Source: M. Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, Eq. 1 and Sec. 4.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ragsr.codes.hashing import WIDTH, Backbone
from ragsr.training.hash import embed

SHARE = 0.5  # of the trained weights


def blend(
    begun: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    pictures: Tensor,  # uint8 [n, 3, S, S]
    device: torch.device,
) -> dict[str, Tensor]:
    """The weights in the middle, with the mean of the features of `pictures`, which moves with the weights."""
    backbone = Backbone(WIDTH).eval()
    first = {name: begun.get(name, x).float().to(x.device) for name, x in trained.items()}  # a MobileNet has no centre
    backbone.load_state_dict({name: torch.lerp(first[name], x.float(), SHARE) for name, x in trained.items()})
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # a gap of the stubs
    backbone.centre.data = embed(backbone.net, pictures).mean(0)
    return backbone.state_dict()
