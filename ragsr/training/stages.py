"""The training of the second half of iRAG: autoencoder, diffusion, and both stages jointly.

A run keeps in its folder:

    state.safetensors    what learns, its moving average, the moments of AdamW, step and settings
    model/               the moving average as a model for `ragsr restore --model ... --quality rich`, in fp16
    log.csv, curve.png   losses and validation over the steps
    validation.png       held-out photos as they are restored
    examples/            crops with registered references, which take longer to make than to learn from
    encodings/           these as the stage `diffusion` sees them, if the run is long enough for that to save time
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ragsr.errors import InputError
from ragsr.files import replacing
from ragsr.image import save_image, tensor_to_image
from ragsr.metrics import haarpsi, psnr
from ragsr.metrics.features import load_perceptual
from ragsr.models.alignment import enlarge_low
from ragsr.models.refnet import RefNet
from ragsr.models.resample import resize
from ragsr.sheet import Cell, contact_sheet
from ragsr.training.card import write_card
from ragsr.training.encodings import Encodings, make_encodings
from ragsr.training.examples import Batch, Example, Examples, Mix, load_example, make_examples
from ragsr.training.objectives import AutoencoderObjective, DiffusionObjective, PictureLoss, enlarged_photo, signed
from ragsr.training.pairs import SIDE
from ragsr.training.photos import Crops, Photo, degrade, pixels_to_tensor
from ragsr.training.refsr import append_row, last_row
from ragsr.training.run import Run, Settings
from ragsr.training.samples import hold_out
from ragsr.training.sizes import make_scheduler
from ragsr.training.stage_folder import WHAT, Begin, initial_stage, reference_of, replacing_folder, save_stage

STATE = "state.safetensors"
HELD_OUT = 12  # scenes that validate
CHECKS = 12  # examples made of them
SHOWN = 6  # of those in the picture
CHECK_EVERY = 500  # steps
LATENTS = 8  # crops by which the spread of the latent is measured


def train(
    settings: Settings,
    photos: Sequence[Photo],
    out: Path,
    begin: Begin,
    mix: Mix,
    examples: int = 1000,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Train until `settings.steps`, from where `out` stands, else from `begin`. The last row of the log is returned.

    Of several processes the first writes and returns it; the others return nothing.
    """
    place = device or torch.device("cpu")
    torch.manual_seed(settings.seed)  # for what begins with random weights
    seen, held = hold_out(photos, HELD_OUT, settings.seed)
    network = None if begin.perceptual is None else load_perceptual(begin.perceptual)
    picture_loss = PictureLoss(network, settings.perceptual)
    teacher: AutoencoderTraining | DiffusionTraining
    if settings.stage == "autoencoder":
        teacher = AutoencoderTraining(settings, seen, held, begin, picture_loss)
    else:
        teacher = DiffusionTraining(settings, seen, held, begin, picture_loss, mix, examples, out, place)
    run = Run(settings, teacher.objective, place, out)
    if (out / STATE).exists():
        run.resume(out / STATE)
    teacher.stage.to(run.device)
    with tqdm(total=settings.steps, initial=run.step, unit="step", disable=None if run.main else True) as bar:
        told: list[dict[str, float]] = []
        while run.step < settings.steps:
            told.append(run.train_step(teacher.draw))
            bar.update()
            if run.main and (run.step % CHECK_EVERY == 0 or run.step == settings.steps):
                report(run, teacher, told, photos, begin)
                told.clear()
    return last_row(out / "log.csv") if run.main else {}


def report(
    run: Run,
    teacher: "AutoencoderTraining | DiffusionTraining",
    told: Sequence[dict[str, float]],
    photos: Sequence[Photo],
    begin: Begin,
) -> None:
    """Validate, and write all that the folder of a run shows."""
    out, settings = run.out, run.settings
    with run.averaged():
        teacher.measure()
        scores, rows = teacher.validate()
        row = {"step": run.step, **{name: float(np.mean([one[name] for one in told])) for name in told[-1]}, **scores}
        row["rate"] = settings.rate_at(run.step)
        append_row(out / "log.csv", row)
        save_image(contact_sheet(rows[:SHOWN], height=settings.side), out / "validation.png")
        with replacing_folder(out / "model") as folder:
            save_stage(teacher.stage, teacher.reference, folder)
            more = {"sampling_steps": settings.sampling_steps, **teacher.facts}
            write_card(folder, settings, photos, str(begin.init) if begin.init else None, row, WHAT, more)
    draw_curves(out / "log.csv", out / "curve.png")
    run.save(out / STATE)  # last: what was not validated is done again
    tqdm.write(", ".join(f"{name} {value:.5g}" for name, value in row.items()), file=sys.stderr)


