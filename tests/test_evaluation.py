"""Evaluation on a small pack made of scikit-image's photos."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from pictures import picture
from PIL import Image
from skimage import data

from ragsr.cli import main
from ragsr.codes import load_encoder
from ragsr.errors import InputError
from ragsr.evaluation import evaluate_restore, evaluate_retrieval, interval, load_pack, pack_gallery, ranking
from ragsr.evaluation.pack import load_low, load_truth
from ragsr.evaluation.restoring import mean_scores
from ragsr.evaluation.retrieval import rates
from ragsr.evaluation.retrieval_report import plot
from ragsr.gallery import Gallery
from ragsr.metrics import haarpsi, niqe, psnr, ssim
from ragsr.pipelines import RefSRPipeline

HASH = Path(__file__).parents[1] / "ragsr" / "assets" / "hash" / "hash-64"

PHOTOS = {"multiview/cat": data.chelsea, "pairs/cup": data.coffee, "synthcrop/face": data.astronaut}
SIZE = (120, 100)  # NIQE needs 96 pixels a side


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
    assert rows[0].scores["bicubic"].metrics == {
        "psnr": psnr(enlarged, truth, "irag"),
        "ssim": ssim(enlarged, truth, "irag"),
        "haarpsi": haarpsi(enlarged, truth),
        "niqe": niqe(enlarged),
    }
    restored = RefSRPipeline(Bicubic())(low).image
    assert rows[0].scores["none"].metrics["psnr"] == psnr(restored, truth, "irag")
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
    gains = [row.scores["best"].metrics["psnr"] - row.scores["bicubic"].metrics["psnr"] for row in rows[:3]]
    assert means["best"]["mean_gain"] == pytest.approx(sum(gains) / 3)
    assert means["best"]["worst_gain"] == min(gains)
    values = [row.scores["best"].metrics["niqe"] for row in rows[:3]]
    assert means["best"]["niqe"] == pytest.approx(sum(values) / 3)
    assert means["best"]["intervals"]["niqe"] == interval(values, ["cat", "cup", "face"])


def test_the_interval_covers_the_mean_and_knows_scenes():
    values = np.random.default_rng(0).normal(1, 1, 60)
    low, high = interval(values, [str(i) for i in range(60)])
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 / 60**0.5, rel=0.3)
    repeated = np.repeat(values[:6], 10)
    wide = np.subtract(*interval(repeated, [str(i // 10) for i in range(60)])[::-1])
    assert wide > 1.5 * np.subtract(*interval(repeated, [str(i) for i in range(60)])[::-1])
    assert interval([3.0, 3.0], ["one", "two"]) == (3.0, 3.0)


def test_a_gallery_gives_the_references(pack, tmp_path):
    with Gallery.create(tmp_path / "gallery") as gallery:
        gallery.add([pack / "multiview", pack / "synthcrop"], progress=False)
        rows = evaluate_restore(load_pack(pack), RefSRPipeline(Bicubic()), ["gallery"], gallery, k=2)
    used = [sorted(row.scores["gallery"].references) for row in rows]  # of other scenes none is near enough
    scenes = ("multiview/cat", "synthcrop/face")
    cat, face = ([f"{scene}/query_0.png", f"{scene}/ref_00.jpg"] for scene in scenes)
    assert used == [cat, [], face, []]


def test_retrieved_references_are_those_of_the_pack(pack):
    found = load_pack(pack)
    with pack_gallery(found) as gallery:
        folder = gallery.folder
        rows = evaluate_restore(found, RefSRPipeline(Bicubic()), ["retrieved"], gallery, metrics=["psnr"])
    used = [row.scores["retrieved"].references for row in rows]
    assert used == [*([f"{place}/ref_00.jpg"] for place in PHOTOS), []]  # for a single nothing is like enough
    assert not folder.exists()


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
    command = ["eval", "restore", "--data", str(pack), "--groups", "multiview", "synthcrop"]
    command += ["--reference", "none", "best", "retrieved", "--device", "cpu"]
    assert main([*command, "--json", str(numbers), "--html", str(page)]) == 0
    told = capsys.readouterr().out.splitlines()
    found = json.loads(numbers.read_text())
    assert (found["preset"], found["model"], found["degradation"]) == ("refir", "auto", "bicubic")
    assert set(found["mean"]) == {"bicubic", "none", "best", "retrieved"}
    assert {"commit", "command", "versions", "seconds", "peak_memory_mib", "device"} <= set(found["run"])
    assert found["metrics"]["psnr"]["computed"].startswith("preset refir")
    assert {name: one["better"] for name, one in found["metrics"].items()} == {
        "psnr": "higher",
        "ssim": "higher",
        "haarpsi": "higher",
        "niqe": "lower",
    }
    scores, mean = found["rows"][0]["scores"], found["mean"]["best"]
    photo = next(line for line in told if line.startswith("multiview/cat"))
    assert photo.split()[1:] == [f"{scores[method]['psnr']:.2f}" for method in found["mean"]]
    best = next(line for line in told if line.startswith("best"))
    for name, digits in (("psnr", 2), ("ssim", 4), ("haarpsi", 4), ("niqe", 3)):
        low, high = mean["intervals"][name]
        assert low < mean[name] < high  # of two scenes
        assert f" {mean[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" in best
    assert any("PSNR (refir), dB ↑" in line and "SSIM (refir) ↑" in line and "NIQE ↓" in line for line in told)
    shown = Page(page.read_text())
    assert len(shown.addresses) == 2 * 8  # low quality, truth, bicubic, none, best, retrieved, two references
    assert all(address.startswith("data:image/jpeg;base64,") for address in shown.addresses)
    assert f"best · PSNR (refir), dB {scores['best']['psnr']:.2f} · SSIM (refir) " in page.read_text()


def test_eval_restore_by_chosen_metrics(pack, tmp_path, capsys):
    numbers = tmp_path / "r.json"
    command = [
        "eval",
        "restore",
        "--data",
        str(pack),
        "--degradation",
        "degraded",
        "--limit",
        "1",
        "--reference",
        "none",
    ]
    command += ["--metric", "haarpsi", "ssim", "--features", str(HASH)]
    assert main([*command, "--preset", "irag", "--json", str(numbers)]) == 0
    found = json.loads(numbers.read_text())
    assert list(found["metrics"]) == ["haarpsi", "ssim", "features"]
    assert found["metrics"]["features"]["computed"].endswith("with hash-64")
    scores = found["rows"][0]["scores"]
    assert 0 < scores["none"]["features"] < scores["bicubic"]["features"]
    assert "psnr" not in found["rows"][0]["scores"]["none"]
    assert "mean_gain" not in found["mean"]["none"]
    told = capsys.readouterr().out
    assert told.startswith("HaarPSI ")
    assert "SSIM (irag) ↑" in told
    assert "PSNR" not in told


# ------------------------------------------------------------------ retrieval


WAYS = ["codes", "re-ranked", "cosine"]


def test_retrieval_finds_the_scenes(pack, tmp_path):
    Image.fromarray(data.rocket()).save(tmp_path / "other.png")
    packs = [load_pack(pack, degradation) for degradation in ("bicubic", "degraded")]
    results, candidates = evaluate_retrieval(packs, [load_encoder()], [tmp_path / "other.png"], rerank=True)
    assert candidates == 4
    assert [result.way for result in results] == WAYS
    for result in results:
        assert len(result.rows) == 6  # a single has nothing to find
        for row in result.rows:
            assert len(row.ranked) == len(set(row.ranked)) == 4
            assert (row.hits[0][0] in row.right) == (row.rank == 1)
            assert row.values == sorted(row.values, reverse=result.way != "codes")
        assert [line["group"] for line in rates(result.rows)] == ["multiview", "pairs", "synthcrop", "all"] * 2
    first = {"degradation": "bicubic", "group": "multiview", "queries": 1, "map": 1.0}
    first |= {f"{name}@{k}": 1.0 for name in ("hit", "recall") for k in range(1, 6)}
    assert rates(results[0].rows)[0] == first


def test_ways_of_ranking_agree_with_a_gallery(pack, tmp_path):
    """Codes: the distances of a search. Cosines: those of the encoder's features. Histograms hold every pair."""
    encoder = load_encoder()
    results, _ = evaluate_retrieval([load_pack(pack)], [encoder], rerank=True)
    by = dict(zip(WAYS, results, strict=True))
    with Gallery.create(tmp_path / "gallery") as gallery:
        gallery.add([pack / place / "ref_00.jpg" for place in PHOTOS], progress=False)
        for row in by["codes"].rows:
            distances = {hit.path: hit.distance for hit in gallery.search(row.query.low, 3)}
            assert row.values == [distances[path] for path, _ in row.hits]
    for row in by["cosine"].rows:
        photos = [Image.open(path) for path in (row.query.low, *row.ranked)]
        features = encoder.describe(photos)[1]
        assert row.values == pytest.approx((features[1:] @ features[0]).tolist(), abs=1e-6)
    assert [row.ranked for row in by["re-ranked"].rows] == [row.ranked for row in by["cosine"].rows]  # all are short
    pairs = {way: result.pairs for way, result in by.items()}
    assert pairs["re-ranked"] == {}
    for way, bins in (("codes", 65), ("cosine", 80)):
        assert (sum(pairs[way]["bicubic"].true), sum(pairs[way]["bicubic"].false)) == (3, 6)
        assert len(pairs[way]["bicubic"].true) == len(pairs[way]["bicubic"].edges) - 1 == bins
    seen = [value for row in by["codes"].rows for path, value in row.hits if path in row.right]
    assert pairs["codes"]["bicubic"].true == [seen.count(distance) for distance in range(65)]


