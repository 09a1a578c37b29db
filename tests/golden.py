"""Recorded inputs and outputs of the original implementations, number by number.

`tests/data/golden` holds the small cases, which travel with the project. Where the full set lies beside the checkout
(`../shared/golden`), that is used instead.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "data" / "golden"
FULL = Path(__file__).parents[2] / "shared" / "golden"


class Case(NamedTuple):
    name: str
    config: dict[str, Any]  # the case's entry of meta.json: heads, grid, atol, atol_per_output …
    tensors: dict[str, Tensor]  # names without the case's prefix

    def __str__(self) -> str:
        return self.name

    def weights(self, prefix: str = "weights.") -> dict[str, Tensor]:
        return {n.removeprefix(prefix): x for n, x in self.tensors.items() if n.startswith(prefix)}

    def check(self, name: str, found: Tensor) -> None:
        """Is `found` the recorded output, to its own tolerance?"""
        atol = self.config.get("atol_per_output", {}).get(name, self.config["atol"])
        torch.testing.assert_close(found, self.tensors[name], rtol=0, atol=atol)


def golden_cases(item: str) -> list[Case]:
    folder = FULL / item if (FULL / item).is_dir() else HERE / item
    meta = json.loads((folder / "meta.json").read_text())
    if "cases" not in meta:  # the item is one case, its tensors without prefix
        tensors = load_file(folder / "tensors.safetensors")
        return [Case(item, meta, {n: _float(x) for n, x in tensors.items()})]
    cases = meta["cases"]
    tensors = load_file(folder / "tensors.safetensors")
    return [
        Case(
            name,
            config,
            {n.removeprefix(f"{name}."): _float(x) for n, x in tensors.items() if n.startswith(f"{name}.")},
        )
        for name, config in cases.items()
    ]


def golden_item(item: str) -> Case:
    """An item that is one case. Where it is too large to travel with the project, the test is skipped."""
    folder = FULL / item if (FULL / item).is_dir() else HERE / item
    if not folder.is_dir():
        pytest.skip(f"{item} is too large to travel with the project; it lies in ../shared/golden")
    tensors = load_file(folder / "tensors.safetensors")
    return Case(item, json.loads((folder / "meta.json").read_text()), {n: _float(x) for n, x in tensors.items()})


def golden_inventory(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weights."""
    folder = FULL / "inventories" if FULL.is_dir() else HERE / "inventories"
    shapes = json.loads((folder / f"{model}.json").read_text())["state_dict"]
    return {name: tuple(shape) for name, shape in shapes.items()}


def _float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x  # compact storage types hold exact float32 values
