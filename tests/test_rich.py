"""`quality="rich"`: the reference stage and then diffusion, on a tiny model with random weights."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import irag_ablations  # what follows needs diffusers
import irag_evidence
import irag_sheet
import irag_tables

import ragsr
from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.evaluation import load_pack
from ragsr.metrics import haarpsi, niqe, psnr, ssim
from ragsr.models import load_model
from ragsr.models.fusion import FusionNet
from ragsr.models.refnet import RICH, RefNet, save_model
from ragsr.models.ttsr import TTSR, TTSRNet
from ragsr.pipelines import RefSRPipeline, load_pipeline
from ragsr.pipelines.restore import load_diffusion
from ragsr.training.sizes import make_stage
from ragsr.training.stage_folder import Begin, reference_of

REFERENCE = Image.fromarray(data.astronaut()).crop((100, 0, 300, 180))
LOW = REFERENCE.crop((0, 0, 160, 128)).resize((40, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusion stage alone: the reference stage is the one that ships."""
    made, stage = tmp_path_factory.mktemp("rich"), make_stage("tiny")
    torch.manual_seed(0)
    torch.nn.init.normal_(stage.unet.conv_out.weight, std=0.1)
    stage.save_pretrained(made)
    return made


def pixels(restored):
    return restored.image.tobytes()


def test_rich_adds_to_faithful(folder):
    faithful = ragsr.restore(LOW, references=REFERENCE, model=folder)
    assert pixels(faithful) == pixels(ragsr.restore(LOW, references=REFERENCE, model="refnet"))
    assert "diffuse" not in faithful.milliseconds
    rich, again, other = (
        ragsr.restore(LOW, references=REFERENCE, model=folder, quality="rich", steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert rich.image.size == (160, 128)
    assert rich.milliseconds["diffuse"] > 0
    assert torch.equal(rich.weight, faithful.weight)
    assert pixels(rich) == pixels(again)
    assert len({pixels(rich), pixels(faithful), pixels(other)}) == 3


def test_what_ships():
    """Sharper than `refnet-real`, near to it, and small."""
    faithful = ragsr.restore(LOW, references=REFERENCE, model="refnet-real")
    rich = ragsr.restore(LOW, references=REFERENCE, quality="rich")
    assert pixels(rich) == pixels(ragsr.restore(LOW, references=REFERENCE, quality="rich", model="refnet-real"))
    one, other = (np.asarray(x.image, dtype=np.float32) for x in (faithful, rich))
    assert 0 < np.abs(one - other).mean() < 12
    detail = [np.abs(np.diff(x, axis=1)).mean() for x in (one, other)]
    assert detail[1] > detail[0]
    assert sum(path.stat().st_size for path in RICH.rglob("*.safetensors")) < 30e6
    assert "MIT License" in (RICH / "README.md").read_text()  # of the autoencoder


def test_a_network_that_answers_nothing_gives_the_intermediate_result(tmp_path):
    """As one does that has not learned yet: what the autoencoder loses is not lost to the result."""
    make_stage("tiny").save_pretrained(tmp_path)
    pipeline = load_pipeline(model=tmp_path, quality="rich", steps=3, seed=5)
    low = pipeline.load(LOW)
    faithful, _ = pipeline.restore(low, pipeline.prepare(())[0])
    torch.testing.assert_close(pipeline.diffuse(pipeline.diffusion, low, faithful, 2), faithful, rtol=0, atol=1e-5)


def test_the_model_says_how_many_steps(tmp_path):
    make_stage("tiny").save_pretrained(tmp_path)
    assert load_pipeline(model=tmp_path, quality="rich").steps == 10
    (tmp_path / "training.json").write_text(json.dumps({"sampling_steps": 4}))
    assert load_pipeline(model=tmp_path, quality="rich").steps == 4
    assert load_pipeline(model=tmp_path, quality="rich", steps=7).steps == 7
    (tmp_path / "training.json").write_text("[]")
    assert load_pipeline(model=tmp_path, quality="rich").steps == 10


def test_its_own_reference_stage(folder, tmp_path):
    make_stage("tiny").save_pretrained(tmp_path)
    save_model(tmp_path / "reference", FusionNet(channels=8, before=1, after=1, guide_blocks=1))
    pipeline = load_pipeline(model=tmp_path, quality="faithful")
    assert pipeline.diffusion is None
    assert pipeline.model.net.config["channels"] == 8
    assert load_pipeline(model=folder).model.net.config == load_model("refnet").net.config


def test_a_reference_stage_of_ttsr(folder, tmp_path):
    """Both stages saved together, as one does with those of a published checkpoint, and loaded again."""
    torch.manual_seed(0)
    made = RefSRPipeline(TTSR(TTSRNet(4, (1, 1, 1, 1))), diffusion=load_diffusion(folder, torch.device("cpu")), steps=2)
    made.save_pretrained(tmp_path)
    faithful = load_pipeline(model=tmp_path)
    assert faithful.model.name == load_model(tmp_path / "reference").name == "ttsr"
    rich = load_pipeline(model=tmp_path, quality="rich", steps=2)
    assert pixels(rich(LOW, [REFERENCE])) == pixels(made(LOW, [REFERENCE])) != pixels(faithful(LOW, [REFERENCE]))
    assert pixels(faithful(LOW, [REFERENCE])) != pixels(faithful(LOW))
    with pytest.raises(InputError, match='is not of the model refnet; it must say "model": "refnet"'):
        RefNet.load(reference_of(Begin(init=tmp_path)))  # training needs one that learns from registered references


def test_what_cannot_be_saved(folder, tmp_path):
    stage = load_diffusion(folder, torch.device("cpu"))
    with pytest.raises(InputError, match="a pipeline that has no diffusion cannot be saved"):
        RefSRPipeline(load_model()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="begins with transfer, without weights"):
        RefSRPipeline(load_model("transfer"), diffusion=stage).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_references_may_be_absent_or_many(folder):
    pipeline = load_pipeline(model=folder, quality="rich", steps=1)
    several = [REFERENCE, REFERENCE.rotate(5), Image.fromarray(data.coffee()).resize((150, 100))]
    made = [pipeline(LOW, several[:count]) for count in range(4)]
    assert [len(one.references) for one in made] == [0, 1, 2, 3]
    assert made[0].reference_share == 0 < made[1].reference_share
    assert len({pixels(one) for one in made[:2]}) == 2


def test_options_of_the_diffusion(folder):
    """One's own generator, start and callback reach the second stage through the pipeline."""
    pipeline, seen = load_pipeline(model=folder, quality="rich", steps=2), []
    own = pipeline(LOW)
    callback = {"callback_on_step_end": lambda pipe, step, timestep, given: seen.append(step)}
    assert pixels(pipeline(LOW, generator=torch.Generator().manual_seed(0), **callback)) == pixels(own)
    assert seen == [0, 1]
    assert pixels(pipeline(LOW, generator=torch.Generator().manual_seed(1))) != pixels(own)
    assert pixels(pipeline(LOW, start="noise")) != pixels(own)
    with pytest.raises(InputError, match="start is an option of a diffusion, and this pipeline has none"):
        load_pipeline(model=folder)(LOW, start="noise")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"steps": 0}, "steps is 0; it must lie between 1 and 1000"),
        ({"scale": 2}, "enlarges 4 times, not 2 times"),
        ({"quality": "best"}, "faithful or rich"),
    ],
)
def test_choices_that_cannot_be(folder, choice, message):
    with pytest.raises(InputError, match=message):
        load_pipeline(model=folder, **({"quality": "rich"} | choice))


