"""TTSR against the recorded original, and what ragsr adds to it: any sizes, several references, bounded memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ragsr.errors import InputError
from ragsr.models import ttsr, views
from ragsr.models.ttsr import TTSR, Textures, TTSRNet, blur, canvas_of, net_of
from ragsr.models.ttsr_net import CELLS, enlarge
from ragsr.ops import gather_fold, match
from ragsr.pipelines import RefSRPipeline
from tests.golden import FULL, HERE

FOLDER = (FULL if (FULL / "ttsr_tiny").is_dir() else HERE) / "ttsr_tiny"
GOLDEN = {n: x.float() if x.is_floating_point() else x for n, x in load_file(FOLDER / "tensors.safetensors").items()}
META = json.loads((FOLDER / "meta.json").read_text())
WEIGHTS = {n.removeprefix("weights."): x for n, x in GOLDEN.items() if n.startswith("weights.")}
INVENTORY = FULL / "inventories" / "ttsr.json"
PUBLISHED = 7_284_955  # parameters, a second LTE for a training loss counted in


@pytest.fixture(scope="module")
def net() -> TTSRNet:
    return net_of(WEIGHTS, "golden")


@pytest.fixture(scope="module")
def model() -> TTSR:
    return TTSR(small())


def small(blocks: tuple[int, ...] = (1, 1, 1, 1), channels: int = 4) -> TTSRNet:
    torch.manual_seed(0)
    return TTSRNet(channels, blocks)


def picture(*size: int, seed: int = 0) -> Tensor:
    """Noise of several scales, [1, 3, H, W] in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, -(-size[0] // 4), -(-size[1] // 4), generator=random)
    fine = torch.rand(1, 3, *size, generator=random)
    return (0.7 * enlarge(coarse, 4)[..., : size[0], : size[1]] + 0.3 * fine).clamp(0, 1)


# ------------------------------------------------------------------ the recorded original


def expect(name: str, found: Tensor) -> None:
    if f"output.{name}" in GOLDEN:  # the copy that travels with the project lacks three
        torch.testing.assert_close(found, GOLDEN[f"output.{name}"], rtol=0, atol=META["atol_per_output"][name])


def expect_all(prefix: str, net: TTSRNet, textures: Textures) -> None:
    image, score = net(GOLDEN["input.lr"], GOLDEN["input.lq"], textures)
    found = net.transfer(GOLDEN["input.lq"], textures)
    expect(f"{prefix}out", image)
    expect(f"{prefix}S", score)
    sure = GOLDEN[f"output.{prefix}margin"] > 1e-5
    assert sure.float().mean() > 0.9
    assert torch.equal(found.index.flatten(1)[sure], GOLDEN[f"output.{prefix}argmax"][sure])
    expect(f"{prefix}T_lv3", found.level(3))
    if not prefix:
        expect("T_lv2", found.level(2))
        expect("T_lv1", found.level(1))


@torch.no_grad()
def test_golden(net):
    textures = net.textures([GOLDEN["input.ref"]])
    expect("refsr", blur(GOLDEN["input.ref"]))
    expect("lte_lv3_ref", net.LTE(GOLDEN["input.ref"])[2])
    expect_all("", net, textures)
    low = torch.nn.functional.interpolate(GOLDEN["input.lq"], scale_factor=1 / 4, mode="bicubic")
    expect("out_without_lr", net(low, GOLDEN["input.lq"], textures)[0])


@torch.no_grad()
def test_golden_with_a_reference_of_another_size(net):
    searched = net.LTE(GOLDEN["input.other_refsr"])[2]
    expect_all("other_size.", net, Textures((searched,), canvas_of([net.LTE(GOLDEN["input.other_ref"])])))


# ------------------------------------------------------------------ names, shapes, files


def published() -> TTSRNet:
    with torch.device("meta"):
        return TTSRNet()


def test_published_size():
    parts = {part: sum(x.numel() for x in getattr(published(), part).parameters()) for part in ("MainNet", "LTE")}
    assert parts["MainNet"] + 2 * parts["LTE"] == PUBLISHED


@pytest.mark.skipif(not INVENTORY.is_file(), reason="the inventories of the originals are not beside the checkout")
def test_names_and_shapes_are_the_published_ones():
    listed = json.loads(INVENTORY.read_text())["state_dict"]
    wanted = {name: shape for name, shape in listed.items() if not name.startswith("LTE_copy.")}
    assert {name: list(x.shape) for name, x in published().state_dict().items()} == wanted


def saved(path: Path, net: TTSRNet, prefix: str = "", **others: Tensor) -> Path:
    weights = {prefix + name: x for name, x in net.state_dict().items()}
    save_file({**weights, **others}, path) if path.suffix == ".safetensors" else torch.save({**weights, **others}, path)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("prefix", ["", "core.", "restoration_module.core."])
def test_load_reads_width_and_depth_from_the_file(tmp_path, name, prefix):
    net = small((2, 3, 1, 0), channels=6)
    others = {f"{prefix}LTE_copy.slice1.0.weight": torch.zeros(1)}
    if prefix:
        others["model.diffusion"] = torch.zeros(2)
    loaded = TTSR.load(saved(tmp_path / name, net, prefix, **others)).net
    assert loaded.context == net.context
    assert loaded.state_dict().keys() == net.state_dict().keys()
    for key, x in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], x)


