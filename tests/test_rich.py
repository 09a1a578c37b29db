"""`quality="rich"`: the reference stage and then diffusion, on a tiny model with random weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

pytest.importorskip("diffusers")

import ragsr  # what follows needs diffusers
from ragsr.cli import main
from ragsr.errors import InputError
from ragsr.models import load_model
from ragsr.models.fusion import FusionNet
from ragsr.models.refnet import RefNet, save_model
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
    assert pixels(faithful) == pixels(ragsr.restore(LOW, references=REFERENCE))  # of the shipped refnet
    assert "diffuse" not in faithful.milliseconds
    rich, again, other = (
        ragsr.restore(LOW, references=REFERENCE, model=folder, quality="rich", steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert rich.image.size == (160, 128)
    assert rich.milliseconds["diffuse"] > 0
    assert torch.equal(rich.weight, faithful.weight)
    assert pixels(rich) == pixels(again)
    assert len({pixels(rich), pixels(faithful), pixels(other)}) == 3


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
    assert load_pipeline(model=folder).model.net.config == load_model().net.config


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


@pytest.fixture(scope="module")
def ablations():
    path = Path(__file__).parents[1] / "benchmarks" / "irag_ablations.py"
    spec = importlib.util.spec_from_file_location("irag_ablations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pack(folder):
    """Two scenes, a photo and a reference of each."""
    truths = {}
    (folder / "lq_bicubic_x4").mkdir(parents=True)
    for scene in ("astronaut", "coffee"):
        place = folder / "pairs" / scene
        place.mkdir(parents=True)
        good = Image.fromarray(getattr(data, scene)()).crop((100, 0, 228, 128))
        good.save(place / "query_0.png")
        good.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "lq_bicubic_x4" / f"{scene}_query_0.png")
        good.rotate(3).save(place / "ref_00.png")
        reference = f"pairs/{scene}/ref_00.png"
        truths[f"pairs/{scene}/query_0.png"] = {"scene": scene, "best": [reference], "same_scene": [reference]}
    (folder / "retrieval_truth.json").write_text(json.dumps(truths))


def test_ablations(ablations, folder, tmp_path, capsys):
    write_pack(tmp_path / "pack")
    command = ["--data", str(tmp_path / "pack"), "--groups", "pairs", "--model", f"mine={folder}", "--steps", "1"]
    assert ablations.main([*command, "--stage", "transfer", "--json", str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["photos"] == 2
    assert list(document["tables"]["mine"]) == ["whole", "-H", "-RM", "-R", "faithful"]
    assert list(document["tables"]["transfer"]) == ["found", "random", "none"]
    rows = document["tables"]["mine"]
    assert rows["whole"]["psnr"]["difference"] == 0
    assert len({row["psnr"]["mean"] for row in rows.values()}) >= 4  # every part counts; random may be ignored as none
    assert rows["-RM"]["haarpsi"]["difference"] != 0
    assert "-RM" in capsys.readouterr().out


def test_the_interval_covers_the_mean_and_knows_scenes(ablations):
    values = np.random.default_rng(0).normal(1, 1, 60)
    low, high = ablations.interval(values, [str(i) for i in range(60)], 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 / 60**0.5, rel=0.3)
    repeated = np.repeat(values[:6], 10)
    wide = np.subtract(*ablations.interval(repeated, [str(i // 10) for i in range(60)], 0)[::-1])
    assert wide > 1.5 * np.subtract(*ablations.interval(repeated, [str(i) for i in range(60)], 0)[::-1])
