"""`ragsr restore --pipeline refir` and `ragsr.restore(pipeline="refir")` with a tiny model in a folder."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_hosts import picture, pipe, with_words

import ragsr
from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.gallery import Gallery
from ragsr.hosts import StableDiffusionHost
from ragsr.image import image_to_tensor, tensor_to_image
from ragsr.pipelines import load_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with_words(pipe("sd15"), folder).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low").mkdir()
    for name, seed in (("a", 1), ("b", 3)):
        tensor_to_image(picture(seed, 9, 8)).save(f"low/{name}.png")
    tensor_to_image(picture(2, 48, 40)).save("good.png")
    return tmp_path


FAST = ["--pipeline", "refir", "--steps", "2", "--mode", "noised", "--device", "cpu", "--prompt", "a b"]


def command(model, *more):
    return ["restore", "low", *FAST, "--model", str(model), "-o", "out", *map(str, more)]


def test_a_folder_with_a_reference_explained(model, folder, capsys):
    (folder / "low" / "aa.png").write_bytes(b"not a picture")
    ask = command(model, "--ref", "good.png", "--explain", "--json", "--reference-strength", "0.6")
    assert main(ask) == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    first, bad, last = told["results"]
    assert "not a picture" in bad["error"] or "aa.png" in bad["error"]
    assert first["size"] == [32, 36]
    assert 0 < first["reference_share"] < 0.6
    assert [r["path"] for r in first["references"]] == ["good.png"]
    assert first["explanation"] == [f"out/a.{name}.png" for name in ("explain", "share")]
    share = image_to_tensor(Image.open("out/a.share.png"))
    assert share.shape == (1, 3, 36, 32)
    assert float(share.mean()) == pytest.approx(first["reference_share"], abs=0.01)
    assert Image.open("out/b.explain.png").width > 640
    assert {"mode": "noised", "steps": 2, "explain": True, "pipeline": "refir", "seed": 0}.items() <= told.items()
    assert "8x9 pixels will take about" in err
    assert "GB" in err
    assert set(last["milliseconds"]) == {"restore", "save"}
    wanted = ragsr.restore(
        "low/a.png", references="good.png", pipeline="refir", model=model, device="cpu", steps=2, mode="noised",
        prompt="a b", reference_strength=0.6,
    )  # fmt: skip
    assert wanted.image.tobytes() == Image.open("out/a.png").tobytes()
    assert main(ask) == 2
    assert [r.get("skipped") for r in json.loads(capsys.readouterr().out)["results"]] == [True, False, True]


def test_a_gallery_without_anything_relevant(model, folder, capsys):
    with Gallery.create("gallery") as made:
        made.add(["good.png"], progress=False)
    near = command(model, "--gallery", "gallery", "--overwrite")
    assert main(near) == 0
    assert "good.png (distance " in capsys.readouterr().out
    assert main([*near, "--threshold", "1.1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("without reference") == 2
    assert out.count("none is of use; the nearest is") == 2
    assert err.count("no reference is relevant enough") == 2
    assert main([*near, "--threshold", "1.1", "--json"]) == 0
    (rejected,) = json.loads(capsys.readouterr().out)["results"][0]["rejected"]
    assert rejected["path"].endswith("good.png")
    assert 0 < rejected["score"] < 1.1
    assert main([*near, "--threshold", "1.1", "--fallback", "gen_ref"]) == 0
    assert "from a reference generated from a caption" in capsys.readouterr().out
    plain = ragsr.restore("low/b.png", pipeline="refir", model=model, device="cpu", steps=2, prompt="a b")
    assert main(command(model, "--no-reference", "--overwrite")) == 0
    assert plain.image.tobytes() == Image.open("out/b.png").tobytes()
    assert not plain.weight.any()


def test_eval_restore(model, folder, capsys):
    """On a pack of one scene: scores per photo, and a page with the pictures."""
    scene = folder / "pack" / "multiview" / "house"
    scene.mkdir(parents=True)
    (folder / "pack" / "lq_bicubic_x4").mkdir()
    truth = tensor_to_image(picture(1, 96, 104))
    truth.save(scene / "query_0.png")
    truth.resize((26, 24), Image.Resampling.BICUBIC).save("pack/lq_bicubic_x4/house_query_0.png")
    Image.open("good.png").save(scene / "ref_00.jpg")
    reference = "multiview/house/ref_00.jpg"
    entry = {"scene": "house", "best": [reference], "same_scene": [reference]}
    (folder / "pack" / "retrieval_truth.json").write_text(json.dumps({"multiview/house/query_0.png": entry}))
    ask = ["eval", "restore", "--data", "pack", "--reference", "none", "best", *FAST, "--model", str(model)]
    ask += ["--plan", "released-supir"]
    assert main([*ask, "--json", "out.json", "--html", "out.html"]) == 0
    told = capsys.readouterr().out
    found = json.loads((folder / "out.json").read_text())
    assert (found["pipeline"], found["steps"]) == ("refir", 2)
    assert {"mode": "noised", "preset": "released-supir"}.items() <= found["options"].items()
    none, best = (found["mean"][method] for method in ("none", "best"))
    assert none["psnr"] != best["psnr"]  # the reference was looked at
    for means in (none, best):
        assert 0 < means["psnr"] < 60
        assert -1 < means["ssim"] < 1
        assert f"{means['psnr']:.2f}" in told
    (row,) = found["rows"]
    assert row["scores"]["best"]["references"] == [reference]
    assert 0 < row["scores"]["best"]["reference_share"] < 1
    page = (folder / "out.html").read_text()
    assert page.count("<img ") == 6  # low quality, truth, bicubic, none, best, its reference
    assert "multiview/house/query_0.png" in page


def test_tags_of_each_picture(model, folder, capsys, monkeypatch):
    (folder / "tags.txt").write_text("# name: tags\n\na.png: b, b\ngood.png: b\nlow/a.png: a, b\n")
    asked = []
    embed = StableDiffusionHost._embedded
    monkeypatch.setattr(
        StableDiffusionHost, "_embedded", lambda self, prompt: asked.append(prompt) or embed(self, prompt)
    )
    assert main([*command(model, "--ref", "good.png"), "--prompt", "a", "--tags", "tags.txt", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert asked[::2] == ["a, b, a", "b", "a", "b"]  # the photo a, its reference; b, which has none, and the reference
    assert not first["notes"]
    assert second["notes"] == ["low/b.png: tags.txt has no tags of low/b.png"]
    (folder / "tags.txt").write_text("a.png b\n")
    assert main([*command(model, "--no-reference"), "--tags", "tags.txt"]) == 2
    assert "tags.txt, line 1: 'a.png b' is not of the form photo.jpg: cat" in capsys.readouterr().err


def test_front_door_settings(model, folder):
    made = load_pipeline("refir", model, device="cpu", steps=1, prompt="a")
    assert (made.scale, made.tile, made.device) == (4, "auto", torch.device("cpu"))
    assert load_pipeline("refir", model, device="cpu", tile="24").tile == 96


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nothing"], "nothing: diffusers cannot load it"),
        (["--tags", "none.txt"], "none.txt: the file of tags cannot be read"),
        (
            ["--preset", "paper", "--reference-strength", "2"],
            "scale is 2.0; the strength of a reference lies",
        ),
        (["--model", "refnet"], "name its folder, its file or its hub name"),
        (["--tile", "wide"], "tile is 'wide'"),
        (["--fallback", "gen_ref", "--prompt", ""], "give one, or use origin_lrm"),
        (["--steering", "restore=4", "churn=2"], "restore is an option of SUPIR, which this is not"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--pipeline", "refsr", "--model", "transfer"], "refsr has no option 'mode'"),
    ],
)
def test_what_cannot_be(model, more, message, capsys):
    assert main([*command(model, "--no-reference"), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_its_weights(model, tmp_path, capsys):
    """The sentence names what is missing."""
    shutil.copytree(model, tmp_path / "part")
    (tmp_path / "part" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert main([*command(model, "--no-reference"), "--model", "part"]) == 2
    told = capsys.readouterr().err
    assert "part: diffusers cannot load it" in told
    assert "unet" in told


def test_a_model_that_is_no_host(model):
    with pytest.raises(InputError, match="refir has no option 'speed'"):
        ragsr.restore("low/a.png", pipeline="refir", model=model, speed=3)