def test_only_the_nearest_codes_are_ranked_again(monkeypatch):
    monkeypatch.setattr(ranking, "LEAST", 2)
    monkeypatch.setattr(ranking, "WIDE", 0)
    codes = np.array([[0b1], [0b0], [0b111], [0b11], [0b10]], np.uint8)
    features = np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    query = ranking.Encoded(np.array([[0]], np.uint8), np.array([[0.0, 1.0]], np.float32))
    found = ranking.by_codes_then_cosine(query, ranking.Encoded(codes, features))
    assert found.order.tolist() == [[0, 1, 4, 3, 2]]  # 4 is as near as the second; of equal cosines the nearer code
    assert found.values.tolist() == [pytest.approx([1.0, 0.8, 0.8, 0.6, 0.0], abs=1e-3)]


def test_ranking_again_and_patches_are_those_of_a_gallery(pack, tmp_path):
    """What users get: the first hits of galleries, with and without patches, of the same candidates."""
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    others = sorted(tmp_path.glob("*.png"))
    results, candidates = evaluate_retrieval([load_pack(pack)], [load_encoder()], others, rerank=True, patches=True)
    assert candidates == 11
    by = {result.way: result for result in results}
    assert list(by) == [*WAYS, "patches"]
    for way, patches in (("re-ranked", False), ("patches", True)):
        with Gallery.create(tmp_path / way, patches=patches) as gallery:
            gallery.add([*others, *(pack / place / "ref_00.jpg" for place in PHOTOS)], progress=False)
            for row in by[way].rows:
                hits = gallery.search(row.query.low, 5)
                assert [path for path, _ in row.hits] == [hit.path for hit in hits]
                assert row.values == pytest.approx([hit.cosine for hit in hits], abs=1e-6)
                assert len(set(row.ranked)) == len(row.ranked) == 11


