"""The networks of StableSR and iRAG: recorded originals, published names and shapes, one modulation for all chains."""

import pytest
import torch
from golden import golden_inventory, golden_item

diffusers = pytest.importorskip("diffusers")
from ragsr.models.ldm_names import unet_from_ldm, unet_name, vae_from_ldm  # noqa: E402  # they need diffusers
from ragsr.models.sft_unet import SFTUNet  # noqa: E402
from ragsr.models.structure import StructureEncoder  # noqa: E402
from ragsr.models.wrapping import PUBLISHED, WrappingAutoencoder  # noqa: E402


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------ recorded originals


@pytest.mark.parametrize("item", ["stablesr_unet_tiny", "irag_unet_tiny"])
@torch.no_grad()
def test_golden_unet(item):
    case = golden_item(item)
    given, sizes, structure = case.tensors, case.config["config"]["unet"], case.config["config"]["encoder"]
    encoder = StructureEncoder(
        channels=structure["model_channels"],
        out_channels=structure["out_channels"],
        channel_mult=tuple(structure["channel_mult"]),
    )
    encoder.load_state_dict(case.weights("weights.encoder."))
    widths = tuple(sizes["model_channels"] * mult for mult in sizes["channel_mult"])
    unet = SFTUNet(
        sizes["semb_channels"],
        block_out_channels=widths,
        cross_attention_dim=sizes["context_dim"],
        attention_head_dim=tuple(width // sizes["channels_per_head"] for width in widths),
    )
    unet.load_state_dict(unet_from_ldm(case.weights("weights.unet.")))

    latents = [given[f"input.{name}"] for name in ("z_lr", "z_inter") if f"input.{name}" in given]
    maps = encoder(latents, given["input.timesteps"])
    for one in maps:
        case.check(f"encoder.{one.shape[-1]}", one)
    case.check("out", unet(given["input.x_t"], given["input.timesteps"], given["input.context"], maps).sample)


@torch.no_grad()
def test_golden_wrapping_autoencoder():
    case = golden_item("stablesr_cfw_tiny")
    vae = WrappingAutoencoder(1, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    vae.load_state_dict(vae_from_ldm(case.weights()))
    moments, features = vae.encode_with_features(case.tensors["input.x"])
    case.check("moments", moments)
    for i, one in enumerate(features):
        case.check(f"enc_fea.{i}", one)
    case.check(
        "decoded", vae.decode_with_features(case.tensors["input.z"], features, case.config["config"]["fusion_w"])
    )


# ------------------------------------------------------------------ published names and shapes


@pytest.mark.parametrize(("published", "channels"), [("irag_unet", 512), ("stablesr_v2_unet", 256)])
def test_unet_takes_the_published_weights(published, channels):
    wanted = {unet_name(name): shape for name, shape in golden_inventory(published).items()}
    with torch.device("meta"):
        assert shapes(SFTUNet(channels)) == wanted


@pytest.mark.parametrize("published", ["irag_structcond_encoder", "stablesr_v2_structcond_encoder"])
def test_encoder_takes_the_published_weights(published):
    wanted = golden_inventory(published)
    with torch.device("meta"):
        assert shapes(StructureEncoder()) == wanted


@pytest.mark.parametrize("published", ["stablesr_cfw_vae", "irag_vae"])
def test_autoencoder_takes_the_published_weights(published):
    wanted = golden_inventory(published)
    with torch.device("meta"):
        renamed = vae_from_ldm({name: torch.empty(shape) for name, shape in wanted.items()})
        vae = WrappingAutoencoder() if published == "stablesr_cfw_vae" else diffusers.AutoencoderKL(**PUBLISHED)
        assert shapes(vae) == {name: tuple(tensor.shape) for name, tensor in renamed.items()}


# ------------------------------------------------------------------ behaviour


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    unet = SFTUNet(6, block_out_channels=(32, 32, 32, 32), cross_attention_dim=8, attention_head_dim=2).eval()
    for name, parameter in unet.named_parameters():
        if "spade" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return unet


def a_condition(batch):
    return [torch.randn(batch, 6, 16 >> level, 8 >> level) for level in range(4)]


@torch.no_grad()
def test_one_modulation_serves_both_halves_of_guidance(tiny):
    condition, x, text = a_condition(1), torch.randn(2, 4, 16, 8), torch.randn(2, 3, 8)
    maps = tiny.modulate(condition)
    assert all(gamma.shape[0] == 1 for gamma, _ in maps.values())
    assert len(maps) == 22
    once = tiny(x, 5, text, maps).sample
    twice = tiny(x, 5, text, [one.repeat(2, 1, 1, 1) for one in condition]).sample
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-5)
    other = tiny(x, 5, text, a_condition(1)).sample
    assert (once - other).abs().max() > 1e-3  # the condition counts


@torch.no_grad()
def test_saved_and_loaded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = SFTUNet.from_pretrained(tmp_path)
    assert again.config.condition_channels == 6
    own, loaded = tiny.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in own.items())
    given = torch.randn(1, 4, 16, 8), 5, torch.randn(1, 3, 8), a_condition(1)
    # weights lie elsewhere in memory, so that matrix products may be rounded otherwise; tiny maps blow that up
    torch.testing.assert_close(again(*given).sample, tiny(*given).sample, rtol=0, atol=1e-3)


@torch.no_grad()
def test_wrong_conditions_are_refused(tiny):
    given = torch.randn(1, 4, 16, 8), 5, torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="3 levels and this U-Net 4"):
        tiny(*given, a_condition(1)[:3])
    with pytest.raises(ValueError, match="gamma"):
        tiny(*given, [torch.randn(1, 6, 16, 9), *a_condition(1)[1:]])
    assert torch.isfinite(tiny(*given, a_condition(1)).sample).all()  # and it works on


def test_latents_of_an_odd_size_are_refused():
    encoder = StructureEncoder(channels=32, out_channels=32, channel_mult=(1, 1))
    with pytest.raises(ValueError, match=r"15 x 8; both sides must be multiples of 2"):
        encoder(torch.randn(1, 4, 15, 8), torch.tensor(3))
