"""What `benchmarks/run.py` times: one module per op family, each with a list `CASES`."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# The arguments of the op -> what is timed, without arguments; setting up is not timed. ImportError: not installed.
Prepare = Callable[..., Callable[[], Any]]


class Case(NamedTuple):
    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]  # the arguments of the op, on the CPU
    work: float  # how many of `unit` one call does
    unit: str
    peers: Mapping[str, Prepare] = MappingProxyType({})  # besides the plain form, which every op has


def families() -> dict[str, list[Case]]:
    """The cases of every family, by the name of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in names}
