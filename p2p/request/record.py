"""Which attention maps a run records."""
from __future__ import annotations

from typing import NamedTuple

from p2p.errors import UsageError
from p2p.models.attention import SelfAttention
from p2p.models.network import Network
from p2p.request.checks import flag, whole
from p2p.weights.untrusted import brief


class Record(NamedTuple):
    """The largest number of pixels of a layer whose maps are recorded, after the edit; 0: none."""

    text: int = 0          # columns of the text, in cross- and hybrid attention
    pixels: int = 0        # self-attention
    before: bool = False   # the targets' maps as they were before the edit, too

    def check(self) -> None:
        """Raises UsageError."""
        if not isinstance(self, Record):
            raise UsageError(f"record: a Record is needed, not {brief(self)}")
        whole("record.text", self.text, least=0, most=2**62)
        whole("record.pixels", self.pixels, least=0, most=2**62)
        if flag("record.before", self.before) and not (self.text or self.pixels):
            raise UsageError("record.before: of maps that are recorded; say with text or pixels up to which "
                             "size")

    def sites(self, unet: Network, height: int, width: int) -> list[str]:
        """The layers whose maps are recorded, for latents of that size. Raises UsageError for none."""
        pixels = unet.site_pixels(height, width)
        pixel_sites = {m.site for m in unet.layers(SelfAttention)}
        sites = [site for site, n in pixels.items()
                 if n <= (self.pixels if site in pixel_sites else self.text)]
        if (self.text or self.pixels) and not sites:
            raise UsageError(f"no attention map has at most {max(self.text, self.pixels)} positions here; "
                             "record larger ones, or choose a smaller picture")
        return sites
