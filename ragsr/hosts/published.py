"""Networks from published weights: nothing is left out, nothing is filled with random numbers."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from ragsr.models.loading import check_weights

Net = TypeVar("Net", bound=nn.Module)


def filled(network: Net, weights: dict[str, Tensor], what: str, dtype: torch.dtype) -> Net:
    """A network that was built on the meta device, so that it never had other weights than these.

    Raises `InputError` with the first name that is missing or not expected, or the first wrong shape.
    """
    check_weights(what, network, weights)
    network.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)
