import json
import os
import subprocess
import sys

import pytest
import torch

from ragsr.cli import main
from ragsr.env import describe
from ragsr.ops import _library
from ragsr.testing import INPUTS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ragsr", *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def test_every_op_has_an_owner_or_a_reason():
    found = describe()
    assert set(found["ops"]) == set(_library.PLAIN_FORMS)
    for owners in found["ops"].values():
        for owner in owners.values():
            assert owner in ("C++", "CUDA C++", "Triton") or owner.startswith(("plain PyTorch (", "nobody (")), owner
    if _library.BINARIES["_cpu"] is None:
        assert found["ops"]["hamming_topk"]["cpu"] == "C++"
        assert found["cpu kernel"] in ("portable", "avx2", "avx512")


def test_json_and_table(capsys):
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]
    assert main(["env"]) == 0
    assert "hamming_topk (cpu)" in capsys.readouterr().out


def test_plain_run_owns_nothing():
    done = run("env", "--json", RAGSR_PLAIN="1")
    ops = json.loads(done.stdout)["ops"]
    assert all("RAGSR_PLAIN=1" in owners["cpu"] for owners in ops.values())


@pytest.mark.skipif(_library.BINARIES["_cpu"] is not None, reason=f"{_library.BINARIES['_cpu']}")
def test_every_cpu_kernel_of_this_machine_gives_the_same_answer():
    script = (
        "import torch, hashlib; from ragsr import ops; from ragsr.testing import inputs\n"
        "h = hashlib.sha256()\n"
        "for args in inputs('hamming_topk'):\n"
        "    for x in ops.hamming_topk(*args): h.update(x.numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    answers = {}
    for kernel in ("portable", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"RAGSR_CPU": kernel}, capture_output=True, text=True
        )
        if done.returncode == 0:
            answers[kernel] = done.stdout
        else:
            assert f"RAGSR_CPU is '{kernel}', but this machine has: portable" in done.stderr
    plain = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"RAGSR_PLAIN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "portable" in answers
    assert set(answers.values()) == {plain.stdout}


def test_unknown_cpu_kernel_is_named():
    done = run("env", RAGSR_CPU="sse9")
    assert "RAGSR_CPU is 'sse9', but this machine has: portable" in done.stdout + done.stderr


def test_every_op_has_inputs_to_be_tested_with():
    gradients = {name for name in _library.PLAIN_FORMS if name.endswith("_backward")}  # tested through their op
    steps = {name for name in _library.PLAIN_FORMS if getattr(torch.ops.ragsr, name).default._schema.is_mutable}
    assert steps == {"blend_reference", "finish_attention"}  # tests/ops/test_attention.py runs them one after the other
    assert set(INPUTS) == set(_library.PLAIN_FORMS) - gradients - steps
