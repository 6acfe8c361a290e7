"""A text-to-image model as the method sees it: text in, prediction out, pictures to latents and back."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from p2p.errors import UsageError
from p2p.image import as_picture, from_pil
from p2p.models.attention import QK
from p2p.models.conditioning import Conditioning, ReadText, Text, Time
from p2p.models.mmdit import MMDiT
from p2p.models.text import Tokens, joined_tokens
from p2p.models.tiles import tiled
from p2p.models.towers import TextTower, groups, joined, with_sizes
from p2p.models.unet import UNet
from p2p.models.vae import AutoencoderKL
from p2p.request.checks import finite, kind, tensor, whole, within
from p2p.request.offload import at_work
from p2p.request.schedules import Schedule, flow_sampler_schedule, sampler_schedule
from p2p.sampler import Clip
from p2p.weights.content import content
from p2p.weights.digest import together
from p2p.weights.scheduler import Flow
from p2p.weights.untrusted import brief

LARGEST = 8192   # pixels a side: larger sizes are taken for typing errors, which would fill the memory
STEPS = 50       # of a run that does not set them


@dataclass(frozen=True, repr=False)
class Model:
    """A network with its text towers, autoencoder and noise schedule, as `p2p.load` gives it.

    `unet(x, t, context)` returns the prediction, and the queries and keys of the sites watched.
    """

    name: str                            # as the user gave it
    file: Path
    family: str
    unet: UNet | MMDiT
    text_encoders: list[TextTower]       # empty for a model without text
    vae: AutoencoderKL | None            # None: the model works on pixels
    alphas_cumprod: Tensor               # (1000,); of a flow, (0,)
    prediction: str                      # what the network predicts: "eps", "v", "x0" or "flow"
    size: tuple[int, int] = (512, 512)   # height, width of a picture, in pixels
    guidance_scale: float = 7.5          # the default of runs, as are:
    eta: float = 0.0                     # ... 0 for DDIM, 1 for DDPM
    steps: int = STEPS                   # ...
    sampler: str = "ddim"                # ... one of `schedules.SAMPLERS`
    noise_level: int = 250   # ... timestep of the noise on what a super-resolution stage enlarges
    align_corners: bool = True           # of that enlargement, as in IF
    clip: Clip = None                    # bound of x_0 in pixel models, see `sampler.bounded`
    offset: int = 1                      # see `ddim_schedule`
    final_alpha: float | None = None     # see `ddim_schedule`
    timestep_spacing: str = "leading"    # see `ddim_schedule`
    flow: Flow | None = None             # see `flow_schedule`
    learned_variance: bool = True        # DDPM steps use the variance that the network predicts, if any
    latent_scale: float = 1.0            # the sampler's latents = the autoencoder's times this
    zero_negative: bool = False   # the empty prompt is all zeros (SDXL as released), not the encoded ""
    compiled: bool = False               # the UNet, by torch.compile
    offload: bool = False  # text towers and autoencoder stay on the CPU except while they run
    tile: int | None = None   # latents a side of the squares that the autoencoder decodes, see `decode`
    notes: tuple[str, ...] = ()          # what was detected while loading, and how
    files: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)   # that decide pixels
    # the arguments of `load` that decide pixels
    load_options: Mapping[str, Any] = field(default_factory=dict)
    # where "vae", "text", "lora" and "embeddings" were loaded from; the class of a "pipeline" in memory
    places: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict)   # digests of weights in memory

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.unet.parameters()) / 1e6
        return (f"<Model {self.name}: {self.family}, predicts {self.prediction}, {count:.0f} M parameters, "
                f"{self.size[1]} x {self.size[0]}, {self.dtype} on {self.device}>")

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network; its weights may be stored in half that width."""
        return self.unet.dtype

    @property
    def text_groups(self) -> list[tuple[TextTower, int]]:
        """The text towers whose tokens the context's columns are, in their order, and how many columns each
        has: one, in Stable Diffusion 3 CLIP and T5."""
        return [(tower, tower.config.context_length) for tower in groups(self.family, self.text_encoders)]

    @property
    def length(self) -> int:
        """Number of the context's columns."""
        return sum(columns for _, columns in self.text_groups)

    @property
    def shrink(self) -> int:
        """Pixels per latent, on each side."""
        return 1 if self.vae is None else self.vae.config.shrink

    @property
    def unit(self) -> int:
        """The number of pixels that the sides of pictures must be multiples of."""
        if self.vae is None or self.flow is not None:
            return self.shrink * self.unet.unit
        return max(8, self.shrink)

    @property
    def largest(self) -> int:
        """The longest side of a picture, in pixels."""
        return int(min(LARGEST, self.unet.largest * self.shrink))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of that size. Raises UsageError."""
        sides = (self.size[0] if height is None else height, self.size[1] if width is None else width)
        for name, side in zip(("height", "width"), sides):
            if not isinstance(side, Integral) or side % self.unit or not 0 < side <= self.largest:
                raise UsageError(f"{name} must be a positive multiple of {self.unit}, not {brief(side)}, and "
                                 f"at most {self.largest}")
        return self.unet.config.in_channels, sides[0] // self.shrink, sides[1] // self.shrink

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """sha256 of the "model" (of its file, or of all that decides pixels in its folder) and of the "vae"
        and "text" given beside it: computed on first use, and cached on disk; None for files that are gone
        by then."""
        return {name: together(each) for name, each in self.files.items()}

    @property
    def sha256(self) -> str | None:
        return content(self, self._known) if "pipeline" in self.places else self.digests.get("model")

    @property
    def overrides(self) -> dict[str, Any]:
        """Digests and arguments of `load` by which it differs from the model that its files alone give."""
        given = {k: v for k, v in self.digests.items() if k != "model"}
        options = {k: v for k, v in self.load_options.items() if k != "held"}
        return {k: v for k, v in (given | options).items() if v}

    def identity(self) -> dict[str, Any]:
        """All that decides pixels and is not a setting of a run, for JSON: digests of files, not paths."""
        return {"sha256": self.sha256, "family": self.family, "prediction": self.prediction,
                "dtype": str(self.dtype).removeprefix("torch."), "vae": self.digests.get("vae"),
                "text": self.digests.get("text"), **self.load_options, "tile": self.tile}

    def tokens(self, prompt: str) -> Tokens:
        """A prompt as the text towers read it, see `text_groups`. Raises UsageError."""
        try:
            kind("prompt", prompt, str).encode()
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {brief(prompt)} is not valid text (UTF-8 is expected)") from None
        if not self.text_encoders:
            raise UsageError(f"{self.name} reads no text")
        try:
            return joined_tokens([(tower.tokens(prompt), columns) for tower, columns in self.text_groups])
        except ValueError as error:   # not one of the prompts that were encoded beforehand
            raise UsageError(str(error)) from None

    def read(self, conditioning: Conditioning) -> Conditioning:
        """Replaces the context by what the network computes from it at every step alike, see `UNet.read`."""
        context = kind("conditioning", conditioning, Conditioning).context
        return conditioning._replace(context=self.unet.read(cast(Tensor, context)))

    def times(self, timesteps: Tensor, conditioning: Conditioning) -> list[Time]:
        """What the network computes from the timesteps (T,) alone, for conditioning from `read`; `predict`
        takes one of these in place of t."""
        context = kind("conditioning", conditioning, Conditioning).context
        kind("the context of conditioning, from `read`,", context, Text, ReadText)
        if kind("timesteps", timesteps, Tensor).ndim != 1:
            raise UsageError(f"timesteps must be a tensor (T,), not of {tuple(timesteps.shape)}")
        with_t = {k: v for k, v in conditioning.given().items() if k in ("vector", "level", "guidance")}
        return self.unet.times(timesteps, cast(Any, context), self.dtype, **with_t)

    def guided(self, guidance_scale: float) -> bool:
        """Whether a run takes unconditional rows: not of a network that reads the scale, or reads no text."""
        unconditional = bool(self.text_encoders) and not self.unet.reads_guidance
        return finite("guidance_scale", guidance_scale) != 1 and unconditional

    def predict(self, x: Tensor, t: float | Tensor | Time, conditioning: Conditioning, edit: Any = None,
                watch: Collection[str] = ()) -> tuple[Tensor, Tensor | None, dict[str, QK]]:
        """Runs the network on all rows of x (B, C, H, W), in its precision.

        -> prediction (B, C, H, W); learned variance in -1 .. 1 of that shape, or None; queries and keys
        of the sites watched
        """
        tensor("x", x, "B", self.unet.config.in_channels, "H", "W")
        kind("conditioning", conditioning, Conditioning)
        # a tensor t and a contiguous x: a compiled graph would be made again for each number and layout
        if isinstance(kind("t", t, int, float, Tensor, dict), (int, float)):
            last = len(self.alphas_cumprod) - 1
            t = whole("t", t, 0, last) if self.flow is None else within("t", t, 1000)
            t = torch.as_tensor(t, dtype=torch.float32 if self.flow else None, device=x.device)
        if isinstance(t, Tensor) and t.shape not in ((), (1,), (len(x),)):
            raise UsageError(f"t must be one number, or one for each of the {len(x)} rows of x, not "
                             f"{tuple(t.shape)}")
        out, seen = self.unet(x.to(self.dtype).contiguous(), t, edit=edit, watch=watch,
                              **conditioning.given())
        out, variance = out.to(x.dtype), None
        if out.shape[1] != x.shape[1]:
            out, variance = out.chunk(2, dim=1)
        return out, variance if self.learned_variance else None, seen

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts (or one) -> context (B, L, C), in the model's precision."""
        return cast(Tensor, self.condition(prompts).context)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], height: int | None = None,
                  width: int | None = None) -> Conditioning:
        """Prompts -> conditioning; height and width in pixels, for models that are conditioned on the size.
        Raises UsageError."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
            raise UsageError(f"prompts are a text or a list of texts, not {brief(prompts)}")
        self.latent_shape(height, width)
        if not self.text_encoders:
            return Conditioning(torch.zeros(len(prompts), 0, 0, device=self.device))
        with at_work(self.offload, self.device, *self.text_encoders):
            try:
                ids = [e.tokenize(list(prompts)).to(self.device) for e in self.text_encoders]
            except ValueError as error:   # as in `tokens`
                raise UsageError(str(error)) from None
            encoded = [e.encode(each) for e, each in zip(self.text_encoders, ids)]
        context, pooled = joined(self.family, encoded)                           # (B, L, C), (B, P)
        if pooled is None or self.unet.config.vector_dim is None:
            return Conditioning(context)
        return Conditioning(context, self._vector(pooled, height, width))

    def _vector(self, pooled: Tensor, height: int | None, width: int | None) -> Tensor:
        """The vector of a pooled text (B, P): in SDXL with the picture's size.  -> (B, V)"""
        size = (height or self.size[0], width or self.size[1])
        return with_sizes(pooled, size, self.unet.config.vector_dim or 0) if self.family == "sdxl" else pooled

    @torch.no_grad()
    def null(self, n: int, height: int | None = None, width: int | None = None) -> Conditioning:
        """Conditioning on the empty prompt, n rows, for guidance."""
        whole("n", n, most=2**20)
        c = self.condition([""], height, width)
        if self.zero_negative and c.vector is not None:
            pooled = torch.zeros_like(c.vector[:, : self.text_encoders[-1].config.pooled_dim])
            c = Conditioning(torch.zeros_like(cast(Tensor, c.context)), self._vector(pooled, height, width))
        return Conditioning.cat([c] * n)

    def schedule(self, steps: int, sampler: str = "ddim", timestep_spacing: str | None = None,
                 timesteps: Sequence[int] | None = None, eta: float = 0.0,
                 size: Sequence[int] | None = None) -> Schedule:
        """The timesteps that a run of that many steps visits, see `schedules`. size: height and width of the
        latents, the model's own where None; some flows' levels depend on it. Raises UsageError."""
        if self.flow is not None:
            height, width = size or self.latent_shape()[1:]
            tokens = next(iter(self.unet.site_pixels(height, width).values()))
            return flow_sampler_schedule(sampler, self.flow, whole("steps", steps), tokens,
                                         spacing=timestep_spacing, timesteps=timesteps)
        schedule = sampler_schedule(sampler, self.alphas_cumprod, whole("steps", steps), offset=self.offset,
                                    final_alpha=self.final_alpha, timesteps=timesteps, eta=eta,
                                    spacing=timestep_spacing, usual_spacing=self.timestep_spacing)
        if self.prediction == "eps" and not schedule.levels[0].alpha > 0:
            raise UsageError(f"at t = {schedule.timesteps[0]} there is nothing but noise (zero terminal "
                             "SNR): a model that predicts the noise cannot begin there; leave out "
                             "zero_snr, or give prediction, v or x0, if it was guessed wrongly")
        return schedule

    @torch.no_grad()
    def encode(self, image: Image.Image | Tensor) -> Tensor:
        """A picture (as `image.shown`) or (B, 3, H, W) in [-1, 1] -> latents as the sampler sees them,
        float32 (the posterior's mean). Raises UsageError for a size that the model does not take."""
        x = image if isinstance(image, Tensor) else from_pil(as_picture(image))
        tensor("a picture as a tensor", x, "B", 3, "height", "width")
        self.latent_shape(*x.shape[2:])
        if self.vae is None:
            return x.to(self.device).float()
        x = x.to(self.device, self.vae.dtype)   # one at a time: memory for one
        with at_work(self.offload, self.device, self.vae):
            return torch.cat([self.vae.encode(one)[0].float() for one in x.split(1)]) * self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the sampler sees them -> pictures (B, 3, H, W), about [-1, 1], float32.

        With `tile`, in squares that overlap by a quarter and are blended there: bounded memory at any size,
        at the price of group norms that see one square each. Raises UsageError.
        """
        x = tensor("latents", latents, "B", self.unet.config.in_channels, "H", "W").to(self.device)
        if self.vae is None:
            return x.float()
        x = (x / self.latent_scale).to(self.vae.dtype)
        decode = self.vae.decode
        if self.tile is not None:
            decode = partial(tiled, self.vae.decode, tile=self.tile, scale=self.shrink)
        with at_work(self.offload, self.device, self.vae):
            return torch.cat([decode(one).float() for one in x.split(1)])
