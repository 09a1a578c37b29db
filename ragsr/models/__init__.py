"""The restoration models: each turns a low-quality image and prepared references into a restored one."""

from collections.abc import Callable
from pathlib import Path

from ragsr.errors import InputError
from ragsr.models.auto import Auto
from ragsr.models.loading import SUFFIXES, read_folder
from ragsr.models.refnet import REAL, RefNet
from ragsr.models.transfer import Transfer
from ragsr.models.ttsr import TTSR
from ragsr.models.views import PreparedReferences

__all__ = ["TTSR", "Auto", "PreparedReferences", "RefNet", "Transfer", "load_model"]

DEFAULT, REAL_NAME = Auto.name, "refnet-real"
SHIPPED: dict[str, Callable[[int], Auto | RefNet | Transfer]] = {
    Auto.name: lambda scale: Auto.load(scale=scale),
    RefNet.name: lambda scale: RefNet.load(scale=scale),
    REAL_NAME: lambda scale: RefNet.load(REAL, scale=scale),
    Transfer.name: Transfer,
}


def load_model(name_or_path: str | Path = DEFAULT, scale: int = 4) -> Auto | RefNet | Transfer | TTSR:
    """A restoration model, for that scale.

        load_model("auto")               what ships: of the next two the one that suits the photo
        load_model("refnet")             for photos that were only reduced
        load_model("refnet-real")        the same for photos with blur, noise and compression
        load_model("transfer")           the baseline without training
        load_model("runs/mine/model")    a folder that `ragsr train refsr` or `train auto` wrote, or `save` of any model
        load_model("TTSR.pt")            a checkpoint of TTSR, or of iRAG for its TTSR part

    Raises `InputError` for an unknown name, a scale the model cannot do, and weights that do not fit.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in SHIPPED:
        return SHIPPED[name](scale)
    if path.is_dir():
        config = read_folder(path)
        if config == {"model": Auto.name}:
            return Auto.load(path, scale)
        return TTSR.load(path, scale) if config == {"model": TTSR.name} else RefNet.load(path, scale)
    if path.suffix.lower() in SUFFIXES:
        return TTSR.load(path, scale)
    if name == TTSR.name:
        raise InputError("ttsr has no weights that ragsr could ship; name the file of a checkpoint of TTSR")
    raise InputError(
        f"no model is named {name!r}; choose one of: {', '.join(sorted(SHIPPED))}, "
        "the folder of a trained model, or the file of a TTSR checkpoint"
    )
