import json

import pytest
from PIL import Image

from ragsr.cli import main
from ragsr.cli.demo import photo_folder

pytest.importorskip("skimage", reason="scikit-image is not installed")


def test_demo_finds_the_reference_and_gains_by_it(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "demo.json").read_text())
    assert results["rank_of_true_reference"] == 1
    decibel = {row["method"]: row["psnr"] for row in results["rows"]}
    assert decibel["bicubic"] < decibel["no reference"] < decibel["reference"]
    assert {"search", "restore"} <= set(results["rows"][-1]["milliseconds"])
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 6 * 320


def test_demo_without_photos_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ragsr\[demo\]'"):
        photo_folder()