def test_a_damaged_folder(folder, tmp_path):
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    assert load_pipeline(model=tmp_path).diffusion is None  # faithful does not look at it
    with pytest.raises(InputError, match="is no diffusion stage that ragsr can load"):
        load_pipeline(model=tmp_path, quality="rich")


def test_the_command(folder, tmp_path, capsys):
    LOW.save(tmp_path / "low.png")
    command = ["restore", str(tmp_path / "low.png"), "--no-reference", "--model", str(folder), "--json"]
    assert main([*command, "--quality", "rich", "--steps", "1", "-o", str(tmp_path / "rich.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["quality"], told["steps"]) == ("rich", 1)
    assert set(told["results"][0]["milliseconds"]) == {"load", "search", "prepare", "restore", "diffuse", "save"}
    assert Image.open(tmp_path / "rich.png").size == (160, 128)
    assert main([*command, "-o", str(tmp_path / "faithful.png")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] is None


# ------------------------------------------------------------------ ablations


def write_pack(folder):
    """Two scenes, a photo and a reference of each."""
    truths = {}
    (folder / "lq_bicubic_x4").mkdir(parents=True)
    (folder / "lq_degraded_x4").mkdir()
    for scene in ("astronaut", "coffee"):
        place = folder / "pairs" / scene
        place.mkdir(parents=True)
        good = Image.fromarray(getattr(data, scene)()).crop((100, 0, 228, 128))
        good.save(place / "query_0.png")
        low = good.resize((32, 32), Image.Resampling.BICUBIC)
        low.save(folder / "lq_bicubic_x4" / f"{scene}_query_0.png")
        low.filter(ImageFilter.GaussianBlur(0.7)).save(folder / "lq_degraded_x4" / f"{scene}_query_0.png")
        good.rotate(3).save(place / "ref_00.png")
        reference = f"pairs/{scene}/ref_00.png"
        truths[f"pairs/{scene}/query_0.png"] = {"scene": scene, "best": [reference], "same_scene": [reference]}
    (folder / "retrieval_truth.json").write_text(json.dumps(truths))


def test_ablations(folder, tmp_path, capsys):
    write_pack(tmp_path / "pack")
    command = ["--data", str(tmp_path / "pack"), "--groups", "pairs", "--model", f"mine={folder}", "--steps", "1"]
    assert irag_ablations.main([*command, "--stage", "transfer", "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["photos"] == 2
    assert list(document["tables"]["mine"]) == ["whole", "-H", "-RM", "-R", "faithful"]
    assert list(document["tables"]["transfer"]) == ["found", "random", "none"]
    rows = document["tables"]["mine"]
    assert rows["whole"]["psnr"]["difference"] == 0
    assert len({row["psnr"]["mean"] for row in rows.values()}) >= 4  # every part counts; random may be ignored as none
    assert rows["-RM"]["haarpsi"]["difference"] != 0
    assert "-RM" in capsys.readouterr().out
    command += ["--without", "RM", "--json", str(tmp_path / "one.json")]
    assert irag_ablations.main(command) == 0
    assert json.loads((tmp_path / "one.json").read_text())["tables"]["mine"] == {k: rows[k] for k in ("whole", "-RM")}


# ------------------------------------------------------------------ evidence


@pytest.fixture(scope="module")
def evidence(folder, tmp_path_factory):
    """Of the tiny model, with random weights: the document, and the folder of its sheets."""
    made = tmp_path_factory.mktemp("evidence")
    write_pack(made / "pack")
    command = ["--data", str(made / "pack"), "--groups", "pairs", "--model", str(folder), "--steps", "1"]
    command += ["--json", str(made / "out.json"), "--markdown", str(made / "out.md"), "--sheets", str(made / "sheets")]
    assert irag_evidence.main(command) == 0
    return json.loads((made / "out.json").read_text()), made


def test_evidence_is_what_the_pipeline_gives(evidence, folder):
    """Every case once per photo and input, with the pixels of the front door."""
    document, made = evidence
    rows = document["rows"]
    cases = {(row["stage"], row["reference"]) for row in rows}
    kinds = ("true", "retrieved", "none", "random")
    assert cases == {("bicubic", None), *((stage, kind) for stage in ("faithful", "rich") for kind in kinds)}
    assert len(rows) == 2 * 2 * len(cases) == len({(r["photo"], r["input"], r["stage"], r["reference"]) for r in rows})
    (row,) = (
        r
        for r in rows
        if (r["scene"], r["input"], r["stage"], r["reference"]) == ("coffee", "degraded", "rich", "random")
    )
    assert row["references"] == ["pairs/astronaut/ref_00.png"]
    low, truth = made / "pack/lq_degraded_x4/coffee_query_0.png", Image.open(made / "pack/pairs/coffee/query_0.png")
    references = [made / "pack" / name for name in row["references"]]
    direct = ragsr.restore(low, references=references, model=folder, quality="rich", steps=1).image
    assert row["metrics"] == {"psnr": psnr(direct, truth), "ssim": ssim(direct, truth)} | {
        "haarpsi": haarpsi(direct, truth),
        "niqe": niqe(direct),
    }
    assert (document["steps"], document["model"], document["faithful"]) == (1, folder.name, folder.name)
    assert "unet/diffusion_pytorch_model.safetensors" in document["weights"]
    assert {"commit", "versions", "devices"} <= set(document["provenance"])


def test_what_is_the_same_is_computed_once(folder, monkeypatch):
    """Equal references, and references that come to the same intermediate result."""
    pipeline = load_pipeline(model=folder, quality="rich", steps=1)
    low, calls = pipeline.load(LOW), []
    diffuse = pipeline.diffuse
    monkeypatch.setattr(pipeline, "diffuse", lambda *inputs: calls.append(inputs) or diffuse(*inputs))
    monkeypatch.setattr(pipeline, "prepare", lambda references: (len(references) // 2, []))
    monkeypatch.setattr(pipeline, "restore", lambda low, kind: (torch.full((1, 3, 128, 160), 0.2 + kind / 2), None))
    references = {"true": ("a", "b"), "retrieved": ("a", "b"), "none": (), "random": ("c",)}
    made = dict(irag_evidence.restored(pipeline, LOW, references, ["rich"]))
    assert len(calls) == 2
    assert [seconds is None for _, seconds in made.values()] == [True, False, True, False, False]  # bicubic is first
    pictures = {kind: picture.tobytes() for (_, kind), (picture, _) in made.items()}
    assert pictures["true"] == pictures["retrieved"] != pictures["none"] == pictures["random"]
    assert torch.equal(calls[0][1], low)


def test_another_reference_stage_to_compare_with(folder, tmp_path):
    REFERENCE.save(tmp_path / "good.png")
    pipeline, other = load_pipeline(model=folder, quality="rich", steps=1), load_pipeline(model="transfer")
    references = {"true": (tmp_path / "good.png",)}
    made = dict(irag_evidence.restored(pipeline, LOW, references, ["faithful", "rich"], other))
    direct = ragsr.restore(LOW, references=REFERENCE, model="transfer")
    assert made["faithful", "true"][0].tobytes() == pixels(direct)
    direct = ragsr.restore(LOW, references=REFERENCE, model=folder, quality="rich", steps=1)
    assert made["rich", "true"][0].tobytes() == pixels(direct)


def test_means_and_differences_of_the_evidence(evidence):
    document, made = evidence
    rows = {(r["photo"], r["input"], r["stage"], r["reference"]): r["metrics"] for r in document["rows"]}
    photos = sorted({row["photo"] for row in document["rows"]})
    told = {(d["input"], d["case"], d["minus"]): d["metrics"] for d in document["differences"]}
    assert len(told) == 2 * (3 + 2 * 3)  # stage to stage, and reference to reference in both
    one, other = ([rows[p, "bicubic", "rich", kind]["niqe"] for p in photos] for kind in ("none", "random"))
    found = told["bicubic", "rich, none", "rich, random"]["niqe"]
    assert found["mean"] == pytest.approx((sum(one) - sum(other)) / 2)
    assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    assert ("degraded", "rich, true", "bicubic") in told
    text = (made / "out.md").read_text()
    assert "| rich, true − faithful, true |" in text
    assert "PSNR (refir), dB ↑ | SSIM (refir) ↑ | HaarPSI ↑ | NIQE ↓ |" in text


def test_a_verdict_needs_the_whole_interval():
    scenes = [str(number) for number in range(8)]

    def verdict(metric, shift, noise):
        values = shift + noise * np.linspace(-1, 1, 8)
        rows = [{"scene": s, "metrics": {metric: v}} for s, v in zip(scenes, values, strict=True)]
        return irag_tables.verdicts(irag_tables.means(rows, 0))["metrics"][metric]["verdict"]

    assert [verdict("psnr", shift, 0.1) for shift in (1, -1, 0)] == ["better", "worse", "open"]
    assert [verdict("niqe", shift, 0.1) for shift in (1, -1, 0)] == ["worse", "better", "open"]
    assert verdict("psnr", 0.1, 1) == "open"


def test_sheets_show_pixels_and_stay_out_of_the_repository(evidence, capsys):
    sheets = evidence[1] / "sheets"
    assert {path.name for path in sheets.iterdir()} == {
        f"{name}{kind}.png" for name in ("bicubic", "degraded") for kind in ("", "_squares")
    }
    assert Image.open(sheets / "degraded.png").width > 6 * 320  # low, bicubic, faithful, rich, truth, reference
    picture = Image.new("RGB", (400, 300))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    picture.paste(noise, (120, 40))
    assert irag_sheet.most_textured(picture) == (120, 40, 376, 296)
    assert irag_sheet.most_textured(picture.resize((100, 80))) == (0, 0, 100, 80)
    with pytest.raises(SystemExit):
        irag_evidence.main(["--data", "x", "--model", "x", "--sheets", str(Path(irag_sheet.__file__).parent / "x")])
    assert "lies in the repository" in capsys.readouterr().err


def test_scenes_are_spread_over_the_pack(evidence):
    pack = load_pack(evidence[1] / "pack", groups=["pairs"])
    many = replace(pack, queries=tuple(replace(pack.queries[0], scene=str(n // 2), name=str(n)) for n in range(18)))
    assert [query.name for query in irag_evidence.spread(many, 3).queries] == ["0", "1", "8", "9", "16", "17"]
    assert irag_evidence.spread(many, 99) == irag_evidence.spread(many, None) == many
