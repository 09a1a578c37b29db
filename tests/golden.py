"""Recorded inputs and outputs of the original implementations, number by number.

`tests/data/golden` holds the small cases, which travel with the project. Where the full set lies beside the checkout
(`../shared/golden`), that is used instead.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

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

    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("weights."): x for n, x in self.tensors.items() if n.startswith("weights.")}


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


def _float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x  # compact storage types hold exact float32 values
