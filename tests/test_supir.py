"""SUPIR: its networks and its sampler against recorded runs of the original."""

import math

import pytest
import torch
from golden import golden_cases, golden_inventory, golden_item
from tiny_hosts import check_recorded_injection

from ragsr.chains import PRESETS, installed
from ragsr.chains.attention import tap_hook
from ragsr.hosts import supir_sampler as sampling
from ragsr.hosts.supir import SUPIRHost
from ragsr.hosts.supir_files import diffusers_encoder
from ragsr.hosts.supir_layers import Sizes, ZeroCrossAttn
from ragsr.hosts.supir_net import GLVControl, LightGLVUNet

RECORDED = Sizes(channels=32, multipliers=(1, 2, 2), depths=(0, 1, 1), context=24, vector=20, head=32)


# ------------------------------------------------------------------ recorded runs of the original


class Recorded:
    """The recorded U-Net as the host of a run."""

    name = "recorded"
    self_attentions = SUPIRHost.self_attentions

    def __init__(self):
        self.case = golden_item("supir_unet_tiny")
        self.network = loaded(LightGLVUNet(RECORDED), self.case.weights("weights.unet."))

    def run(self, rows=slice(None)):
        control = [self.case.tensors[f"control.{i}"][rows] for i in range(10)]
        return self.network(*(x[rows] for x in inputs(self.case, "xt", "timesteps", "context", "y")), control)


def loaded(network, weights):
    network.load_state_dict(weights)  # strict: the names are the published ones
    return network.eval()


def inputs(case, *names):
    return tuple(case.tensors[f"input.{name}"] for name in names)


@torch.no_grad()
def test_golden_control():
    case = golden_item("supir_unet_tiny")
    net = loaded(GLVControl(RECORDED), case.weights("weights.control."))
    for i, found in enumerate(net(*inputs(case, "lq_latent", "timesteps", "xt", "context", "y"))):
        case.check(f"control.{i}", found)


@torch.no_grad()
def test_golden_injection():
    """Both chains in one batch as recorded, and one after the other, which is the same."""
    host = Recorded()
    host.case.check("plain.out", host.run())
    with installed(host, PRESETS["released-supir"]) as state:
        for i in (6, 7, 8):  # no attention uses these, but they were recorded
            first = host.network.output_blocks[i][0]
            first.register_forward_pre_hook(tap_hook(state, f"output_blocks.{i}.0"), with_kwargs=True)
        check_recorded_injection(host, state, [f"output_blocks.{i}.0" for i in range(9)])