# ------------------------------------------------------------------ the stages


class AutoencoderTraining:
    """What `--stage autoencoder` learns from, and how it is judged."""

    def __init__(
        self,
        settings: Settings,
        seen: Sequence[Photo],
        held: Sequence[Photo],
        begin: Begin,
        picture_loss: PictureLoss,
    ) -> None:
        self.settings = settings
        self.facts: dict[str, object] = {}
        self.stage = initial_stage(settings, begin)
        self.reference = RefNet.load(reference_of(begin))
        self.objective = AutoencoderObjective(self.stage, picture_loss, settings.gan)
        self.crops, checks = Crops(seen, settings.side), Crops(held, settings.side)
        self.checks = [checks.draw(1, np.random.default_rng((settings.seed, i))) for i in range(CHECKS)]

    def draw(self, *number: int) -> Batch:
        truth = self.crops.draw(self.settings.batch, np.random.default_rng((self.settings.seed, *number)))
        return {"truth": truth, "low": degrade(truth, 4)}

    def measure(self) -> None:
        """Scale latents to a deviation of one, as the noise has."""
        vae = self.stage.vae
        latents = [vae.encode(signed(x).to(vae.device)).latent_dist.mean for x in self.checks[:LATENTS]]
        vae.register_to_config(scaling_factor=float(1 / torch.cat(latents).std().clamp(min=1e-6)))

    def validate(self) -> tuple[dict[str, float], list[list[Cell]]]:
        """PSNR of held-out crops through the autoencoder, and of photos to which the truth's latent adds detail."""
        scores, rows = Scores(), []
        vae = self.stage.vae
        for truth in self.checks:
            blurred = enlarged_photo(degrade(truth, 4), truth)
            made, before = (
                (vae.decode(vae.encode(signed(x).to(vae.device)).latent_dist.mean).sample.cpu() + 1) / 2
                for x in (truth, blurred)
            )
            shown = {"bicubic": blurred, "through the latent": made, "detail added": blurred + made - before}
            rows.append(scores.row(shown, truth))
        return scores.means(("bicubic", "through the latent", "detail added")), rows


