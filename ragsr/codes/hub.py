"""CLIP and DINOv2 through transformers, as feature extractors: `clip:MODEL` and `dinov2:MODEL`.

MODEL is a folder, or a name on the Hugging Face hub that transformers knows or fetches. Pictures are squashed to the
square that the model was made for, as everywhere here: nothing at the borders is lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ragsr.codes.features import IMAGENET_DEVIATION, IMAGENET_MEAN, FeatureExtractor, normalised, squashed
from ragsr.errors import InputError

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_SIDE = 224


class ClipFeatures(FeatureExtractor):
    """The projected image embedding of CLIP."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = f"clip:{name}", model.eval()
        self.side, self.size = int(model.config.image_size), int(model.config.projection_dim)
        self.preprocessing = f"rgb, bilinear {self.side}x{self.side}, CLIP mean and deviation"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        x = normalised(squashed(images, self.side), CLIP_MEAN, CLIP_DEVIATION)
        return self.model(pixel_values=x.to(self.model.dtype)).image_embeds.float()


class DinoFeatures(FeatureExtractor):
    """The class token of DINOv2 after its last normalisation."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = f"dinov2:{name}", model.eval()
        self.side = DINO_SIDE - DINO_SIDE % int(model.config.patch_size)
        self.size = int(model.config.hidden_size)
        self.preprocessing = f"rgb, bilinear {self.side}x{self.side}, ImageNet mean and deviation"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        x = normalised(squashed(images, self.side), IMAGENET_MEAN, IMAGENET_DEVIATION)
        return self.model(pixel_values=x.to(self.model.dtype)).last_hidden_state[:, 0].float()


def load_clip(name: str) -> ClipFeatures:
    return ClipFeatures(name, _load("CLIPVisionModelWithProjection", name))


def load_dinov2(name: str) -> DinoFeatures:
    return DinoFeatures(name, _load("Dinov2Model", name))


def _load(kind: str, name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError('CLIP and DINOv2 come through transformers: pip install "ragsr[diffusion]"') from None
    try:
        return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: cannot be loaded as {kind} ({reason}); name a folder, or a model of the hub"
        ) from None
