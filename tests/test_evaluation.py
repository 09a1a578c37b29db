"""Evaluation on a small pack made of scikit-image's photos."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch.nn.functional as F
from PIL import Image
from skimage import data

from ragsr.cli import main
from ragsr.codes import load_encoder
from ragsr.errors import InputError
from ragsr.evaluation import evaluate_restore, evaluate_retrieval, load_pack
from ragsr.evaluation.restoring import mean_scores
from ragsr.evaluation.retrieval import hit_rates
from ragsr.gallery import Gallery
from ragsr.metrics import psnr, ssim
from ragsr.pipelines import RefSRPipeline

PHOTOS = {"multiview/cat": data.chelsea, "pairs/cup": data.coffee, "synthcrop/face": data.astronaut}
SIZE = (96, 80)


class Bicubic:
    name, scale, context = "bicubic", 4, 2

    def prepare(self, references):
        return len(references)

    def __call__(self, low, prepared):
        restored = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)
        return restored, restored.new_full((1, 1, *restored.shape[2:]), float(prepared > 0))


@pytest.fixture
def pack(tmp_path):
    """A pack of three scenes with one reference each, and one single."""
    folder, truth = tmp_path / "pack", {}
    for degradation in ("bicubic", "degraded"):
        (folder / f"lq_{degradation}_x4").mkdir(parents=True)
    for place, photo in PHOTOS.items():
        scene = place.split("/")[1]
        (folder / place).mkdir(parents=True)
        picture = Image.fromarray(photo())
        picture.resize((150, 120)).save(folder / place / "ref_00.jpg")
        add_photo(folder, picture, f"{place}/query_0.png", f"{scene}_query_0.png")
        reference = f"{place}/ref_00.jpg"
        truth[f"{place}/query_0.png"] = {"scene": scene, "best": [reference], "same_scene": [reference]}
    (folder / "single").mkdir()
    add_photo(folder, Image.fromarray(data.rocket()), "single/rocket.png", "rocket.png")
    (folder / "retrieval_truth.json").write_text(json.dumps(truth))
    return folder


def add_photo(folder, picture, truth, low):
    good = picture.resize(SIZE)
    good.save(folder / truth)
    bad = good.resize((SIZE[0] // 4, SIZE[1] // 4), Image.Resampling.BICUBIC)
    bad.save(folder / "lq_bicubic_x4" / low)
    bad.save(folder / "lq_degraded_x4" / low, quality=30)


# ------------------------------------------------------------------ the pack


def test_a_pack_is_read_in_the_order_of_its_table(pack):
    found = load_pack(pack)
    assert [query.name for query in found.queries] == [*(f"{p}/query_0.png" for p in PHOTOS), "single/rocket.png"]
    assert found.references == tuple(sorted(f"{place}/ref_00.jpg" for place in PHOTOS))
    assert found.queries[1].low == pack / "lq_bicubic_x4" / "cup_query_0.png"
    assert [q.group for q in load_pack(pack, "degraded", ("single", "pairs")).queries] == ["pairs", "single"]
    assert len(load_pack(pack, limit=2).queries) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "retrieval_truth.json").unlink(), "retrieval_truth.json: is missing"),
        (lambda p: (p / "retrieval_truth.json").write_text("[1]"), "is not the table of an evaluation pack"),
        (lambda p: (p / "retrieval_truth.json").write_text('{"a": {}}'), r"not the table .*KeyError\('scene'\)"),
        (lambda p: (p / "multiview/cat/ref_00.jpg").unlink(), "1 files are missing, the first is multiview"),
        (lambda p: (p / "lq_bicubic_x4/rocket.png").unlink(), "1 files are missing, the first is lq_bicubic_x4"),
    ],
)
def test_damaged_packs(pack, damage, message):
    damage(pack)
    with pytest.raises(InputError, match=message):
        load_pack(pack)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"degradation": "awful"}, "no degradation 'awful'; there are: bicubic, degraded"),
        ({"groups": ["pictures"]}, "no photos of the groups pictures"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_choices_that_cannot_be(pack, choice, message):
    with pytest.raises(InputError, match=message):
        load_pack(pack, **choice)


# ------------------------------------------------------------------ restoring


def test_scores_are_those_of_the_restored_photo(pack):
    found = load_pack(pack)
    rows = evaluate_restore(found, RefSRPipeline(Bicubic()), preset="irag")
    truth, low = Image.open(found.queries[0].truth), Image.open(found.queries[0].low)
    enlarged = low.resize(SIZE, Image.Resampling.BICUBIC)
    assert rows[0].scores["bicubic"].psnr == psnr(enlarged, truth, "irag")
    assert rows[0].scores["bicubic"].ssim == ssim(enlarged, truth, "irag")
    restored = RefSRPipeline(Bicubic())(low).image
    assert rows[0].scores["none"].psnr == psnr(restored, truth, "irag")
    assert rows[0].scores["best"].references == ["multiview/cat/ref_00.jpg"]
    assert (rows[0].scores["none"].reference_share, rows[0].scores["best"].reference_share) == (0, 1)


def test_random_references_are_wrong_and_repeatable(pack):
    found = load_pack(pack)
    draws = {}
    for seed in range(2):
        rows, again = (evaluate_restore(found, RefSRPipeline(Bicubic()), ["random"], seed=seed) for _ in range(2))
        draws[seed] = [row.scores["random"].references[0] for row in rows]
        assert draws[seed] == [row.scores["random"].references[0] for row in again]
        assert all(query.scene not in path.split("/") for query, path in zip(found.queries, draws[seed], strict=True))
    assert len(set(map(tuple, draws.values()))) > 1


def test_a_photo_without_references_has_no_best(pack):
    rows = evaluate_restore(load_pack(pack), RefSRPipeline(Bicubic()))
    assert set(rows[-1].scores) == {"bicubic", "none", "random"}
    means = mean_scores(rows)
    assert {name: m["photos"] for name, m in means.items()} == {"bicubic": 4, "none": 4, "best": 3, "random": 4}
    assert means["bicubic"]["mean_gain"] == means["bicubic"]["worst_gain"] == 0
    gains = [row.scores["best"].psnr - row.scores["bicubic"].psnr for row in rows[:3]]
    assert means["best"]["mean_gain"] == pytest.approx(sum(gains) / 3)
    assert means["best"]["worst_gain"] == min(gains)


def test_a_gallery_gives_the_references(pack, tmp_path):
    with Gallery.create(tmp_path / "gallery") as gallery:
        gallery.add([pack / "multiview", pack / "synthcrop"], progress=False)
        rows = evaluate_restore(load_pack(pack), RefSRPipeline(Bicubic()), ["gallery"], gallery, k=2)
    assert all(len(row.scores["gallery"].references) == 2 for row in rows)


class Page(HTMLParser):
    """The addresses and the number of pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_eval_restore_writes_numbers_and_a_page(pack, tmp_path, capsys):
    numbers, page = tmp_path / "out" / "r.json", tmp_path / "out" / "r.html"
    command = ["eval", "restore", "--data", str(pack), "--groups", "multiview", "--reference", "none", "best"]
    assert main([*command, "--json", str(numbers), "--html", str(page), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert (found["preset"], found["model"], found["degradation"]) == ("refir", "refnet", "bicubic")
    assert set(found["mean"]) == {"bicubic", "none", "best"}
    assert {"commit", "command", "versions", "seconds", "peak_memory_mib", "device"} <= set(found["run"])
    scores = found["rows"][0]["scores"]
    assert "(refir)" in told
    assert f"{scores['best']['psnr']:.2f} / {scores['best']['ssim']:.4f}" in told
    shown = Page(page.read_text())
    assert len(shown.addresses) == 6  # low quality, truth, bicubic, none, best, its reference
    assert all(address.startswith("data:image/jpeg;base64,") for address in shown.addresses)
    assert "refir" in page.read_text()


# ------------------------------------------------------------------ retrieval


def test_retrieval_finds_the_scenes(pack, tmp_path):
    Image.fromarray(data.rocket()).save(tmp_path / "other.png")
    packs = [load_pack(pack, degradation) for degradation in ("bicubic", "degraded")]
    rows, candidates = evaluate_retrieval(packs, load_encoder(), [tmp_path / "other.png"])
    assert candidates == 4
    assert len(rows) == 6  # a single has nothing to find
    for row in rows:
        assert len(row.hits) == 4
        assert (row.hits[0][0] in row.right) == (row.rank == 1)
        assert [distance for _, distance in row.hits] == sorted(distance for _, distance in row.hits)
    assert hit_rates(rows)[0] == {"degradation": "bicubic", "group": "multiview", "queries": 1, "hit@1": 1, "hit@5": 1}
    assert [line["group"] for line in hit_rates(rows)] == ["multiview", "pairs", "synthcrop", "all"] * 2


def test_retrieval_needs_references(pack):
    with pytest.raises(InputError, match="none of these photos has a reference"):
        evaluate_retrieval([load_pack(pack, groups=["single"])], load_encoder())


def test_eval_retrieval_writes_numbers_and_a_page(pack, tmp_path, capsys):
    numbers, page = tmp_path / "r.json", tmp_path / "r.html"
    assert main(["eval", "retrieval", "--data", str(pack), "--json", str(numbers), "--html", str(page)]) == 0
    found = json.loads(numbers.read_text())
    assert (found["encoder"], found["candidates"]) == ("baseline-64@1", 3)
    assert re.search(r"bicubic +multiview +1/1 100%", capsys.readouterr().out)
    assert len(Page(page.read_text()).addresses) == 6 * (1 + 3)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restore", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["retrieval", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["retrieval", "--data", "PACK", "--encoder", "magic"], "no encoder 'magic'"),
        (["retrieval", "--data", "PACK", "--candidates", "nowhere"], "nowhere: there is no such file"),
        (["restore", "--data", "PACK", "--preset", "best"], "no preset 'best'; there are: refir"),
        (["restore", "--data", "PACK", "--model", "magic"], "'magic'"),
        (["restore", "--data", "PACK", "--gallery", "nowhere"], "nowhere: no gallery there"),
        (["restore", "--data", "PACK", "--limit", "-1"], "limit is -1"),
    ],
)
def test_bad_input(pack, capsys, arguments, message):
    assert main(["eval", *(str(pack) if a == "PACK" else a for a in arguments)]) == 2
    assert message in capsys.readouterr().err
