"""What `benchmarks/run.py` times: one module per family, each with a list `CASES`."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# The arguments of the op -> what is timed, without arguments; setting up is not timed. ImportError: not installed;
# LeftOut: does not take part here.
Prepare = Callable[..., Callable[[], Any]]


class Case(NamedTuple):
    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]  # the arguments of the op, on the CPU
    work: float  # how many of `unit` one call does
    unit: str
    peers: Mapping[str, Prepare] = MappingProxyType({})  # besides the plain form, which every op has
    check: Callable[..., None] | None = None  # of the arguments, where rounding may decide which of two is right

    # ---- below: only where a case needs it
    same: Callable[[Any, Any], None] | None = None  # (our answer, a peer's): AssertionError where they differ
    limit: Callable[[str], tuple[float, str] | None] | None = None  # device -> least seconds and why, None: not known
    few: int | None = None  # the plain form answers this many rows of the first argument, its time is scaled
    run: Prepare | None = None  # timed in place of an op that is none of torch's; its peers then check it
    on_request: bool = False  # takes long, or much memory or disk: only when its family is named


QUICK = os.environ.get("RAGSR_QUICK", "0") not in ("", "0")


def reduced(side: int) -> int:
    """The side of a map; an eighth of it where RAGSR_QUICK=1 asks only whether everything runs."""
    return max(8, side // 8) if QUICK else side


class LeftOut(Exception):
    """Raised by a peer that has no part in this case, on this device."""


class Part:
    """A contestant that does only a part of the work: its answers are the first ones, its times count `scale` times."""

    def __init__(self, run: Callable[[], Any], scale: float) -> None:
        self.run, self.scale = run, scale

    def __call__(self) -> Any:
        return self.run()


def first_rows(prepare: Prepare, rows: int) -> Prepare:
    """`prepare` for the first rows of the first argument only, for a peer that is too slow to answer all of them."""

    def prepare_part(first: Any, *others: Any) -> Callable[[], Any]:
        run = prepare(first[:rows], *others)
        return Part(run, len(first) / rows) if rows < len(first) else run

    return prepare_part


def only_on(device: str, prepare: Prepare) -> Prepare:
    """`prepare` for a peer that knows one kind of device."""

    def prepare_there(first: Any, *others: Any) -> Callable[[], Any]:
        if first.device.type != device:
            raise LeftOut
        return prepare(first, *others)

    return prepare_there


def families() -> dict[str, list[Case]]:
    """The cases of every family, by the name of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in names}
