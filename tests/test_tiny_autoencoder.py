"""The small autoencoder, and the files it loads."""

import pytest
import torch
from golden import FULL
from skimage import data

pytest.importorskip("diffusers")

from ragsr.errors import InputError  # what follows needs diffusers
from ragsr.metrics import psnr
from ragsr.models.tiny_autoencoder import TinyAutoencoder, load_published
from ragsr.training.sizes import make_stage

PUBLISHED = FULL.parent / "weights" / "taef2"


def test_it_looks_like_autoencoder_kl(tmp_path):
    torch.manual_seed(0)
    vae = TinyAutoencoder(latent_channels=4, width=16, scaling_factor=0.5)
    x = torch.rand(2, 3, 48, 64) * 2 - 1
    found = vae.encode(x).latent_dist
    assert found.mean.shape == (2, 4, 6, 8)
    assert torch.equal(found.sample(), found.mean)
    assert vae.decode(found.mean).sample.shape == x.shape
    vae.save_pretrained(tmp_path)
    again = TinyAutoencoder.from_pretrained(tmp_path)
    assert again.config.scaling_factor == 0.5
    assert torch.equal(again.encode(x).latent_dist.mean, found.mean)


def test_published_files(tmp_path):
    vae = TinyAutoencoder(latent_channels=32, width=64)
    for half in ("encoder", "decoder"):
        torch.save(getattr(vae, half).half().state_dict(), tmp_path / f"tae_{half}.pth")
    again = load_published(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in vae.float().state_dict().items())
    assert torch.equal(make_stage("small", autoencoder=tmp_path).vae.encoder[0].weight, again.encoder[0].weight)
    with pytest.raises(InputError, match="latents have 32 channels, and those of this size 4"):
        make_stage("tiny", autoencoder=tmp_path)
    (tmp_path / "tae_decoder.pth").unlink()
    with pytest.raises(InputError, match=r"holds 0 files \*_decoder"):
        load_published(tmp_path)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published weights do not travel with the project")
def test_the_published_one_keeps_a_photo():
    """TAEF2: a photo comes back with little loss."""
    vae = load_published(PUBLISHED).eval()
    photo = torch.from_numpy(data.astronaut()[:256, :256].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        made = vae.decode(vae.encode(2 * photo - 1).latent_dist.mean).sample
    assert psnr(((made + 1) / 2).clamp(0, 1), photo) > 28
