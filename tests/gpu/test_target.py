"""`make gpu` goes on after a step that fails or takes too long, writes what it has, and does not end with 0."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"
spec = importlib.util.spec_from_file_location("gpu_target", SCRIPT)
target = importlib.util.module_from_spec(spec)
spec.loader.exec_module(target)


def code(text: str) -> list[str]:
    return ["-c", text]


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(target, "why_not", lambda: None)
    monkeypatch.setattr(target, "environment", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    return tmp_path


def test_goes_on_and_says_what_failed(without_gpu, monkeypatch, capfd):
    saved = without_gpu / "rows.json"
    row = {
        "op": "o",
        "case": "c",
        "owner": "Triton",
        "us": {"kernel": [1, 2, 3]},
        "times": {"plain": 4.0},
        "limit": None,
        "graph_us": 1.5,
    }
    writes = f"import pathlib; pathlib.Path({str(saved)!r}).write_text({json.dumps({'rows': [row]})!r})"
    steps = [
        target.Step("breaks", 60, code("print('said before'); raise SystemExit(3)")),
        target.Step("hangs", 1, code("import time; time.sleep(60)")),
        target.Step("measures", 60, code(writes), saved),
    ]
    monkeypatch.setattr(target, "steps", lambda out: steps)
    monkeypatch.setattr(target, "SHORTEST", 0)
    assert target.main() == 1
    found = json.loads((without_gpu / "gpu.json").read_text())
    assert [step["outcome"] for step in found["steps"]] == ["failed with 3", "out of time", "passed"]
    assert found["steps"][0]["tail"] == ["said before"]
    assert found["provenance"]["commit"]
    summary = capfd.readouterr().out.partition("== summary")[2]
    assert "o: c: Triton: 2 µs, 1.5 µs in a graph, 4.0 × plain" in summary
    assert summary.count("\n") == 5


def test_ends_with_0_when_all_pass_and_skips_what_has_no_time(without_gpu, monkeypatch):
    monkeypatch.setattr(target, "steps", lambda out: [target.Step("fine", 60, code("pass"))])
    assert target.main() == 0
    monkeypatch.setattr(target, "TOTAL", 0)
    assert target.main() == 1
    assert json.loads((without_gpu / "gpu.json").read_text())["steps"][0]["outcome"] == "no time left"


def test_steps_name_what_exists(tmp_path):
    root = SCRIPT.parents[1]
    steps = target.steps(tmp_path)
    for step in steps:
        for argument in step.command:
            if argument.startswith(("tests/", "benchmarks/")) or argument.endswith("setup.py"):
                assert (root / argument).exists(), argument
    families = {step.command[2] for step in steps if step.name.startswith("time ")}
    assert {"hamming", "hamming_large"} <= families
    assert "index" not in families


def test_says_in_one_sentence_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(target, "NEEDED", ("torch", "no_such_package"))
    assert "no_such_package cannot be imported" in target.why_not()
