"""Which attention maps a run records."""
from __future__ import annotations

from typing import Any, NamedTuple

from p2p.errors import UsageError
from p2p.models.attention import SelfAttention
from p2p.models.network import Network
from p2p.models.unet import UNet
from p2p.request import layers
from p2p.request.checks import flag, whole
from p2p.request.mask_sites import word_sites
from p2p.weights.untrusted import brief


class Record(NamedTuple):
    """The largest number of pixels of a layer whose maps are recorded, after the edit; 0: none."""

    # columns of the text, in cross-, hybrid and joint attention; None: what is usual, 32 * 32 in a UNet, and
    # in an MM-DiT any number, in the layers that masks are made of unless others are named
    text: int | None = 0
    pixels: int = 0        # self-attention
    before: bool = False   # the targets' maps as they were before the edit, too
    mean: bool = False     # one map a layer, over all heads and steps: those of large pictures fill memory
    layers: Any = None     # which of those layers, as `Edit.layers` says it; None: all

    @property
    def anything(self) -> bool:
        return self.text != 0 or self.pixels > 0

    def check(self) -> None:
        """Raises UsageError."""
        if not isinstance(self, Record):
            raise UsageError(f"record: a Record is needed, not {brief(self)}")
        if self.text is not None:
            whole("record.text", self.text, least=0, most=2**62)
        whole("record.pixels", self.pixels, least=0, most=2**62)
        if self.layers is not None:
            layers.check(self.layers)
        given = {"before": flag("record.before", self.before), "mean": flag("record.mean", self.mean),
                 "layers": self.layers is not None}
        for name in given:
            if given[name] and not self.anything:
                raise UsageError(f"record.{name}: of maps that are recorded; say with text or pixels up to "
                                 "which size")

    def sites(self, unet: Network, height: int, width: int) -> list[str]:
        """The layers whose maps are recorded, for latents of that size. Raises UsageError for none."""
        pixels = unet.site_pixels(height, width)
        pixel_sites = {m.site for m in unet.layers(SelfAttention)}
        chosen, text = layers.chosen(self.layers, unet), self.text
        usual = set(unet.text_sites() if chosen is not None else word_sites(unet))
        if text is None:
            text = 32 * 32 if isinstance(unet, UNet) else max(pixels.values())
            pixels = {site: n for site, n in pixels.items() if site in pixel_sites or site in usual}
        sites = [site for site, n in pixels.items()
                 if n <= (self.pixels if site in pixel_sites else text)
                 and (chosen is None or chosen[site][site in pixel_sites])]
        if self.anything and not sites:
            raise UsageError(f"no attention map has at most {max(text, self.pixels)} positions here; "
                             "record larger ones, or choose a smaller picture")
        return sites