def test_the_first_wrong_shape_is_named(tmp_path):
    weights = small().state_dict()
    weights["MainNet.conv12.weight"] = weights["MainNet.conv12.weight"][:8].clone()
    weights["LTE.slice1.0.bias"] = torch.zeros(63)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"x.safetensors: MainNet.conv12.weight has shape \(8, 4, 3, 3\), .*\(16, 4, 3, 3"
    ):
        TTSR.load(tmp_path / "x.safetensors")


def test_refuses_files_and_scales(tmp_path):
    with pytest.raises(InputError, match="enlarges 4 times, not 2"):
        TTSR.load(tmp_path / "x.pt", 2)
    torch.save({"head.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: no weights of TTSR"):
        TTSR.load(tmp_path / "x.pt")


def test_a_new_network_normalises_like_the_recorded_one():
    own = small().LTE.sub_mean.state_dict()
    for part in ("weight", "bias"):
        torch.testing.assert_close(own[part], WEIGHTS[f"core.LTE.sub_mean.{part}"], rtol=0, atol=1e-6)


# ------------------------------------------------------------------ references


def test_two_copies_of_a_reference_are_one(model):
    low, reference = picture(9, 7), picture(24, 36, seed=1)
    one, two = (model(low, model.prepare([reference] * n)) for n in (1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    earlier = model.net.transfer(enlarge(2 * low - 1, 4), model.prepare([reference] * 2))
    assert earlier.index.max() < 6 * 9


@torch.no_grad()
@pytest.mark.parametrize("order", ["good last", "good first", "good between"])
def test_the_far_better_reference_wins_and_counts_as_if_alone(model, order):
    low = picture(10, 8)
    good = enlarge(low, 4).clamp(0, 1)
    others = [torch.full((1, 3, 20, 60), 0.3), torch.zeros(1, 3, 17, 9)]
    place = {"good first": 0, "good between": 1, "good last": 2}[order]
    several = model.prepare([*others[:place], good, *others[place:]])
    alone = model.prepare([good])
    query = enlarge(2 * low - 1, 4)
    found, wanted = model.net.transfer(query, several), model.net.transfer(query, alone)
    assert torch.equal(found.score, wanted.score)
    for level in (1, 2, 3):
        assert torch.equal(found.level(level), wanted.level(level))


@torch.no_grad()
def test_references_do_not_leak_into_each_other(net):
    """Every patch of the canvas, edges included, is what the reference alone would give."""
    maps = [tuple(torch.rand(1, 2, 4 * h // f, 4 * w // f) for f in (1, 2, 4)) for h, w in [(2, 3), (3, 2), (1, 5)]]
    canvas = canvas_of(maps)
    top = 0
    for levels in maps:
        h, w = levels[2].shape[2:]
        own = torch.arange(h * w).flip(0).view(1, h, w)
        moved = (own // w + top) * canvas[2].shape[3] + own % w
        for level, stride in zip(range(3), CELLS, strict=True):
            args = {"patch": 3 * stride, "stride": stride}
            wanted = gather_fold(levels[level], own, **args)
            assert torch.equal(gather_fold(canvas[level], moved, **args), wanted)
        top += h + 1


@torch.no_grad()
def test_no_reference_is_a_score_of_zero(net):
    low, enlarged = GOLDEN["input.lr"], GOLDEN["input.lq"]
    found = net.transfer(enlarged, net.textures([GOLDEN["input.ref"]]))
    image, score = net(low, enlarged, net.textures([]))
    assert (score == 0).all()
    assert torch.equal(image, net.MainNet(low, replace(found, score=torch.zeros_like(found.score))))
    assert not torch.equal(image, net.MainNet(low, found))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 20)])
@pytest.mark.parametrize("references", [[(8, 8)], [(9, 34), (15, 11)], []])
def test_any_size(model, size, references):
    restored, weight = model(picture(*size), model.prepare([picture(*one) for one in references]))
    assert restored.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert weight.shape == (1, 1, 4 * size[0], 4 * size[1])
    for x in (restored, weight):
        assert 0 <= x.min() <= x.max() <= 1
    assert weight.any() == bool(references)


def test_large_references_are_reduced(monkeypatch):
    monkeypatch.setattr(views, "MAX_PIXELS", 1000)
    fitted = ttsr.fit(picture(90, 50))
    assert fitted.shape[2:] == (44, 24)  # 42 × 23, continued to multiples of 4


@pytest.mark.parametrize(
    ("low", "reference", "message"),
    [
        (torch.rand(3, 8, 8), torch.rand(1, 3, 9, 9), r"low-quality image has shape \(3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), torch.nan), torch.rand(1, 3, 9, 9), "low-quality image contains NaN"),
        (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 7, 90), "reference has shape .* at least 8 pixels"),
    ],
)
def test_refuses_images(model, low, reference, message):
    with pytest.raises(InputError, match=message):
        model(low, model.prepare([reference]))


# ------------------------------------------------------------------ training, tiles, memory


def test_gradients_reach_every_parameter_but_the_normalisation():
    net = small((1, 1, 1, 1), channels=8)
    low = 2 * picture(6, 5) - 1
    textures = net.textures([2 * picture(24, 20, seed=1) - 1, 2 * picture(16, 32, seed=2) - 1])
    net(low, enlarge(low, 4), textures)[0].square().mean().backward()
    idle = [name for name, x in net.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0]
    assert idle == ["LTE.sub_mean.weight", "LTE.sub_mean.bias"]


def test_the_score_alone_trains_the_extractor():
    net = small()
    low = 2 * picture(6, 5) - 1
    net.transfer(enlarge(low, 4), net.textures([2 * picture(24, 20, seed=1) - 1])).score.mean().backward()
    assert all(x.grad.abs().sum() > 0 for name, x in net.LTE.named_parameters() if "slice" in name)


@pytest.mark.parametrize("blocks", [(1, 1, 1, 1), (3, 1, 0, 1)])
def test_a_pixel_depends_on_no_more_than_the_context(blocks):
    model = TTSR(small(blocks))
    width = model.context + 6
    low = picture(5, width + 12)
    prepared = model.prepare([picture(16, 40, seed=1)])
    whole, part = (model(x, prepared) for x in (low, low[..., :width]))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[..., :24], b[..., :24], rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [(4, 1, 1, 1), (4, 2, 0, 3)])
def test_the_context_is_not_wasteful(blocks):
    """With positive weights no influence dies in a ReLU, so the gradient shows how far the network looks."""
    net = small(blocks, channels=2).double()
    with torch.no_grad():
        for x in net.MainNet.parameters():
            x.abs_()
        net.MainNet.merge_tail.conv_tail2.weight.mul_(1e-6)  # nothing is clamped
    middle = net.context + 4
    low = torch.zeros(1, 3, 1, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    net.MainNet(low, None)[..., 4 * middle : 4 * middle + 4].sum().backward()
    seen = low.grad.abs().sum((0, 1, 2)).nonzero()
    assert net.context - 6 <= middle - seen.min() <= net.context


def test_context_of_the_published_size():
    assert published().context == 104


def test_references_are_extracted_once(model, monkeypatch):
    prepared = model.prepare([picture(16, 16, seed=1), picture(12, 20, seed=2)])
    calls = []
    handle = model.net.LTE.slice1.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    model(picture(5, 6), prepared)
    handle.remove()
    assert calls == [(1, 3, 20, 24)]


def test_a_photo_is_searched_once_and_tiles_agree(monkeypatch):
    """Whatever the tiles and however many rows are searched at a time. Margins that get narrower leave no trace."""
    model = TTSR(small((1, 1, 1, 1)))
    low, references = picture(18, 130, seed=3), [picture(24, 40, seed=1), picture(20, 36, seed=2)]
    prepared = model.prepare(references)
    whole, weight = model(low, prepared)
    searched = []
    monkeypatch.setattr(ttsr, "BAND", 130 * 4)
    search = ttsr.correlation_topk
    monkeypatch.setattr(
        ttsr, "correlation_topk", lambda a, *rest, **more: searched.append(a) or search(a, *rest, **more)
    )
    parts = RefSRPipeline(model, tile=64).restore(low, prepared)
    assert len(searched) == 5  # bands of 4 rows
    assert sum(a.shape[2] for a in searched) <= 18 + 2 * 5
    torch.testing.assert_close(parts[0], whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[1], weight, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("missing", [0, 3])
def test_margins_are_cut_to_what_the_next_stages_need(missing):
    """To all of it, in float64: with 3 pixels less the result would be another."""
    net = small((1, 1, 1, 1)).double()
    low = 2 * picture(5, 130).double() - 1
    found = net.transfer(enlarge(low, 4), net.textures([2 * picture(16, 60, seed=1).double() - 1]))
    first, second, third = net.MainNet.reach
    net.MainNet.reach = (first, second - missing, third - missing)
    seen = []
    net.MainNet.ex123.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[3]))
    cut, whole = net.MainNet(low, found, (50, 40, 0, 0)), net.MainNet(low, found)
    assert seen == [40 + 2 * (third - missing), 130]
    difference = (cut - whole)[..., 200:360].abs().max()
    assert difference < 1e-13 if missing == 0 else difference > 1e-12
    assert (cut[..., 0] == 0).all()


def test_the_relevance_matrix_is_never_stored(monkeypatch):
    """64 × 64 positions against as many: 64 MiB if it were."""
    monkeypatch.setattr(match, "BLOCK", 512)
    model = TTSR(small())
    low, reference = picture(64, 64), picture(256, 256, seed=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(low, model.prepare([reference]))
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert 64 * 256**2 * 4 <= largest < (64 * 64) ** 2 * 4 / 2  # level 1 is seen, so the count is alive
