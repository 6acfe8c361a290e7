"""The layers whose maps of text show where words are: those that masks are made of."""
from __future__ import annotations

from p2p.models.mmdit import MMDiT
from p2p.models.network import Network

# The double blocks of an MM-DiT, as shares of their depth, whose maps agree best with segmentations of what
# the words name (Shin et al. 2025).
BEST = {"sd3": (0.18, 0.40), "sd3.5 medium": (0.22, 0.44), "sd3.5 large": (0.43, 0.65), "flux": (0.60, 1.0)}


def level_in(unet: Network, level: int | None) -> int:
    """The latents' side over that of the maps: as given, or what is usual in that network."""
    if level is not None:
        return level
    return unet.config.patch if isinstance(unet, MMDiT) else 4


def word_sites(unet: Network) -> list[str]:
    """The layers whose maps of text masks may be made of: in an MM-DiT those of `BEST`, or the nearest to
    these."""
    if not isinstance(unet, MMDiT):
        return unet.text_sites()
    c, sites = unet.config, [block.joint.site for block in unet.parts.double]
    first, last = BEST["flux" if c.axes is not None else "sd3" if not c.qk_norm else
                       "sd3.5 medium" if c.dual else "sd3.5 large"]
    depths = [(i + 0.5) / len(sites) for i in range(len(sites))]
    nearest = min(abs(depth - (first + last) / 2) for depth in depths)
    return [site for site, depth in zip(sites, depths)
            if first <= depth <= last or abs(depth - (first + last) / 2) == nearest]


def sites_of_side(unet: Network, size: tuple[int, int], side: tuple[int, int]) -> list[str]:
    """The layers whose maps of text have that side, for latents of that size."""
    pixels = unet.site_pixels(*size)
    return [site for site in word_sites(unet) if pixels[site] == side[0] * side[1]]