def test_layers_are_those_recorded():
    host = Recorded()
    layers = host.self_attentions("block")
    decoder = [layer for layer in layers if layer.part == "decoder"]
    assert len(decoder) == host.case.config["injected_self_attentions"]
    assert [layer.stride for layer in decoder] == [4, 4, 4, 2, 2, 2]
    assert [layer.stride for layer in layers if layer.part == "encoder"] == [2, 2, 4, 4]
    called, tapped = [], []
    for layer in layers:
        layer.attention.register_forward_pre_hook(lambda module, _: called.append(module))
        layer.tap.register_forward_pre_hook(lambda _, args: tapped.append(args[0].shape[2:]))
    host.run()
    assert called == [layer.attention for layer in layers]  # in the order of execution
    height, width = host.case.tensors["input.xt"].shape[2:]
    assert tapped[-1] == (height // 2, width // 2)


def test_any_size():
    """Sides that are not multiples of 4, as tiles have them."""
    torch.manual_seed(0)
    net, control = LightGLVUNet(RECORDED).eval(), GLVControl(RECORDED).eval()
    x, t, context, vector = torch.randn(1, 4, 9, 14), torch.tensor([3]), torch.randn(1, 5, 24), torch.randn(1, 20)
    with torch.no_grad():
        assert net(x, t, context, vector, control(x, t, x, context, vector)).shape == x.shape


@pytest.mark.parametrize("case", [c for c in golden_cases("supir_zerosft") if c.name.startswith("cross")], ids=str)
@torch.no_grad()
def test_golden_cross_attention(case):
    sizes = case.config
    layer = loaded(ZeroCrossAttn(sizes["query_channels"], sizes["context_channels"]), case.weights())
    case.check("out", layer(case.tensors["x"], case.tensors["context"], sizes["control_scale"]))


@pytest.mark.parametrize(("kind", "model"), [(LightGLVUNet, "supir_unet"), (GLVControl, "supir_control")])
def test_names_and_shapes_are_the_published_ones(kind, model):
    with torch.device("meta"):
        network = kind()
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == golden_inventory(model)


def test_names_of_the_robust_encoder():
    from diffusers.models.autoencoders.vae import Encoder

    with torch.device("meta"):
        published = {n: torch.empty(shape) for n, shape in golden_inventory("supir_denoise_encoder").items()}
        own = Encoder(3, 4, ("DownEncoderBlock2D",) * 4, (128, 256, 512, 512)).state_dict()
    assert {n: x.shape for n, x in diffusers_encoder(published).items()} == {n: x.shape for n, x in own.items()}


def test_golden_sampler(monkeypatch):
    case = golden_item("supir_edm")
    numbers, settings = case.tensors, case.config["config"]
    whole = sampling.Schedule(settings["n"], settings["s_churn"], settings["s_noise"])
    churned = [whole.churned_sigma(i) for i in range(whole.steps)]
    case.check("denoiser_sigmas", sampling.levels())
    case.check("sigmas", torch.tensor(whole.sigmas))
    case.check("sigma_hat", torch.tensor(churned))
    guidance = [sampling.guidance_at(s, settings["cfg"], settings["cfg0"]) for s in churned]
    case.check("cfg_scale_at_sigma_hat", torch.tensor(guidance))
    assert [sampling.nearest_level(s)[0] for s in churned] == numbers["denoiser_index_at_sigma_hat"].tolist()
    assert [sampling.nearest_level(s)[0] for s in whole.sigmas[:-1]] == numbers["timesteps_at_sigmas"].tolist()

    run = sampling.RestoreEDM(sampling.Schedule(settings["n2"], settings["s_churn"], settings["s_noise"]))
    draws = iter([numbers["input.noise"], *(noise[:1] for noise in numbers["run.churn_noise"])])
    monkeypatch.setattr(sampling, "draw", lambda *_: next(draws))
    x = run.start(numbers["input.x_center"], torch.Generator())
    case.check("run.x_start", x)
    for i in range(run.steps):
        seen = run.model_input(x, i, torch.Generator())
        timestep, sigma = sampling.nearest_level(float(run.level(i)[0]))
        assert [timestep] * 4 == numbers["run.timesteps"][i].tolist()
        scaled = seen / (1 + sigma**2) ** 0.5
        steered = 0.5 * scaled + 0.3 * torch.tanh(numbers["input.control"]) * settings["cs"]
        halves = [steered + numbers[f"input.{half}"] - 0.1 * math.sin(timestep / 200) for half in ("uncond", "cond")]
        now = sampling.guidance_at(float(run.level(i)[0]), settings["cfg"], settings["cfg0"])
        if f"run.step{i}.x_in" in numbers:
            case.check(f"run.step{i}.x_in", x)
            case.check(f"run.step{i}.net_in", scaled.repeat(2, 1, 1, 1))
        x = run.advance(torch.lerp(*halves, now), x, i, torch.Generator())
        if f"run.step{i}.x_out" in numbers:
            case.check(f"run.step{i}.x_out", x)
    case.check("run.final", x)


def test_restore_stays_near_the_first_stage():
    """The estimate is drawn all the way where σ is largest, hardly where it is small, and not in the last step."""
    schedule, centre = sampling.Schedule(10, restore=4.0), torch.ones(1)
    x, predicted = torch.tensor([5.0]), torch.tensor([0.3])
    for i in (0, 5, 9):
        free, drawn = (schedule.step(x, predicted, i, c) for c in (None, centre))
        churned, then = schedule.churned_sigma(i), schedule.sigmas[i + 1]
        clean = x - sampling.nearest_level(churned)[1] * predicted
        pull = (schedule.sigmas[i] / 14.6146) ** 4 if i < 9 else 0.0
        torch.testing.assert_close(drawn - free, (churned - then) / churned * pull * (centre - clean))


def test_part_of_a_run():
    whole, part = (sampling.RestoreEDM(sampling.Schedule(10), strength) for strength in (1.0, 0.3))
    assert part.steps == 3
    assert [part.level(i).tolist() for i in range(3)] == [whole.level(i).tolist() for i in range(7, 10)]
    clean, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    start = part.start(clean, torch.Generator().manual_seed(1))
    torch.testing.assert_close(start, clean + whole.schedule.sigmas[7] * noise)
