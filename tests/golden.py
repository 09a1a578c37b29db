"""Recorded inputs and outputs of the original implementations, number by number.

`tests/data/golden` holds the small cases, which travel with the project. Where the full set lies beside the checkout
(`../shared/golden`), that is used instead.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
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

    def weights(self, network: str = "") -> dict[str, Tensor]:
        """Those of the one network, or of the one called so, under their published names."""
        prefix = f"weights.{network}." if network else "weights."
        return {n.removeprefix(prefix): x for n, x in self.tensors.items() if n.startswith(prefix)}


def golden_cases(item: str) -> list[Case]:
    folder = FULL / item if (FULL / item).is_dir() else HERE / item
    cases = json.loads((folder / "meta.json").read_text())["cases"]
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
    """An item without cases: a whole network. The full set alone holds it, so that elsewhere the test is skipped."""
    folder = FULL / item
    if not folder.is_dir():
        pytest.skip(f"the recorded outputs of {item} do not travel with the project: {folder} is not there")
    config = json.loads((folder / "meta.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    return Case(item, config, {name: _float(x) for name, x in tensors.items()})


def inventory(name: str) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a published checkpoint."""
    path = FULL / "inventories" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the inventory {name} does not travel with the project: {path} is not there")
    return json.loads(path.read_text())["state_dict"]


def _float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x  # compact storage types hold exact float32 values
