"""Weights from files: read without running anybody's code, compared name by name before a network takes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ragsr.errors import InputError
from ragsr.files import replacing

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # what the folder of a model holds
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
WRAPPERS = ("state_dict", "params_ema", "params", "model")  # where training programs put the weights; the first counts
DEPTH = 4  # wrappers inside each other; a damaged file may even hold itself


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, in the file's own dtypes.

    `.safetensors`, or `.pt`, `.pth`, `.ckpt` and `.bin` as far as they hold plain data: a pickle that would have to run
    code is refused. Raises `InputError`, which names the file, for that and for a file that is missing, damaged or
    holds no weights.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: weights are read from {', '.join(('.safetensors', *PICKLED))}; name such a file")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path of the weights")
    content = read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_pickled(path)
    return named_tensors(path, unwrap(content))


def check_weights(what: str, module: nn.Module, weights: dict[str, Tensor], optional: tuple[str, ...] = ()) -> None:
    """Refuse weights whose names or shapes are not those of `module`; names with a prefix in `optional` may differ.

    Raises `InputError` with the first difference in the module's order and the number of all.
    """
    own = module.state_dict()
    differences = [
        sentence
        for name in (*own, *(name for name in weights if name not in own))
        if (sentence := difference(name, own.get(name), weights.get(name), name.startswith(optional)))
    ]
    if differences:
        raise InputError(
            f"{what}: {differences[0]} ({len(differences)} of {len(own)} tensors differ); "
            "use weights that were saved from this model at this size"
        )


def load_into(module: nn.Module, weights: dict[str, Tensor], what: str, optional: tuple[str, ...] = ()) -> None:
    """Give `module` the weights, in its own dtypes, after `check_weights` found nothing."""
    check_weights(what, module, weights, optional)
    module.load_state_dict(weights, strict=False)  # what strict would refuse is refused above, but for `optional`


# ------------------------------------------------------------------ folders of models


def save_folder(folder: Path, config: Mapping[str, Any], module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Write `config`, which names the model, and its weights."""
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.detach().to(dtype).contiguous() for name, value in module.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
        temporary.chmod(0o644)  # it comes readable for its owner alone


def read_folder(folder: Path) -> Any:
    """What the config says; nothing is known of it but that it is JSON."""
    try:
        return json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no {CONFIG}; name the folder of a saved model") from None
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: is not JSON ({error}); copy the model again") from None


# ------------------------------------------------------------------ details


def read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file ({error}); copy or download it again") from error


def read_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises nearly anything
        foreign = foreign_objects(path)
        if not foreign:
            raise InputError(
                f"{path}: damaged, or not a checkpoint of tensors alone; copy or download it again, "
                "or convert it to .safetensors"
            ) from error
        raise InputError(
            f"{path}: besides tensors it holds {', '.join(foreign)}, and to read these its code would have to run, "
            "which ragsr never does; where you trust the file, open it with torch.load(file, weights_only=False) "
            "and write its dictionary of tensors with safetensors.torch.save_file"
        ) from error


def foreign_objects(path: Path) -> list[str]:
    """The classes and functions that reading the file would need, as far as it can be told without running them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is too damaged to tell
        return []


def unwrap(content: Any) -> Any:
    """{"state_dict": {…}} -> {…}"""
    for _ in range(DEPTH):
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    return content


def named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: it holds no weights; a checkpoint is a dictionary of named tensors")
    for name, x in content.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise InputError(
                f"{path}: its entry {name!r} is {type(x).__name__}; a checkpoint is a dictionary of named tensors, "
                f"by itself or under one of: {', '.join(WRAPPERS)}"
            )
    return {name: x.detach() for name, x in content.items()}


def difference(name: str, own: Tensor | None, given: Tensor | None, optional: bool) -> str | None:
    """What is wrong with one entry, or None."""
    if own is not None and given is not None:
        shapes = tuple(given.shape), tuple(own.shape)
        return None if shapes[0] == shapes[1] else f"{name} has shape {shapes[0]}, and the model needs {shapes[1]}"
    if optional:
        return None
    return f"{name} is missing" if given is None else f"{name} is unexpected"