def test_retrieval_repeats_to_the_bit(pack):
    def run(seed):
        results, _ = evaluate_retrieval([load_pack(pack)], [load_encoder()], seed=seed, rerank=True)
        return [(row.ranked, row.values) for result in results for row in result.rows], plot(results)

    assert run(3) == run(3)


def test_retrieval_needs_references(pack):
    with pytest.raises(InputError, match="none of these photos has a reference"):
        evaluate_retrieval([load_pack(pack, groups=["single"])], [load_encoder()])


def test_eval_retrieval_writes_numbers_a_picture_and_a_page(pack, tmp_path, capsys):
    numbers, page, drawn = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.png"
    command = ["eval", "retrieval", "--data", str(pack), "--rerank", "--json", str(numbers), "--html", str(page)]
    assert main([*command, "--plot", str(drawn)]) == 0
    found = json.loads(numbers.read_text())
    assert [(one["encoder"], one["way"]) for one in found["results"]] == [("hash-64@1", way) for way in WAYS]
    assert found["candidates"] == 3
    told = capsys.readouterr().out
    assert "hash-64@1 re-ranked, 3 candidates" in told
    assert re.search(r"bicubic +multiview( +1/1){5} +1.000 +1.000", told)
    addresses = Page(page.read_text()).addresses
    assert len(addresses) == 1 + 6 * (1 + 3)
    assert addresses[0].startswith("data:image/png;base64,")
    assert Image.open(drawn).width > 1000


