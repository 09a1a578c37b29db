"""The training of the gate of `auto`: how much of `refnet-real` a photo needs.

Both models are asked once about every example, with its reference and without. Against the truth t the squared error of
(1 - s) · a + s · b is a parabola in the share s:

    mean (a - t)² + 2 s · mean (b - a)(a - t) + s² · mean (b - a)²

so three numbers are all that the gate needs to know of an example beside the photo. It learns the share where the
logarithm of the error, which is PSNR up to a factor, is least, by cross-entropy; an example weighs as much as the wrong
model would cost. A run keeps in its folder:

    examples/   photos made bad, from not at all to second order, with registered references
    model/      the gate, with a card
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ragsr.models.alignment import enlarge_low
from ragsr.models.auto import SURE, Gate, save_gate
from ragsr.models.refnet import REAL, RefNet
from ragsr.models.registration import luma
from ragsr.training.checkpoint import share_at
from ragsr.training.examples import SCALE, Example, Mix, load_example, make_examples
from ragsr.training.pairs import SIDE
from ragsr.training.photos import Photo, pixels_to_tensor, turned
from ragsr.training.refsr import HELD_OUT, NEGLIGIBLE
from ragsr.training.samples import hold_out

MIX = Mix(degradation="graded", retrieved=0.2, random=0.1)  # most references show what the photo shows
CHECKS = 120  # examples of held-out photos
PART = SIDE // 2  # of an example both models are asked about its middle
CROP = 48  # pixels of a bad photo, at a step
WARM_UP = 50  # steps
AVERAGE = 0.99  # decay of the moving average
CLEAN, BAD = 0.0, 1.0  # the shares of one model alone
HEAVIEST = 3.0  # of an example, times the mean


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its photos and the two models."""

    steps: int
    batch: int = 32
    rate: float = 1e-2  # of Adam at its highest
    pairs: int = 1000  # examples to learn from
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """Examples, and how both models did."""

    low: Tensor  # [N, 3, SIDE / 4, SIDE / 4]
    parabolas: Tensor  # [N, 2, 3], with reference and without: constant, half of the slope, curvature

    def errors(self, share: Tensor) -> Tensor:
        """[N] -> the squared errors [N, 2]."""
        constant, slope, curvature = self.parabolas.unbind(-1)
        s = share[:, None]
        return constant + 2 * s * slope + s.square() * curvature

    def best(self) -> Tensor:
        """The share of the least error, of both parabolas together [N]."""
        slope, curvature = self.parabolas[..., 1:].sum(1).unbind(-1)
        return (-slope / curvature.clamp_min(1e-12)).clamp(0, 1)

    def stake(self) -> Tensor:
        """What the worse model costs, in the logarithm of the error [N]."""
        ends = [(self.errors(torch.full((len(self.low),), one)) + NEGLIGIBLE).log().mean(1) for one in (CLEAN, BAD)]
        return (ends[0] - ends[1]).abs()

    def psnr(self, share: Tensor) -> float:
        """The mean over examples, with reference and without, in dB of luma."""
        return float(-10 * self.errors(share).clamp_min(1e-9).log10().mean())


def train(settings: Settings, photos: Sequence[Photo], out: Path, device: torch.device) -> dict[str, float]:
    """Train the gate and write it: the PSNR in dB of luma that is reached on photos that were held out."""
    seen, held = hold_out(photos, HELD_OUT, settings.seed)
    folder, mix = out / "examples", replace(MIX, seed=settings.seed)
    checks = ask(make_examples(held, mix, CHECKS, folder / "validation"), device)
    learn = ask(make_examples(seen, mix, settings.pairs, folder), device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        gate = Gate().to(device)
    average = AveragedModel(gate, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimiser = torch.optim.Adam(gate.parameters())
    usual = learn.stake().mean()
    with tqdm(range(settings.steps), unit="step", disable=None) as bar:
        for step in bar:
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * share_at(step, settings.steps, WARM_UP)
            batch = draw(learn, settings, step)
            logit = gate.logit(batch.low.to(device)).cpu()
            loss = F.binary_cross_entropy_with_logits(logit, batch.best(), batch.stake().div(usual).clamp_max(HEAVIEST))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update_parameters(gate)
            bar.set_postfix(loss=f"{loss.item():.3f}")
    gate.load_state_dict(average.module.state_dict())
    save_gate(out / "model", gate.cpu())
    return {"step": float(settings.steps), **reached(gate, checks)}


@torch.no_grad()
def ask(paths: Sequence[Path], device: torch.device) -> Asked:
    """Both models as they ship about every example."""
    models = [RefNet.load().net.to(device), RefNet.load(REAL).net.to(device)]
    lows, parabolas = [], []
    for path in tqdm(paths, unit="example", desc="asking both models", file=sys.stderr, disable=None):
        example = load_example(path)
        lows.append(pixels_to_tensor(example.low))
        parabolas.append(torch.stack([parabola(models, example, told, device) for told in (True, False)]))
    return Asked(torch.cat(lows), torch.stack(parabolas))


def parabola(models: Sequence[torch.nn.Module], example: Example, told: bool, device: torch.device) -> Tensor:
    """[3], of the middle of an example."""
    fine = slice((SIDE - PART) // 2, (SIDE + PART) // 2)
    coarse = slice(fine.start // SCALE, fine.stop // SCALE)
    low, truth = (pixels_to_tensor(x).to(device) for x in (example.low[coarse, coarse], example.truth[fine, fine]))
    clues = [torch.from_numpy(example.clues[:, fine, fine]).float()[None].to(device)] if told else []
    clean, bad = (luma(model(low, enlarge_low(low, SCALE), clues)[0].clamp(0, 1)) for model in models)
    error, step = clean - luma(truth), bad - clean
    return torch.stack([error.square().mean(), (step * error).mean(), step.square().mean()]).cpu()


def draw(asked: Asked, settings: Settings, step: int) -> Asked:
    """The batch of a step: examples cropped, and laid down in one of eight ways."""
    generator = np.random.default_rng((settings.seed, step))
    chosen = generator.integers(len(asked.low), size=settings.batch)
    places = generator.integers(asked.low.shape[-1] - CROP + 1, size=(settings.batch, 2))
    lows = [
        turned(asked.low[i, :, top : top + CROP, left : left + CROP], int(generator.integers(8)))
        for i, (top, left) in zip(chosen, places, strict=True)
    ]
    return Asked(torch.stack(lows), asked.parabolas[chosen])


@torch.no_grad()
def reached(gate: Gate, checks: Asked) -> dict[str, float]:
    """PSNR of both models alone, of what the gate chooses, and of the better of both for each example."""
    share = torch.cat([gate(low[None]) for low in checks.low])
    used = torch.where(share < SURE, CLEAN, torch.where(share > 1 - SURE, BAD, share))
    alone = [torch.full_like(share, one) for one in (CLEAN, BAD)]
    better = torch.minimum(*(checks.errors(one) for one in alone))
    return {
        "refnet": checks.psnr(alone[0]),
        "refnet-real": checks.psnr(alone[1]),
        "auto": checks.psnr(used),
        "the better of both": float(-10 * better.clamp_min(1e-9).log10().mean()),
    }
