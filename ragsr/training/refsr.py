"""The training of `refnet`, in two stages.

    base       crops alone: a plain super-resolver
    reference  the same network, half of the samples with registered references (`ragsr.training.pairs`)

Every number a run draws comes from (seed, step): a run that was stopped goes on where its last checkpoint stands, and
sees what it would have seen. A run keeps in its folder:

    state.safetensors    weights, their moving average, the moments of Adam (bfloat16), step and settings
    model/               the moving average as a model that `ragsr restore --model` takes
    log.csv, curve.png   loss and validation over the steps
    validation.png       held-out samples: bicubic, without and with reference, truth
    pairs/               the registered pairs, which take longer to make than to learn from
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ragsr.files import replacing
from ragsr.image import save_image, tensor_to_image
from ragsr.metrics import psnr
from ragsr.models.alignment import enlarge_low
from ragsr.models.fusion import FusionNet
from ragsr.models.loading import load_into
from ragsr.models.refnet import save_model
from ragsr.models.registration import luma
from ragsr.models.resample import resize
from ragsr.sheet import Cell, contact_sheet
from ragsr.training.checkpoint import give_moments, moments_of, part, read_checkpoint, share_at, write_checkpoint
from ragsr.training.pairs import SIDE, Pair, PairMaker, load_pair, make_pairs
from ragsr.training.photos import Photo, degrade, pixels_to_tensor
from ragsr.training.samples import Batch, Samples, hold_out

STATE = "state.safetensors"
HELD_OUT = 12  # scenes that validate
CHECKS = 24  # pairs made of them
SHOWN = 6  # of those in the picture
CHECK_EVERY = 500  # steps
CLIP = 4.0  # norm of a gradient; it is mostly below 2
AVERAGE = 0.999  # decay of the moving average, reached as the run goes on
NEGLIGIBLE = 1e-5  # squared error: 50 dB
RGB_SHARE = 0.25  # of the loss on RGB beside that on luma, which is what eyes and PSNR look at


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its photos."""

    stage: str
    steps: int
    batch: int = 8  # crops per step
    side: int = 192  # of a crop, at output size
    rate: float = 8e-4  # of Adam at its highest
    warm_up: int = 200  # steps
    seed: int = 0
    pairs: int = 0  # to learn from, in the stage `reference`
    precision: str = "bf16"  # under autocast, or fp32
    kept: float = 0.0  # share of the weights it began with in the model that comes out

    def rate_at(self, step: int) -> float:
        return self.rate * share_at(step, self.steps, self.warm_up)