class DiffusionTraining:
    """What `--stage diffusion` and `--stage joint` learn from, and how they are judged."""

    def __init__(
        self,
        settings: Settings,
        seen: Sequence[Photo],
        held: Sequence[Photo],
        begin: Begin,
        picture_loss: PictureLoss,
        mix: Mix,
        examples: int,
        out: Path,
        device: torch.device,
    ) -> None:
        if begin.init is None:
            raise InputError(f"stage {settings.stage} needs --init, the model folder of a run of stage autoencoder")
        self.settings = settings
        self.facts: dict[str, object] = {"examples": examples, "mix": asdict(mix)}
        self.stage = initial_stage(settings, begin)
        self.stage.scheduler = make_scheduler(settings.predicts)
        self.reference = RefNet.load(reference_of(begin))
        self.stage.remember_schedule()
        checks = make_examples(held, mix, CHECKS, out / "examples" / "validation")
        self.checks = [load_example(path) for path in checks]
        paths = make_examples(seen, mix, examples, out / "examples")
        self.objective = DiffusionObjective(
            self.stage,
            self.reference.net,
            settings.stage == "joint",
            settings.alpha,
            picture_loss,
            settings.gan,
            settings.picture,
            settings.sampling_steps if settings.timesteps == "own" else 0,
        ).to(device)
        self.batches: Examples | Encodings
        if settings.stage == "joint" or not encoding_pays(settings, examples):
            self.batches = Examples(paths, settings.side, settings.batch, settings.seed)
        else:  # encoder and reference stage stand still
            half = settings.precision == "bf16"
            paths = make_encodings(self.objective, paths, out / "encodings", settings.seed, half)
            self.batches = Encodings(paths, settings.side, settings.batch, settings.seed)
        if self.stage.config.detail_scale == 1:  # an autoencoder that has seen no reference stage
            self.objective.detail_scale = self.detail_scale(device)
            self.stage.register_to_config(detail_scale=self.objective.detail_scale)

    @torch.no_grad()
    def detail_scale(self, device: torch.device) -> float:
        """What brings the difference between the latents of truth and intermediate result to a deviation of one."""
        drawn = [{name: x.to(device) for name, x in self.draw(0, number).items()} for number in range(LATENTS)]
        encoded = [batch if "z" in batch else self.objective.encoded(batch) for batch in drawn]
        return float(1 / torch.cat([one["z"] - one["z_inter"] for one in encoded]).std().clamp(min=1e-6))

    def draw(self, *number: int) -> Batch:
        return self.batches.draw(*number)

    def measure(self) -> None:
        """Nothing: the autoencoder's latents were measured when it learned."""

    def validate(self) -> tuple[dict[str, float], list[list[Cell]]]:
        """PSNR and HaarPSI of held-out examples by the reference stage, and by both."""
        scores, rows = Scores(), []
        for example in self.checks:
            low, truth = pixels_to_tensor(example.low), pixels_to_tensor(example.truth)
            enlarged, faithful, rich = self.restore(low, example)
            rows.append(scores.row({"bicubic": enlarged, "faithful": faithful, "rich": rich}, truth))
        return scores.means(("bicubic", "faithful", "rich")), rows

    def restore(self, low: Tensor, example: Example) -> tuple[Tensor, Tensor, Tensor]:
        """The photo enlarged, the intermediate result and the last, [1, 3, SIDE, SIDE] each."""
        device = self.stage.device
        clues = torch.from_numpy(example.clues).float()[None].to(device)
        at = low.to(device)
        faithful = self.reference.net(at, enlarge_low(at), (clues,))[0].clamp(0, 1).cpu()
        enlarged = resize(low, (faithful.shape[2], faithful.shape[3])).clamp(0, 1)
        generator = torch.Generator().manual_seed(0)
        steps = self.settings.sampling_steps
        rich = self.stage(enlarged, faithful, num_inference_steps=steps, generator=generator)
        return enlarged, faithful, rich


def encoding_pays(settings: Settings, examples: int) -> bool:
    """Whether to encode all examples whole is no more work than to encode the crops of all steps."""
    crops = settings.steps * settings.accumulate * settings.batch
    return examples * SIDE**2 <= crops * settings.side**2


class Scores:
    """PSNR and HaarPSI of several ways to make a picture."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    def row(self, shown: dict[str, Tensor], truth: Tensor) -> list[Cell]:
        """Judge pictures [1, 3, H, W] of one photo, and show them with the truth."""
        cells: list[Cell] = []
        for name, picture in shown.items():
            made = picture.clamp(0, 1)
            score = psnr(made, truth)
            self.found.setdefault(name, []).append(score)
            self.found.setdefault(f"{name} haarpsi", []).append(haarpsi(made, truth))
            cells.append((tensor_to_image(made), f"{name} {score:.2f} dB"))
        return [*cells, (tensor_to_image(truth), "truth")]

    def means(self, names: Sequence[str]) -> dict[str, float]:
        return {key.replace(" ", "_"): float(np.mean(self.found[key])) for n in names for key in (n, f"{n} haarpsi")}


# ------------------------------------------------------------------ what a run shows


def draw_curves(log: Path, path: Path) -> None:
    """Losses and PSNR over the steps."""
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "rate") and not name.endswith("haarpsi")]
    first = next(name for name in names if name == "bicubic")
    panels = names[: names.index(first)], names[names.index(first) :]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, shown in zip(figure.subplots(1, 2), panels, strict=True):
        for name in shown:
            axes.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], label=name)
        axes.set(xlabel="step")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
