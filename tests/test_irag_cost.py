"""benchmarks/irag_cost.py: what it times, and what it makes of it."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import irag_cost
import irag_cost_run

from ragsr.gallery.index import Loaded
from ragsr.models.sft import SPADE
from ragsr.training.sizes import make_stage


def test_every_stage_and_op_is_timed_and_left_as_it_was(tmp_path):
    places = SPADE.modulation, Loaded.search, torch.ops.ragsr.group_norm_sft_forward
    stage = make_stage("tiny")
    torch.nn.init.normal_(stage.unet.conv_out.weight, std=0.02)
    stage.save_pretrained(tmp_path)
    row = irag_cost_run.measure(tmp_path, False, 128, 3, "float32", "cpu", 1000)
    assert places == (SPADE.modulation, Loaded.search, torch.ops.ragsr.group_norm_sft_forward)
    blocks = sum(isinstance(one, SPADE) for one in stage.unet.modules())
    calls = {name: part["calls"] for name, part in row["parts"].items()}
    assert {name: calls[name] for name in irag_cost.STAGES} == {
        "retrieve": 1, "prepare": 1, "restore": 1, "encode": 2, "steps": 1, "decode": 2,
    }  # fmt: skip
    assert calls["SFT"] == calls["SFT maps"] == 3 * blocks
    assert calls["Hamming search"] == 1
    assert calls["correlation search"] >= 1
    assert 0.8 * row["seconds"] < sum(row["parts"][name]["seconds"] for name in irag_cost.STAGES) < row["seconds"]
    steps = row["parts"]["steps"]["time"]
    assert 0 < row["parts"]["SFT"]["time"] + row["parts"]["SFT maps"]["time"] < steps < row["time"]
    assert row["peak_mib"] >= max(row["parts"][name]["peak_mib"] for name in irag_cost.STAGES) > 100


def test_what_the_kernels_save():
    def row(time, search):
        return {"side": 64, "time": time, "parts": {"correlation search": {"time": search, "calls": 4}}}

    ours, plain = row(6.0, 1.0), row(10.0, 5.0)
    ours["saved"] = irag_cost.saved(ours, plain)
    assert ours["saved"]["correlation search"] == ours["saved"]["all"] == pytest.approx(0.4)
    printed = irag_cost.shares([ours, plain])
    assert "| 64² | correlation search | 4 | 5 s | 1 s | 50.00% | 40.00% |" in printed
    assert "| 64² | whole | | 10 s | 6 s | 100% | 40.00% |" in printed