def test_without_matplotlib(pack, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page, drawn = tmp_path / "r.html", tmp_path / "r.png"
    command = ["eval", "retrieval", "--data", str(pack), "--limit", "1", "--html", str(page), "--plot", str(drawn)]
    assert main(command) == 2
    assert 'pip install "ragsr[train]"' in capsys.readouterr().err
    assert "ragsr[train]" in page.read_text()
    assert not drawn.exists()


# ------------------------------------------------------------------ CUFED5


@pytest.fixture(scope="module")
def cufed5(tmp_path_factory):
    """126 groups as the set is handed out: NNN_0 is asked for, NNN_1 to NNN_5 are less and less like it."""
    folder = tmp_path_factory.mktemp("CUFED5")
    for number in range(126):
        photo, other = picture(number, 37, 30), picture(1000 + number, 37, 30)
        photo.save(folder / f"{number:03}_0.png", compress_level=0)
        for place in range(1, 6):
            Image.blend(photo, other, place / 7).save(folder / f"{number:03}_{place}.png", compress_level=0)
    return folder


def test_cufed5_is_a_pack(cufed5):
    found = load_pack(cufed5)
    assert (len(found.queries), len(found.references), found.degradation) == (126, 630, "bicubic")
    assert found.queries[7].best == tuple(f"007_{place}.png" for place in range(1, 6))
    assert (load_low(found.queries[7]).size, load_truth(found.queries[7]).size) == ((9, 7), (36, 28))
    assert len(load_pack(cufed5, limit=3).queries) == 3
    with pytest.raises(InputError, match="is CUFED5, which has no degraded copies"):
        load_pack(cufed5, "degraded")


def test_cufed5_without_references(tmp_path):
    picture(0).save(tmp_path / "000_0.png")
    with pytest.raises(InputError, match=r"000_0.png: has no references 000_1.png to 000_5.png"):
        load_pack(tmp_path)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["restore", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["retrieval", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["retrieval", "--data", "PACK", "--encoder", "magic"], "no encoder 'magic'"),
        (["retrieval", "--data", "PACK", "--candidates", "nowhere"], "nowhere: there is no such file"),
        (["restore", "--data", "PACK", "--preset", "best"], "no preset 'best'; there are: refir"),
        (
            ["restore", "--data", "PACK", "--metric", "beauty"],
            "no metric 'beauty'; there are: psnr, ssim, haarpsi, niqe",
        ),
        (["restore", "--data", "PACK", "--metric", "psnr", "lpips"], 'pip install "ragsr[metrics]"'),
        (["restore", "--data", "PACK", "--model", "magic"], "'magic'"),
        (["restore", "--data", "PACK", "--gallery", "nowhere"], "nowhere: no gallery there"),
        (["restore", "--data", "PACK", "--limit", "-1"], "limit is -1"),
    ],
)
def test_bad_input(pack, capsys, arguments, message):
    assert main(["eval", *(str(pack) if a == "PACK" else a for a in arguments)]) == 2
    assert message in capsys.readouterr().err
