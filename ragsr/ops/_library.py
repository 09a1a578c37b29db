"""The one torch.library handle, and the compiled libraries that plug into it.

Every op is defined here in Python, by `define`: a schema, the plain PyTorch form, a fake, and autograd where a
gradient has meaning. Kernels plug in underneath: C++ and CUDA libraries when they load, Triton through `claim`. The
dispatcher is the only registry: whoever holds the dispatch key of a device owns the op there, and the plain form
(`CompositeExplicitAutograd`) runs wherever nobody does.

`RAGSR_PLAIN=1` stops before any kernel is loaded: the whole run uses the plain forms. It is read once, at import.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

PLAIN = os.environ.get("RAGSR_PLAIN", "0") not in ("", "0")
PLAIN_ASKED = "RAGSR_PLAIN=1 asks for plain PyTorch"
LIBRARY = torch.library.Library("ragsr", "DEF")

# file stem -> None once loaded, else the sentence that says why not
BINARIES: dict[str, str | None] = {}
# ops whose CUDA kernel is a Triton one
TRITON: set[str] = set()
# op -> its plain form, for tests and benchmarks
PLAIN_FORMS: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `ragsr::<name>` from its schema, plain form, fake and, where a gradient has meaning, its backward."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    PLAIN_FORMS[name] = plain
    torch.library.register_fake(f"ragsr::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"ragsr::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def claim(name: str, kernel: Callable[..., Any]) -> None:
    """Give a Triton kernel the op on CUDA devices, unless the compiled library already owns it or Triton cannot run."""
    if why_no_triton() is None and not owns(name, "CUDA"):
        LIBRARY.impl(name, kernel, "CUDA")
        TRITON.add(name)


def build_on(step: str, name: str, key: str, function: Callable[..., Any]) -> None:
    """Give `function`, which calls the op `step`, the op `name` on the devices where a kernel owns that step."""
    if owns(step, key):
        LIBRARY.impl(name, function, key)
        if key == "CUDA" and step in TRITON:
            TRITON.add(name)


def owns(name: str, key: str) -> bool:
    """Whether a kernel holds the dispatch key of this op; where none does, the plain form runs."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ragsr::{name}", key)


def below_autograd() -> AbstractContextManager[None]:
    """Calls in here skip autograd, which is Python for our ops and takes as long as a small layer, 6 µs."""
    return torch._C._AutoDispatchBelowAutograd()


def why_no_triton() -> str | None:
    """The reason no Triton kernel is registered in this process, or None."""
    if PLAIN:
        return PLAIN_ASKED
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def load_binary(stem: str) -> None:
    """Load `ragsr/<stem>*.so`, which registers its kernels; remember why not in `BINARIES`."""
    if PLAIN:
        BINARIES[stem] = PLAIN_ASKED
        return
    folder = Path(__file__).parents[1]
    found = sorted(folder.glob(f"{stem}.*so")) + sorted(folder.glob(f"{stem}.pyd"))
    if stem == "_cuda" and torch.version.cuda is None:
        BINARIES[stem] = "this PyTorch has no CUDA"
        return
    if not found:
        BINARIES[stem] = f"ragsr.{stem} was not built (no {stem}*.so in {folder})"
        return
    try:
        torch.ops.load_library(str(found[0]))
        BINARIES[stem] = None
    except OSError as error:
        BINARIES[stem] = f"{found[0].name} does not load: {error}"


load_binary("_cpu")
load_binary("_cuda")
