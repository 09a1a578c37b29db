"""Published checkpoints become a pipeline: the recorded tiny networks under the prefixes of the release."""

import pytest
import torch
from golden import golden_item
from safetensors.torch import save_file

pytest.importorskip("diffusers")
from ragsr.errors import InputError  # what follows needs diffusers
from ragsr.models.wrapping import WrappingAutoencoder
from ragsr.pipelines.irag_checkpoint import STRUCTURE, UNET, VAE, load_published


@pytest.fixture(scope="module")
def published():
    """All tensors of one file, as iRAG's checkpoint names them."""
    networks, autoencoder = golden_item("irag_unet_tiny"), golden_item("stablesr_cfw_tiny").weights()
    plain = {name: tensor for name, tensor in autoencoder.items() if ".fusion_layer_" not in name}
    parts = {UNET: networks.weights("weights.unet."), STRUCTURE: networks.weights("weights.encoder."), VAE: plain}
    return {prefix + name: tensor.contiguous() for prefix, part in parts.items() for name, tensor in part.items()}


def saved(tensors, path):
    save_file(tensors, path)
    return path


@torch.no_grad()
def test_published_checkpoint_restores(published, tmp_path):
    stage = load_published(saved(published, tmp_path / "irag.safetensors"), channels_per_head=32)
    stage.set_progress_bar_config(disable=True)
    assert stage.sees_both
    case = golden_item("irag_unet_tiny")
    given = case.tensors
    maps = stage.structure([given["input.z_lr"], given["input.z_inter"]], given["input.timesteps"])
    out = stage.unet(given["input.x_t"], given["input.timesteps"], given["input.context"], maps).sample
    case.check("out", out)
    low = torch.rand(1, 3, 128, 128)
    assert torch.isfinite(stage(low, low, num_inference_steps=2)).all()


def test_wrapping_autoencoder_of_its_own_file(published, tmp_path):
    autoencoder = golden_item("stablesr_cfw_tiny").weights() | {"loss.discriminator.main.0.weight": torch.zeros(1)}
    wrapping = saved({n: t.contiguous() for n, t in autoencoder.items()}, tmp_path / "cfw.safetensors")
    stage = load_published(saved(published, tmp_path / "irag.safetensors"), wrapping=wrapping, channels_per_head=32)
    assert isinstance(stage.vae, WrappingAutoencoder)


def test_what_does_not_fit_is_named(published, tmp_path):
    path = tmp_path / "broken.safetensors"
    name = f"{UNET}input_blocks.4.0.in_layers.2.weight"
    with pytest.raises(InputError, match=r"broken.*down_blocks\.1\.resnets\.0\.conv1\.weight"):
        load_published(saved(published | {name: torch.zeros(1, 2, 3, 3)}, path), channels_per_head=32)
    with pytest.raises(InputError, match="holds no weights structcond_stage_model"):
        load_published(saved({n: t for n, t in published.items() if not n.startswith(STRUCTURE)}, path))
    with pytest.raises(InputError, match="holds no folder text_encoder"):
        load_published(saved(published, path), base=tmp_path, channels_per_head=32)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Callback:
        def __reduce__(self):
            return print, ("never",)

    torch.save({"state_dict": {}, "callbacks": Callback()}, tmp_path / "stablesr.ckpt")
    with pytest.raises(InputError, match=r"stablesr\.ckpt"):
        load_published(tmp_path / "stablesr.ckpt")
