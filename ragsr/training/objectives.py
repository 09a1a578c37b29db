"""What the stages of the second half of iRAG minimise.

    autoencoder   |D(E(x)) - x| and |x' + D(E(x)) - D(E(x')) - x|, x' the low-quality photo enlarged: the latent shall
                  hold what a picture has more than another
    diffusion     L_final: noise or clean difference of latents, squared, and the picture they stand for
    joint         L_inter + α · L_final (iRAG Eq. 7), L_inter = |intermediate - x|

In `diffusion` the reference stage is left as it is. In `joint` the gradient of L_final reaches it, through the
autoencoder, whose weights stand still, and through the sum that makes the picture: that is what gives α a meaning.
At α = 0 the reference stage learns alone, and its first term is the loss that `--stage reference` has.

To every picture, L_inter's too, a perceptual distance and the adversarial loss (`ragsr.training.critic`) may be added,
in shares that are 0 by default.

A sampler of few steps meets few timesteps, and at all but the first of them no truth that was noised, but what the
network itself has answered. With `own_steps` the network learns from that: one of so many steps is drawn, and the
sampler goes there.

Where noise is predicted the picture counts by ᾱ of its timestep, since the clean latent that follows from the noise is
far off where that is strong. Where the clean latent is predicted it counts alike at every timestep.

Source: iRAG, Sec. 3.3.2, Eq. 6 and 7; J. Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, Eq. 14; for
the clean latent as target: Salimans and Ho, Progressive Distillation, ICLR 2022, Sec. 4; for `own_steps`: Yin et al.,
Improved Distribution Matching Distillation, NeurIPS 2024, Sec. 4.5.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragsr.models.alignment import enlarge_low
from ragsr.models.fusion import FusionNet
from ragsr.models.resample import resize
from ragsr.pipelines.diffusion import DiffusionStage
from ragsr.pipelines.schedulers import timesteps_of
from ragsr.training.critic import PatchCritic, adversarial
from ragsr.training.examples import Batch
from ragsr.training.refsr import distance

Losses = dict[str, Tensor]  # "loss" is the whole; the others are told in the log
KL_SHARE = 1e-6


class PictureLoss(nn.Module):
    """L1, and a perceptual distance in its share where there is a network for it. Pictures in [-1, 1]."""

    def __init__(self, perceptual: nn.Module | None, share: float) -> None:
        super().__init__()
        self.perceptual, self.share = perceptual, share

    def forward(self, made: Tensor, truth: Tensor) -> Tensor:
        """[B, 3, H, W] twice -> [B]"""
        return (made - truth).abs().mean((1, 2, 3)) + self.seen(made, truth)

    def seen(self, made: Tensor, truth: Tensor) -> Tensor:
        """The perceptual part alone, [B]."""
        if self.perceptual is None:
            return made.new_zeros(len(made))
        distance: Tensor = self.share * self.perceptual((made + 1) / 2, (truth + 1) / 2)
        return distance


class AutoencoderObjective(nn.Module):
    """The autoencoder learns; every other part of the stage stays. `gan`: the share of the adversarial loss."""

    def __init__(self, stage: DiffusionStage, picture_loss: PictureLoss, gan: float = 0.0) -> None:
        super().__init__()
        self.critic, self.gan = make_critic(gan), gan
        self.vae, self.picture_loss = stage.vae.requires_grad_(True), picture_loss.requires_grad_(False)

    def forward(self, batch: Batch, generator: torch.Generator) -> Losses:
        truth = signed(batch["truth"])
        blurred = signed(enlarged_photo(batch["low"], truth))
        posterior = self.vae.encode(truth).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(truth.device)
        made = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        before = self.vae.decode(self.vae.encode(blurred).latent_dist.mean).sample.float()
        losses = {
            "picture": self.picture_loss(made, truth).mean(),
            "detail": self.picture_loss(blurred + made - before, truth).mean(),
            "kl": posterior.kl().float().mean(),
        }
        loss = losses["picture"] + losses["detail"] + KL_SHARE * losses["kl"]
        if self.critic is not None:
            for_made, losses["critic"] = adversarial(self.critic, made, truth)
            loss = loss + self.gan * for_made.mean() + losses["critic"]
        return {"loss": loss, **losses}


class DiffusionObjective(nn.Module):
    """U-Net and structure encoder learn; where `joint`, the reference stage too. The autoencoder stays."""

    alphas: Tensor  # ᾱ of every timestep, [T]

    def __init__(
        self,
        stage: DiffusionStage,
        reference: FusionNet,
        joint: bool,
        alpha: float,
        picture_loss: PictureLoss,
        gan: float = 0.0,
        picture: float = 1.0,
        own_steps: int = 0,  # 0: any timestep
    ) -> None:
        super().__init__()
        self.critic, self.gan = make_critic(gan if picture else 0), gan
        self.reference_critic = make_critic(gan if joint else 0)
        self.unet, self.structure = stage.unet.requires_grad_(True), stage.structure.requires_grad_(True)
        self.vae, self.reference = stage.vae.requires_grad_(False), reference.requires_grad_(joint)
        self.picture_loss = picture_loss.requires_grad_(False)
        self.joint, self.alpha, self.picture = joint, alpha, picture
        self.scheduler, self.own_steps = stage.scheduler, own_steps
        self.scaling: float = stage.vae.config.scaling_factor
        self.predicts_noise = stage.scheduler.config.prediction_type == "epsilon"
        self.detail_scale: float = stage.config.detail_scale
        self.register_buffer("alphas", stage.scheduler.alphas_cumprod.clone(), persistent=False)

    def forward(self, batch: Batch, generator: torch.Generator) -> Losses:
        if self.joint and not self.alpha:
            return self.reference_losses(self.restore(batch), signed(batch["truth"]))
        encoded = batch if "z" in batch else self.encoded(batch)
        final = self.final_losses(encoded, generator)
        loss = final["latent"] + self.picture * final.get("picture", 0)
        critic = final.get("critic", 0)  # learns by itself, whatever α is
        if not self.joint:
            return {"loss": loss + critic, **final}
        own = self.reference_losses(encoded["intermediate"], encoded["truth"])
        return {**own, **final, "loss": own["loss"] + self.alpha * loss + critic}

    def reference_losses(self, intermediate: Tensor, truth: Tensor) -> Losses:
        """L_inter of two pictures in [-1, 1]."""
        near = (intermediate - truth).abs().mean() if self.alpha else distance((intermediate + 1) / 2, (truth + 1) / 2)
        loss = near + self.picture_loss.seen(intermediate, truth).mean()
        losses = {"restored": loss}
        if self.reference_critic is not None:
            for_made, losses["reference_critic"] = adversarial(self.reference_critic, intermediate, truth)
            loss = loss + self.gan * for_made.mean() + losses["reference_critic"]
        return {**losses, "loss": loss}

    def encoded(self, batch: Batch) -> Batch:
        """A batch as this loss takes it: `truth` and `intermediate` in [-1, 1], and `z`, `z_low`, `z_inter`, scaled."""
        truth, intermediate = signed(batch["truth"]), self.restore(batch)
        latents = {
            "z": self.encode(truth).detach(),
            "z_low": self.encode(signed(enlarged_photo(batch["low"], truth))).detach(),
            "z_inter": self.encode(intermediate),
        }
        return {"truth": truth, "intermediate": intermediate, **latents}

    def restore(self, batch: Batch) -> Tensor:
        """The intermediate result [B, 3, S, S] in [-1, 1]."""
        low = batch["low"]
        clues = (batch["clues"],) if "clues" in batch else ()
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            return signed(self.reference(low, enlarge_low(low), clues)[0].float())

    def final_losses(self, encoded: Batch, generator: torch.Generator) -> Losses:
        """The two parts of L_final at timesteps drawn for this batch."""
        truth, intermediate = encoded["truth"], encoded["intermediate"]
        z, z_low, z_inter = (encoded[name] for name in ("z", "z_low", "z_inter"))
        detail = (z - z_inter) * self.detail_scale
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        own = self.own_steps > 0
        x, t = self.on_the_way(z_low, z_inter, noise, generator) if own else self.noised(detail, noise, generator)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        predicted = self.predict(x, t, z_low, z_inter)
        beside = (x - alpha.sqrt() * detail) / (1 - alpha).sqrt()  # the noise, and what was answered wrongly before
        losses = {"latent": F.mse_loss(predicted, beside if self.predicts_noise else detail)}
        if not self.picture:
            return losses

        clean = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt() if self.predicts_noise else predicted
        picture = intermediate + self.decode(z_inter + clean / self.detail_scale) - self.decode(z_inter)
        of_picture = self.picture_loss(picture, truth)
        if self.critic is not None:
            for_made, losses["critic"] = adversarial(self.critic, picture, truth)
            of_picture = of_picture + self.gan * for_made
        weight = self.alphas[t] if self.predicts_noise else torch.ones_like(self.alphas[t])
        return losses | {"picture": (weight * of_picture).mean()}

    def noised(self, detail: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The truth's detail with noise, and the timestep of each, any one, [B]."""
        t = torch.randint(len(self.alphas), (len(detail),), generator=generator).to(detail.device)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * detail + (1 - alpha).sqrt() * noise, t

    @torch.no_grad()
    def on_the_way(
        self, z_low: Tensor, z_inter: Tensor, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the sampler has before one of its steps, the same for the batch, and the timestep of each, [B]."""
        timesteps = timesteps_of(self.scheduler, self.own_steps, noise.device)
        reached = int(torch.randint(len(timesteps), (), generator=generator))
        x = self.scheduler.add_noise((z_low - z_inter) * self.detail_scale, noise, timesteps[:1])
        for timestep in timesteps[:reached]:
            predicted = self.predict(x, timestep.expand(len(x)), z_low, z_inter)
            x = self.scheduler.step(predicted, timestep, x).prev_sample
        return x, timesteps[reached].expand(len(x))

    def predict(self, x: Tensor, t: Tensor, z_low: Tensor, z_inter: Tensor) -> Tensor:
        """What the U-Net answers at timesteps `t` [B]."""
        text = x.new_zeros(len(x), 1, self.unet.config.cross_attention_dim)
        predicted: Tensor = self.unet(x, t, text, self.structure([z_low, z_inter], t)).sample
        return predicted.float()

    def encode(self, image: Tensor) -> Tensor:
        latent: Tensor = self.vae.encode(image).latent_dist.mean.float()
        return latent * self.scaling

    def decode(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent / self.scaling).sample
        return image.float()


def make_critic(gan: float) -> PatchCritic | None:
    return PatchCritic() if gan else None


def signed(x: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]"""
    return 2 * x - 1


def enlarged_photo(low: Tensor, truth: Tensor) -> Tensor:
    """The photo at the size of the truth, as the pipeline gives it to the second stage."""
    return resize(low, (truth.shape[2], truth.shape[3])).clamp(0, 1)
