"""A text-to-image model as the method sees it: text in, prediction out, pictures to latents and back."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import weights.load
from models.text import TextEncoder, Tokens, tokens
from models.unet import UNet
from models.vae import AutoencoderKL
from p2p.image import from_pil
from p2p.schedule import Schedule, ddim_schedule


@dataclass(frozen=True)
class Model:
    """Made by `load`. `unet(x, t, context)` gives the prediction and maps; everything else is listed below."""

    name: str                            # as the user gave it
    file: Path
    family: str
    unet: UNet
    text_encoder: TextEncoder = field(repr=False)
    vae: AutoencoderKL | None            # None: the model works on pixels
    alphas_cumprod: Tensor = field(repr=False)
    prediction: str                      # what the UNet predicts: "eps", "v" or "x0"
    size: tuple[int, int] = (512, 512)   # height, width of a picture, in pixels
    guidance_scale: float = 7.5          # used where none is asked for
    clip: float | None = None            # bound of x_0 in pixel models
    final_alpha: float | None = None     # see `ddim_schedule`
    latent_scale: float = 0.18215        # the sampler's latents = the autoencoder's times this

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def length(self) -> int:
        """Tokens that the text tower reads."""
        return self.text_encoder.config.context_length

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the sampler works on."""
        shrink = 1 if self.vae is None else 2 ** (len(self.vae.config.channels) - 1)
        return self.unet.config.in_channels, self.size[0] // shrink, self.size[1] // shrink

    @cached_property
    def sha256(self) -> str | None:
        """Of the weights' file, read when first asked for; None if it is gone by then."""
        if not self.file.exists():
            return None
        with self.file.open("rb") as f:
            digest = hashlib.sha256()
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def tokens(self, prompt: str) -> Tokens:
        return tokens(prompt)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Prompts -> context (B, L, C), in the model's precision."""
        return self.text_encoder(self.text_encoder.tokenize(prompts).to(self.device))

    def schedule(self, steps: int) -> Schedule:
        return ddim_schedule(self.alphas_cumprod, steps, final_alpha=self.final_alpha)

    @torch.no_grad()
    def encode(self, image: Image.Image | Tensor) -> Tensor:
        """A picture, or (B, 3, H, W) in [-1, 1] -> latents as the sampler sees them, float32 (the posterior's mean)."""
        x = from_pil(image) if isinstance(image, Image.Image) else image
        x = x.to(self.device)
        return x.float() if self.vae is None else self.vae.encode(x.to(self.dtype))[0].float() * self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the sampler sees them -> pictures (B, 3, H, W), about [-1, 1], float32."""
        x = latents.to(self.device)
        return x.float() if self.vae is None else self.vae.decode((x / self.latent_scale).to(self.dtype)).float()


def load(source: str | Path = "emoji", family: str | None = None, prediction: str | None = None,
         device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
    """Loads a model: "emoji", which ships with the package, or a Stable Diffusion 1 .safetensors file in LDM naming.

    family ("sd1", "emoji") and prediction ("eps", "v", "x0") are found out from the file where None; device: a GPU if
    there is one; dtype: float32 on a CPU, as stored elsewhere. Raises CheckpointError.
    """
    c = weights.load.load(source, family, prediction, device, dtype)
    own = dict(size=(64, 64), guidance_scale=3.0, clip=1.0, final_alpha=1.0) if c.family == "emoji" else {}
    return Model(str(source), c.file, c.family, c.unet, c.text, c.vae, c.alphas_cumprod, c.prediction, **own)
