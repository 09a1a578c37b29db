"""The training of hash encoders (`ragsr.codes.hashing`).

    train   the backbone, with a head beside it: features shall find by themselves, see the likenesses a teacher sees,
            and lend themselves to codes
    frozen  a head, on a backbone as it is: the features of every view are computed once

Every number a run draws comes from (seed, step): a run that was stopped goes on where its last checkpoint stands, and
on the CPU ends with the same bits. A run keeps in its folder:

    state.safetensors    weights, the moments of Adam, step and settings
    model/               the best model so far, by hit rates on held-out photos: of features, then of codes
    log.csv, curve.png   losses and validation over the steps; events for TensorBoard where it is installed

Several GPUs: `accelerate launch -m ragsr train hash ...`; every process draws batches of its own.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ragsr.codes.hashing import HIDDEN, SIDE, WIDTH, Backbone, make_head, save_hash
from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.models.loading import load_into
from ragsr.training.checkpoint import (
    distributed,
    give_moments,
    moments_of,
    part,
    read_checkpoint,
    share_at,
    write_checkpoint,
)
from ragsr.training.hash_check import Check, split
from ragsr.training.hash_log import write_row
from ragsr.training.hash_loss import balance, hash_loss, relations, straight_sign, use_of_bits
from ragsr.training.hash_start import Teacher
from ragsr.training.hash_views import Views
from ragsr.training.photos import Photo

STATE, REACHED = "state.safetensors", "reached.json"
LEAST = 8  # scenes
BLOCK = 32  # pictures at a time, where nothing is learned
CHECKS = 6  # validations of a run
CONTRAST_TAU = 0.1  # of the features
# of the losses, as the backbone learns and as a head does
SHARES = {"train": {"hash": 0.3, "contrast": 1.0, "teacher": 1.0}, "frozen": {"hash": 1.0, "codes": 1.0, "bits": 1.0}}


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its photos and what it begins with."""

    bits: int
    backbone: str = "train"  # or frozen
    steps: int = 300
    batch: int = 48  # scenes per step, two views of each
    views: int = 6  # of each photo
    rate: float = 5e-4  # of Adam at its highest, for the backbone
    head_rate: float = 1e-3
    warm_up: int = 30  # steps
    seed: int = 0
    precision: str = "fp32"  # or bf16, under autocast

    def share_at(self, step: int) -> float:
        """Of the highest rate."""
        return share_at(step, self.steps, self.warm_up)


