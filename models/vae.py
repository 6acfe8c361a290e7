"""The KL autoencoder of latent diffusion models: pictures <-> latents, 8 times smaller per side in Stable
Diffusion."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.models.attention import attend
from p2p.models.blocks import Downsample, ResnetBlock, Upsample
from p2p.models.layers import Conv2d, Linear


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, from full resolution down. The defaults are Stable Diffusion's."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    quant_conv: bool = True   # 1 x 1 convolutions between encoder, latents and decoder
    shift: float = 0.0        # of the latents, subtracted in encoding

    @property
    def shrink(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self.channels) - 1)


SD = VAEConfig()
SD3 = VAEConfig(latent_channels=16, quant_conv=False, shift=0.0609)
FLUX = VAEConfig(latent_channels=16, quant_conv=False, shift=0.1159)


class PixelAttention(nn.Module):
    """One-headed self-attention over all pixels, as a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, dim, 1e-6)
        self.to_q, self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)                        # (B, HW, C)
        q, k, v = (f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v))     # (B, 1, HW, C)
        h = self.to_out(attend(q, k, v)[:, 0])                                   # (B, HW, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class _Blocks(nn.Module):
    """Residual blocks from width to width, and at their end half or twice the side, if asked for."""

    def __init__(self, dims: list[int], down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, None, eps=1e-6) for a, b in zip(dims, dims[1:]))
        self.downsamplers = nn.ModuleList([Downsample(dims[-1], padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(dims[-1])] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class _Mid(_Blocks):
    def __init__(self, dim: int):
        super().__init__([dim] * 3)
        self.attentions = nn.ModuleList([PixelAttention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        ch = c.channels
        self.conv_in = Conv2d(c.in_channels, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Blocks([ch[max(i - 1, 0)]] + [out] * c.layers_per_block, down=i < len(ch) - 1)
            for i, out in enumerate(ch))
        self.mid_block = _Mid(ch[-1])
        self.conv_norm_out = nn.GroupNorm(32, ch[-1], 1e-6)
        self.conv_out = Conv2d(ch[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                      # (B, C_0, H, W)
        for block in self.down_blocks:
            x = block(x)                                                         # (B, C_i, H/2, W/2)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        ch = c.channels[::-1]
        self.conv_in = Conv2d(c.latent_channels, ch[0], 3, padding=1)
        self.mid_block = _Mid(ch[0])
        self.up_blocks = nn.ModuleList(
            _Blocks([ch[max(i - 1, 0)]] + [out] * (c.layers_per_block + 1), up=i < len(ch) - 1)
            for i, out in enumerate(ch))
        self.conv_norm_out = nn.GroupNorm(32, ch[-1], 1e-6)
        self.conv_out = Conv2d(ch[-1], c.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)                                                         # (B, C_i, 2H, 2W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Module names are those of diffusers' AutoencoderKL. Latents here are shifted, not
    scaled; the sampler's are both."""

    def __init__(self, config: VAEConfig = SD):
        super().__init__()
        self.config, z = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = (Conv2d(n, n, 1) if config.quant_conv else nn.Identity()
                                                 for n in (2 * z, z))

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype; weights may be stored in half that width."""
        return self.encoder.conv_norm_out.weight.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> posterior mean and log variance, each (B, z, H/8, W/8)"""
        mean, logvar = self.quant_conv(self.encoder(x)).contiguous().chunk(2, dim=1)
        return mean - self.config.shift, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, H/8, W/8) -> (B, 3, H, W), about [-1, 1]"""
        return self.decoder(self.post_quant_conv(z + self.config.shift)).contiguous()
