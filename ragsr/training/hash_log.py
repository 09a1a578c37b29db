"""The log of a hash training: a table, a picture of its curves, and events where TensorBoard is installed."""

import csv
from pathlib import Path

from ragsr.files import replacing
from ragsr.training.refsr import append_row

PANELS = (("loss",), ("hit@1_code", "hit@5_code", "hit@1_float"), ("bits_off", "bits_tied"))


def write_row(out: Path, row: dict[str, float]) -> None:
    """One more row of `log.csv`, `curve.png` anew, and scalars under `events/`."""
    append_row(out / "log.csv", row)
    draw_curve(out / "log.csv", out / "curve.png")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return  # log.csv holds the same
    with SummaryWriter(str(out / "events")) as writer:
        for name, value in row.items():
            writer.add_scalar(name.replace("@", "_at_"), value, int(row["step"]))


def draw_curve(log: Path, path: Path) -> None:
    """Loss, hit rates and the use of bits over the steps."""
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for name in names:
            axes.plot(steps, [float(row[name]) for row in rows], label=name)
        axes.set(xlabel="step")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
