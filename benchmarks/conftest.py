"""What pytest-benchmark saves beside the numbers: where they come from, in the form of our other result files."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for cases and peers, as when run.py is started

from ragsr.env import provenance


def pytest_benchmark_generate_machine_info(config: Any) -> dict[str, Any]:
    return {"devices": provenance()["devices"]}


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    del output_json["commit_info"]
    output_json["provenance"] = provenance()
