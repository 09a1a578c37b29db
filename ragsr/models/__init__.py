"""The restoration models: each turns a low-quality image and prepared references into a restored one."""

from ragsr.errors import InputError
from ragsr.models.transfer import Transfer
from ragsr.models.views import PreparedReferences

__all__ = ["PreparedReferences", "Transfer", "load_model"]

MODELS = {Transfer.name: Transfer}


def load_model(name_or_dir: str, scale: int = 4) -> Transfer:
    """The model of that name, for that scale. An unknown name or a scale it cannot do raises `InputError`."""
    if name_or_dir not in MODELS:
        raise InputError(f"no model is named {name_or_dir!r}; choose one of: {', '.join(sorted(MODELS))}")
    return MODELS[name_or_dir](scale)