class Run:
    """A network in training: its optimiser, its moving average, and where it stands."""

    def __init__(self, settings: Settings, net: FusionNet, device: torch.device) -> None:
        self.settings, self.step, self.device = settings, 0, device
        self.net: FusionNet = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # a gap of the stubs
        self.average = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self.start = {name: value.clone() for name, value in self.average.items()}
        self.optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One step of Adam on all batches together, each weighted by its size: the loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self.optimiser.zero_grad()
        whole = sum(len(truth) for truth, _ in batches)
        total = 0.0
        for truth, clues in batches:
            loss = self.loss(truth, clues) * len(truth) / whole
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return total

    def loss(self, truth: Tensor, clues: tuple[Tensor, ...]) -> Tensor:
        truth, clues = truth.to(self.device), tuple(one.to(self.device) for one in clues)
        low = degrade(truth, self.net.scale)
        enlarged = enlarge_low(low, self.net.scale)
        with torch.autocast(low.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            restored, _ = self.net(low.contiguous(memory_format=torch.channels_last), enlarged, clues)
        return distance(restored, truth)

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(AVERAGE, (1 + self.step) / (10 + self.step))
        for name, value in self.net.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Weights of another run or of a shipped model, instead of random ones."""
        load_into(self.net, weights, "the weights to begin with")
        self.start = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.average = {name: value.clone() for name, value in self.start.items()}

    def averaged(self) -> FusionNet:
        """The moving average as a network of its own, with as much of the weights it began with as `kept` says.

        Source: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, Eq. 1.
        """
        net, kept = FusionNet(**self.net.config), self.settings.kept
        net.load_state_dict({name: value.lerp(self.start[name], kept) for name, value in self.average.items()})
        return net.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint; nothing half-written is ever seen."""
        named = dict(self.net.named_parameters())
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= moments_of(self.optimiser, named, torch.bfloat16)
        write_checkpoint(path, tensors, self.settings, step=self.step)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same settings; `InputError` says which differ."""
        tensors, notes = read_checkpoint(path, self.settings)
        self.step = int(notes["step"])
        load_into(self.net, part(tensors, "net."), str(path))
        self.average = {name: x.to(self.device) for name, x in part(tensors, "average.").items()}
        give_moments(self.optimiser, dict(self.net.named_parameters()), tensors, self.step)


def distance(restored: Tensor, truth: Tensor) -> Tensor:
    """The mean over the batch of the logarithm of the squared error, of luma and, for a share, of RGB.

    It is PSNR up to a factor, so that an easy photo counts as much as a hard one.
    Source: Chen et al., HINet, CVPRW 2021, Sec. 3.3.
    """
    error = (restored - truth).square().mean((1, 2, 3))
    error_luma = luma(restored - truth).square().mean((1, 2, 3))
    return ((error_luma + NEGLIGIBLE).log() + RGB_SHARE * (error + NEGLIGIBLE).log()).mean()


# ------------------------------------------------------------------ validation


@torch.no_grad()
def validate(net: FusionNet, pairs: Iterable[Pair]) -> tuple[dict[str, float], list[list[Cell]]]:
    """PSNR on held-out pairs, without and with references, and the pictures. What no pair tells is NaN."""
    scores: dict[str, list[float]] = {name: [] for name in ("bicubic", "none", "gain_same", "gain_other")}
    rows = []
    for pair in pairs:
        truth = pixels_to_tensor(pair.truth)
        low = degrade(truth, net.scale)
        enlarged = enlarge_low(low, net.scale)
        kind = "same" if "same" in pair.kinds else "other"
        label = {"same": "with true reference", "other": "with wrong reference"}[kind]
        clues = tuple(torch.from_numpy(pair.clues).float()[:, None])
        shown = {
            "bicubic": resize(low, (truth.shape[2], truth.shape[3])),
            "without reference": net(low, enlarged)[0],
            label: net(low, enlarged, clues)[0],
        }
        found = {name: psnr(picture.clamp(0, 1), truth) for name, picture in shown.items()}
        gain = found[label] - found["without reference"]
        scores["bicubic"].append(found["bicubic"])
        scores["none"].append(found["without reference"])
        scores[f"gain_{kind}"].append(gain)
        rows.append([(tensor_to_image(x), f"{name} {found[name]:.2f} dB") for name, x in shown.items()])
        rows[-1].append((tensor_to_image(truth), "truth"))
    return {name: float(np.mean(values)) if values else np.nan for name, values in scores.items()}, rows


# ------------------------------------------------------------------ the loop


def train(
    settings: Settings,
    photos: Sequence[Photo],
    out: Path,
    start: dict[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Train until `settings.steps`, from where `out` stands, else from the weights `start`, else from nothing.

    The last row of the log is returned.
    """
    seen, held = hold_out(photos, HELD_OUT, settings.seed)
    run = Run(settings, FusionNet(), device or torch.device("cpu"))
    if start is not None:
        run.begin_with(start)
    if (out / STATE).exists():
        run.resume(out / STATE)
    checks = make_pairs(PairMaker(held, settings.seed + 1), CHECKS, out / "pairs" / "validation")
    pairs = make_pairs(PairMaker(seen, settings.seed), settings.pairs, out / "pairs") if settings.pairs else []
    samples = Samples(settings.side, settings.batch, settings.seed, seen, pairs)
    with tqdm(total=settings.steps, initial=run.step, unit="step", disable=None) as bar:
        losses: list[float] = []
        while run.step < settings.steps:
            losses.append(run.train_step(samples.draw(run.step)))
            bar.update()
            if run.step % CHECK_EVERY == 0 or run.step == settings.steps:
                report(run, checks, float(np.mean(losses)), out)
                losses.clear()
    return last_row(out / "log.csv")


def report(run: Run, checks: Sequence[Path], loss: float, out: Path) -> None:
    """Validate, and write all that the folder of a run shows."""
    net = run.averaged()
    scores, rows = validate(net, map(load_pair, checks))
    row = {"step": run.step, "loss": loss, "rate": run.settings.rate_at(run.step), **scores}
    append_row(out / "log.csv", row)
    draw_curve(out / "log.csv", out / "curve.png")
    save_image(contact_sheet(rows[:SHOWN], height=SIDE), out / "validation.png")
    save_model(out / "model", net)
    run.save(out / STATE)
    tqdm.write(", ".join(f"{name} {value:.5g}" for name, value in row.items()), file=sys.stderr)


def last_row(log: Path) -> dict[str, float]:
    """What the last row knows."""
    with open(log, newline="") as file:
        found = {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def append_row(path: Path, row: dict[str, float]) -> None:
    """One more line of a CSV file, which begins with the names of its columns; steps that are redone replace theirs."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerows([*rows, {name: f"{value:.6g}" for name, value in row.items()}])


def draw_curve(log: Path, path: Path) -> None:
    """Loss and validation over the steps."""
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (["loss"], ""), (["none", "bicubic"], "dB"), (["gain_same", "gain_other"], "dB")
    for axes, (names, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(xlabel="step", ylabel=unit)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
