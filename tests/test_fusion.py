"""FusionNet: any number of references in any order, nothing taken beyond their detail, and a bounded reach."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from ragsr.models.fusion import CLUES, FusionNet

MOST_PARAMETERS = 1_500_000
MOST_REACH = 26  # low-quality pixels, as `RefNet` says it
FOUND_REACH = 24  # at the default depth: head 1, before 8, join 1, guide 4, value 1, after 8, tail 1


def small(**config: int) -> FusionNet:
    """As it is before training."""
    torch.manual_seed(0)
    return FusionNet(**{"channels": 6, "before": 1, "after": 1, "guide_blocks": 1, **config})


def lively(level: float = 0.3, **config: int) -> FusionNet:
    """As if trained: the layers that begin at zero hold random numbers too."""
    net = small(**config)
    with torch.no_grad():
        for x in net.parameters():
            if not x.any():
                x.normal_(0, level)
    return net


def inputs(references: int, h: int = 9, w: int = 7, scale: int = 4) -> tuple[Tensor, Tensor, list[Tensor]]:
    """low, enlarged and the clues of several references, noise of about the usual sizes."""
    random = torch.Generator().manual_seed(1)
    low = torch.rand(1, 3, h, w, generator=random)
    enlarged = torch.rand(1, 3, scale * h, scale * w, generator=random)
    return (
        low,
        enlarged,
        [0.3 * torch.randn(1, CLUES, *enlarged.shape[2:], generator=random) for _ in range(references)],
    )


# ------------------------------------------------------------------ before training


@pytest.mark.parametrize(("references", "share"), [(0, 0), (1, 1 / 4), (2, 1 / 6)])
def test_begins_as_enlarged_and_a_share_of_the_detail(references, share):
    """The gates stand at a half; the references and "none of them" share equally."""
    low, enlarged, clues = inputs(references)
    restored, weight = small()(low, enlarged, clues)
    wanted = enlarged + share * sum(one[:, :3] for one in clues)
    torch.testing.assert_close(restored, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(weight, torch.full_like(weight, share * references), rtol=0, atol=1e-6)


def test_default_size():
    assert sum(x.numel() for x in FusionNet().parameters()) <= MOST_PARAMETERS


# ------------------------------------------------------------------ references


@torch.no_grad()
def test_without_references_the_guide_is_not_asked():
    net = lively()
    low, enlarged, _ = inputs(0)
    restored, weight = net(low, enlarged)
    for x in net.guide.parameters():
        x.fill_(torch.nan)
    for clues in ((), []):
        assert torch.equal(net(low, enlarged, clues)[0], restored)
    assert restored.isfinite().all()
    assert not torch.equal(restored, enlarged)
    assert weight.shape == (1, 1, 36, 28)
    assert (weight == 0).all()


@torch.no_grad()
def test_the_order_of_references_does_not_matter():
    net = lively()
    low, enlarged, clues = inputs(3)
    wanted = net(low, enlarged, clues)
    for order in permutations(clues):
        for found, one in zip(net(low, enlarged, order), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_reference_counts():
    net = lively()
    low, enlarged, clues = inputs(3)
    whole = net(low, enlarged, clues)[0]
    for i in range(3):
        assert (net(low, enlarged, clues[:i] + clues[i + 1 :])[0] - whole).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_a_reference_make_it_surer_and_no_stronger(copies):
    """Of its detail no more is taken than all of it."""
    net = lively()
    for x in (*net.tail.parameters(), *net.guide.value.parameters()):
        x.zero_()
    low, enlarged, clues = inputs(1)
    restored, weight = net(low, enlarged, clues * copies)
    torch.testing.assert_close(restored, enlarged + weight * clues[0][:, :3], rtol=0, atol=1e-5)
    once = net(low, enlarged, clues)[1]
    assert (once <= weight).all()
    assert (weight <= copies * once).all()
    assert (weight <= 1).all()


@torch.no_grad()
@pytest.mark.parametrize("references", [1, 2, 4])
@pytest.mark.parametrize("level", [0.3, 30])
def test_the_weight_is_a_share(references, level):
    low, enlarged, clues = inputs(references)
    weight = lively(level)(low, enlarged, clues)[1]
    assert weight.shape == (1, 1, 36, 28)
    assert 0 <= weight.min() <= weight.max() <= 1 + 1e-6
    assert weight.max() - weight.min() > 0.2  # it depends on what the references show


@torch.no_grad()
def test_other_scales():
    low, enlarged, clues = inputs(2, scale=2)
    restored, weight = lively(scale=2)(low, enlarged, clues)
    assert restored.shape == (1, 3, 18, 14)
    assert weight.shape == (1, 1, 18, 14)


# ------------------------------------------------------------------ training, tiles


def test_gradients_reach_every_parameter():
    net = lively(0.05)
    low, enlarged, clues = inputs(2)
    net(low, enlarged, clues)[0].square().mean().backward()
    assert [name for name, x in net.named_parameters() if x.grad is None or not x.grad.any()] == []


def test_a_pixel_reaches_no_further_than_said():
    """The gradient of one low-quality pixel's restored ones shows all that they depend on."""
    net = lively(channels=6, before=4, after=4, guide_blocks=2).double()
    low, enlarged, clues = (x.double() if isinstance(x, Tensor) else [y.double() for y in x] for x in inputs(1, 80, 80))
    low.requires_grad_()
    net(low, enlarged, clues)[0][..., 160:164, 160:164].sum().backward()
    seen = low.grad.abs().sum((0, 1)).nonzero() - 40  # [n, 2]
    assert int(seen.abs().max()) == FOUND_REACH <= MOST_REACH


@torch.no_grad()
def test_runs_in_bfloat16():
    """The image and the weight stay float32; only what the layers compute is rounded."""
    net = lively(0.1)
    low, enlarged, clues = inputs(2)
    wanted = net(low, enlarged, clues)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(low, enlarged, clues)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)  # bfloat16 keeps 8 bits
        assert not torch.equal(a, b)