class Net(nn.Module):
    """Backbone and head: pictures to features [B, D] and probabilities of bits [B, bits]."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.backbone = Backbone(WIDTH)
        self.encoder = make_head(self.backbone.size, settings.bits)
        self.frozen = settings.backbone == "frozen"
        self.backbone.requires_grad_(not self.frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x`: pictures float32 [B, 3, S, S], or their features where the backbone is frozen."""
        features = x if self.frozen else self.backbone(x)
        return features.float(), torch.sigmoid(self.encoder(features * math.sqrt(self.backbone.size)).float())

    @torch.no_grad()
    def code(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of ±1 and features of uint8 pictures."""
        features = embed(self.backbone, pictures)
        return straight_sign(torch.sigmoid(self.encoder(features * math.sqrt(self.backbone.size)))), features


class Run:
    """A network in training: its optimiser, and where it stands."""

    def __init__(self, settings: Settings, start: dict[str, Tensor] | None, device: torch.device) -> None:
        self.settings, self.step, self.device = settings, 0, device
        self.best = -1.0
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.net = Net(settings)
        if start is not None:
            load_into(self.net.backbone, start, "the backbone to begin with", optional=("centre",))
        self.net = self.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs
        groups = [{"params": self.net.encoder.parameters(), "highest": settings.head_rate}]
        if not self.net.frozen:
            groups.append({"params": self.net.backbone.parameters(), "highest": settings.rate})
        self.optimiser = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=1e-2)
        self.model, self.rank, self.main = distributed(self.net, self.optimiser)

    def train_step(self, source: "Source") -> dict[str, float]:
        """One step: the losses."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["highest"] * self.settings.share_at(self.step)
        losses = self.losses(*source.draw(self.step, self.rank))
        shares = SHARES[self.settings.backbone]
        loss = torch.stack([shares[name] * value for name, value in losses.items()]).sum()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in losses.items()}}

    def losses(self, bad: Tensor, clean: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        """Of one view made bad and the other clean; `teacher` [2B, D]: what a teacher sees in both, clean."""
        x = torch.cat([bad, clean]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            features, p = self.model(x)
        one, other = p.chunk(2)
        found = {"hash": hash_loss(one, other)}
        if self.net.frozen:
            codes = straight_sign(p)
            return found | {"codes": relations(F.normalize(codes, dim=1), features), "bits": use_of_bits(codes)}
        found["contrast"] = contrast(*features.chunk(2))
        if teacher is not None:
            found["teacher"] = relations(features, teacher.to(self.device))
        return found

    def save(self, path: Path) -> None:
        """Write the checkpoint; nothing half-written is ever seen."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= moments_of(self.optimiser, dict(self.net.named_parameters()))
        write_checkpoint(path, tensors, self.settings, step=self.step, best=self.best)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same settings; `InputError` says which differ."""
        tensors, notes = read_checkpoint(path, self.settings)
        load_into(self.net, part(tensors, "net."), str(path))
        self.step, self.best = int(notes["step"]), float(notes["best"])
        give_moments(self.optimiser, dict(self.net.named_parameters()), tensors, self.step)


def contrast(one: Tensor, other: Tensor) -> Tensor:
    """The features of a bad view [B, D] shall find the clean view of their scene among the batch, and the other way."""
    likeness = one @ other.T / CONTRAST_TAU
    right = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2


@torch.no_grad()
def embed(net: nn.Module, pictures: Tensor, block: int = BLOCK) -> Tensor:
    """The features of uint8 pictures [n, 3, S, S], a block at a time."""
    device = next(net.parameters()).device
    blocks = (x.to(device, torch.float32).div(255) for x in pictures.split(block))
    return torch.cat([net(x.contiguous(memory_format=torch.channels_last)).cpu() for x in blocks]).to(device)


# ------------------------------------------------------------------ what a step sees


class Source:
    """The batches of a run; what a teacher, or a frozen backbone, makes of a view is computed once."""

    def __init__(self, views: Views, batch: int, frozen: nn.Module | None, teacher: Teacher | None) -> None:
        self.views, self.batch, self.frozen, self.teacher = views, batch, frozen, teacher
        self.known: dict[tuple[int, int, bool], Tensor] = {}

    def draw(self, step: int, rank: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """One view made bad and the other clean, as pictures or features, and what the teacher sees in both."""
        pairs = self.views.draw(self.batch, (step, rank))
        ones, others = [one for one, _ in pairs], [other for _, other in pairs]
        if self.frozen is not None:
            return self._features(ones, self.frozen, bad=True), self._features(others, self.frozen), None
        bad = torch.stack([torch.from_numpy(self.views.view(*key).bad) for key in ones])
        clean = torch.stack([torch.from_numpy(self.views.view(*key).clean) for key in others])
        seen = None if self.teacher is None else self._features([*ones, *others], self.teacher)
        return floats(bad), floats(clean), seen

    def _features(self, keys: Sequence[tuple[int, int]], net: nn.Module, bad: bool = False) -> Tensor:
        new = [key for key in dict.fromkeys(keys) if (*key, bad) not in self.known]
        if new:
            views = [self.views.view(*key) for key in new]
            pictures = torch.stack([torch.from_numpy(view.bad if bad else view.clean) for view in views])
            # one by one: the last bits may depend on the block, and a resumed run meets views in other company
            for key, x in zip(new, embed(net, pictures.permute(0, 3, 1, 2), block=1).split(1), strict=True):
                self.known[(*key, bad)] = x
        return torch.cat([self.known[(*key, bad)] for key in keys])


def floats(pixels: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S], channels last."""
    return pixels.permute(0, 3, 1, 2).float().div(255)


# ------------------------------------------------------------------ the loop


class Material:
    """What several runs on the same photos share: their views, and what checks them."""

    def __init__(self, photos: Sequence[Photo], views: int, seed: int, batch: int) -> None:
        seen, held = split(photos, seed)
        check_sizes(batch, seen, held)
        self.views = Views(seen, SIDE, views, seed)
        self.check = Check(held, seen, SIDE, seed)
        self.scenes = len(self.views.scenes)


def train(
    settings: Settings,
    material: Material,
    out: Path,
    start: dict[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train until `settings.steps`, from where `out` stands, else with the backbone `start`, else from nothing.

    Returns what the best model reached and how good its scores are; it lies in `out / "model"`.
    """
    run = Run(settings, start, device or torch.device("cpu"))
    if (out / STATE).exists():
        run.resume(out / STATE)
    elif "centre" not in (start or {}):
        run.net.backbone.centre.data = embed(run.net.backbone.net, material.views.firsts()).mean(0)
    if teacher is not None:
        teacher.fit(embed(teacher.to(run.device).net, material.views.firsts()))
    source = Source(material.views, settings.batch, run.net.backbone if run.net.frozen else None, teacher)
    every = max(1, settings.steps // CHECKS)
    with tqdm(total=settings.steps, initial=run.step, unit="step", disable=None if run.main else True) as bar:
        while run.step < settings.steps:
            losses = run.train_step(source)
            bar.update()
            if run.main and (run.step % every == 0 or run.step == settings.steps):
                report(run, material.check, losses, out)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # whoever goes on reads what one process writes
    reached: dict[str, Any] = json.loads((out / REACHED).read_text()) if run.main else {}
    return reached


def check_sizes(batch: int, seen: Sequence[Photo], held: Sequence[Photo]) -> None:
    scenes = len({photo.scene for photo in seen})
    if scenes + len({photo.scene for photo in held}) < LEAST:
        raise InputError(f"{len(seen) + len(held)} photos are too few: at least {LEAST} scenes are needed")
    if batch > scenes:
        raise InputError(
            f"the batch of {batch} is larger than the {scenes} scenes to learn from (a quarter of all is held "
            f"out); ask for --batch {scenes} or less, or add photos"
        )


def report(run: Run, check: Check, losses: dict[str, float], out: Path) -> None:
    """Validate, keep the model if it is the best, and write all that the folder of a run shows."""
    run.net.eval()
    measured = check.measure(run.net.code) | balance(run.net.code(check.candidates)[0].cpu())
    row = {"step": run.step, **losses, **measured}
    judged = "code" if run.net.frozen else "float"
    merit = measured[f"hit@1_{judged}"] + measured[f"hit@5_{judged}"]
    if merit > run.best:
        run.best = merit
        fits = check.calibrate(run.net.code)
        config = {"bits": run.settings.bits, "width": WIDTH, "hidden": HIDDEN, "side": SIDE}
        config |= {"score": fits.pop("score"), "threshold": 0.5}
        save_hash(out / "model", run.net.backbone, run.net.encoder, config, torch.float16)
        with replacing(out / REACHED) as temporary:
            temporary.write_text(json.dumps({**row, **fits}, indent=2) + "\n")
    write_row(out, row)
    run.save(out / STATE)
    run.net.train()
    tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)
