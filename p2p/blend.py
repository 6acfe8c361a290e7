"""Local edits: outside a mask made from the attention of chosen words, the target keeps the source's latents.

Hertz et al. 2022, section 4 ("masks from attention"), computed as google/prompt-to-prompt's LocalBlend does:
maps after the edit, conditional rows, the sites at a quarter of the latent's side (the middle block only
where it alone has that side; of an MM-DiT the blocks of `mask_sites`), summed over the steps so far, pooled
3 x 3, divided by their maximum, thresholded; source's and target's masks joined.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from p2p.align import word_tokens
from p2p.errors import UsageError
from p2p.models.attention import QK, Edits
from p2p.models.maps import site_maps
from p2p.models.network import Network
from p2p.models.text import Tokens
from p2p.request.checks import choice, finite, flag, share, whole
from p2p.request.mask_sites import level_in, sites_of_side
from p2p.request.masks import check_mask, fixed
from p2p.weights.untrusted import brief

Words = str | Sequence[str]
FEATHER = 1024   # most latents
SOFT = 2.0       # of the command line and the page, for masks of words


@dataclass(frozen=True)
class LocalBlend:
    """Where a target may differ from its source.

    words: (of the source prompt, of the target prompt), each a word, a phrase or a list of them: the mask.
    substruct: a pair like `words`, for regions to be taken out of the mask again.
    rivals: a pair like `words`, one thing each: a position counts only where the words attract more attention
        than any of these. Each map is taken as a share of its maximum, and words that mark no thing of their
        own (wide maps, or peaks where the words have one) do not compete.
    threshold: share of the map's maximum above which a position counts; or (for words, for substruct).
    start: share of the steps after which blending begins. level: the maps' side is that of the latents
    over this, rounded up. None: 4 in a UNet; in an MM-DiT, all of whose maps have one side, that of its
    patches.
    keep: what stands outside of the mask, of a real picture: its latents "stored" by the inversion, so
        that it is the picture itself in every method; or "sampled", the source's row as it came out of the
        step, as in PnPInversion's runs. (The two are equal where the source follows its stored latents, and
        where it was generated.)
    middle: the middle block's maps count too, as in RoyiRa's code for SDXL (where it has the side of the
        maps); the official code leaves it out.
    mask: a picture, or its file (cropped as `image.fit` crops pictures, or padded as the inverted one was;
        transparent is dark), or a (H, W) tensor of 0 to 1 (stretched), bright where the edit may act: instead
        of words, or, with words, a limit to them.
    feather: latents on either side of the mask's edge over which it fades, 0: a hard edge, as in the official
        code. Maps are coarse, so that a hard edge has steps of `level` latents: for masks of words the
        command line and the page take SOFT, see `benchmarks.quality --only feather`.

    Outside of the mask and its feather the latents are the source's. In latent models the decoder looks a
    little beyond the mask's edge, so there the pixels near it are not.
    """

    words: tuple[Words, Words] | None = None
    substruct: tuple[Words, Words] | None = None
    rivals: tuple[Words, Words] | None = None
    threshold: float | tuple[float, float] = 0.3
    start: float = 0.2
    level: int | None = None
    keep: Literal["stored", "sampled"] = "stored"
    middle: bool = False
    mask: Image.Image | str | Path | Tensor | None = None
    feather: float = 0.0

    @property
    def thresholds(self) -> tuple[float, float]:
        """Of words, of substruct."""
        both = self.threshold if isinstance(self.threshold, (tuple, list)) else (self.threshold,)
        return float(both[0]), float(both[-1])


class Blend(NamedTuple):
    """LocalBlends of N targets as tensors; a target without one has a mask that is everywhere true."""

    side: tuple[int, int]   # of the maps; (0, 0): only masks are given, no map is needed
    # (N, 2 + R, 2, L): words, substruct or a rival, in the source or the target; sums of their tokens
    columns: Tensor
    threshold: Tensor    # (N, 2): for words, for substruct
    start: Tensor        # (N,) steps
    everywhere: Tensor   # (N,) bool: no words given
    fixed: Tensor        # (N, 1, H, W) bool: the user's own masks
    sampled: Tensor      # (N,) bool: outside of the mask stands the source's row as sampled, not as stored
    source_row: Tensor   # (N,) long: of each target; the S sources come before the N targets
    feather: Tensor      # (N,) latents
    reach: int           # the farthest that any feather goes, in whole latents
    sites: tuple[str, ...] = ()   # the layers whose maps count


def listed(words: Words) -> Sequence[str]:
    return [words] if isinstance(words, str) else words


def _columns(prompt: Tokens, words: Words, length: int) -> Tensor:
    out = torch.zeros(length)
    for word in listed(words):
        out[word_tokens(prompt, word, length)] = 1
    return out


def prepare(blends: Sequence[LocalBlend | None], source: Tokens, targets: Sequence[Tokens], *,
            unet: Network, steps: int, length: int, size: tuple[int, int], device: torch.device,
            fit: str = "crop") -> Blend | None:
    """The LocalBlends as tensors, for latents of that size (H, W); None if no target blends. fit: how the
    pictures came to that size. blends: that passed `check`. Raises UsageError for maps that no layer has."""
    if not any(blends):
        return None
    side, sites = placed(blends, unet, size)
    columns, threshold, start, everywhere, masks = [], [], [], [], []
    for blend, target in zip(blends, targets):
        b = blend or LocalBlend(mask=torch.ones(1, 1))
        rivals = zip_longest(*(listed(words) for words in b.rivals or ()), fillvalue=())
        columns.append(torch.stack([
            torch.stack([_columns(source, ours, length), _columns(target, theirs, length)])
            for ours, theirs in (b.words or ((), ()), b.substruct or ((), ()), *rivals)]))
        threshold.append(torch.tensor(b.thresholds))
        start.append(int(b.start * steps))
        everywhere.append(b.words is None)
        masks.append(fixed(b.mask, size, fit))
    feathers = [b.feather if b else 0.0 for b in blends]
    sampled = torch.tensor([b is not None and b.keep == "sampled" for b in blends], device=device)
    return Blend(side, pad_sequence(columns, batch_first=True).to(device), torch.stack(threshold).to(device),
                 torch.tensor(start, device=device), torch.tensor(everywhere, device=device),
                 torch.stack(masks).to(device), sampled,
                 torch.zeros(len(targets), dtype=torch.long, device=device),
                 torch.tensor(feathers, device=device), ceil(max(feathers)), sites)


def placed(blends: Sequence[LocalBlend | None], unet: Network,
           size: tuple[int, int]) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The side of the maps that the blends of one batch read, for latents of that size, and the layers that
    have them. Raises UsageError."""
    read = [b for b in blends if b and (b.words is not None or b.substruct is not None)]
    levels = {level_in(unet, b.level) for b in read}
    for name, values in (("level", levels), ("middle", {b.middle for b in read})):
        if len(values) > 1:
            raise UsageError(f"local_blend: one {name} for all targets is needed, not {sorted(values)}")
    if not read:
        return (0, 0), ()
    level = levels.pop()
    side = (-(-size[0] // level), -(-size[1] // level))
    return side, _sites(unet, size, side, read[0].middle)


def _sites(unet: Network, size: tuple[int, int], side: tuple[int, int], middle: bool) -> tuple[str, ...]:
    """The layers whose maps count: the middle block's where `middle` asks for it, or where no other has maps
    of that side. Raises UsageError."""
    sites = sites_of_side(unet, size, side)
    if not sites:
        pixels = unet.site_pixels(*size)
        smaller = sorted({pixels[site] for site in unet.text_sites() if pixels[site] < side[0] * side[1]})
        raise UsageError(f"local_blend: the model has no attention to text at {side[0]} x {side[1]} positions"
                         f"{f' (below that, at {smaller})' if smaller else ''}; choose another level, or "
                         "leave it out")
    return tuple(site for site in sites if middle or not site.startswith("mid_block")) or tuple(sites)


def check(b: LocalBlend, scoped: bool = False) -> None:
    """Raises UsageError. scoped: the words follow from the edit's scope."""
    if not isinstance(b, LocalBlend):
        raise UsageError(f"local_blend: a LocalBlend is needed, not {brief(b)}")
    if b.words is None and b.mask is None and not scoped:
        raise UsageError("local_blend: give words or a mask, or scope to the edit")
    if b.words is None and b.rivals is not None:
        raise UsageError("local_blend: rivals compete with words; give words")
    for name, pair in (("words", b.words), ("substruct", b.substruct), ("rivals", b.rivals)):
        if pair is not None and not _is_pair_of_words(pair):
            raise UsageError(f"local_blend: {name} {brief(pair)}: words, substruct and rivals are pairs (of "
                             "the source prompt, of the target prompt), each a word or a list of words")
    th = b.threshold if isinstance(b.threshold, (tuple, list)) else (b.threshold,)
    if len(th) > 2 or not th or not all(isinstance(v, Real) and 0 <= v < 1 for v in th):
        raise UsageError(f"local_blend: threshold {brief(b.threshold)}: one number or two, at least 0 and "
                         "below 1, are expected")
    share("local_blend: start", b.start)
    if b.level is not None:
        whole("local_blend: level", b.level, most=2**31)
    choice("local_blend: keep", b.keep, ("stored", "sampled"))
    flag("local_blend: middle", b.middle)
    if not 0 <= finite("local_blend: feather", b.feather) <= FEATHER:
        raise UsageError(f"local_blend: feather {brief(b.feather)} must lie between 0 and {FEATHER} latents")
    if b.mask is not None:
        check_mask(b.mask)


def _is_pair_of_words(pair: Any) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    kinds = (str, tuple, list)
    if not all(isinstance(side, kinds) and all(isinstance(w, kinds) for w in side) for side in pair):
        return False
    return any(pair)


def word_maps(unet: Network, seen: Mapping[str, QK], edit: Edits, rows: Tensor, blend: Blend) -> Tensor:
    """Share of attention that the words get in one step's maps after the edit, averaged over heads and sites.

    seen: queries and keys by site; rows: of the sources and the targets in the network's batch
    -> (N, 2 + R, 2, pixels), as `Blend.columns`
    """
    if not blend.sites:
        return torch.zeros(*blend.columns.shape[:3], 0, device=blend.columns.device)
    total, heads = torch.zeros((), device=blend.columns.device), 0
    for site in blend.sites:
        layer: Any = unet.get_submodule(site)
        p = site_maps(layer, seen[site], edit, rows, mean=True)[1]   # (S + N, 1 or h, pixels, L)
        total, heads = total + layer.heads * p.mean(1, dtype=torch.float32), heads + layer.heads
    p = total / heads                                                                    # (S + N, pixels, L)
    both = torch.stack([p[blend.source_row], p[-len(blend.source_row):]], dim=1)   # (N, 2, pixels, L)
    return torch.einsum("nspl,nksl->nksp", both, blend.columns)


def reads_maps(blend: LocalBlend, scope: object) -> bool:
    """Whether its mask is made from the maps of words, its own or a scope's."""
    return blend.words is not None or blend.substruct is not None or scope is not None


def masks(seen: Tensor, blend: Blend, size: tuple[int, int]) -> Tensor:
    """Sums of word maps (N, 2 + R, 2, pixels) -> where the targets may differ, (N, 1, H, W) bool."""
    if not blend.sites:
        return blend.fixed
    m = seen.unflatten(-1, blend.side).clamp(min=0)   # (N, 2 + R, 2, h, w): weights may be < 0
    pooled = F.max_pool2d(m.flatten(1, 2), 3, 1, 1).unflatten(1, m.shape[1:3])
    m = torch.cat([pooled[:, :1], m[:, 1:2], pooled[:, 2:]], dim=1)
    m = F.interpolate(m.flatten(1, 2), size=size).unflatten(1, m.shape[1:3])             # nearest
    m = (m / m.amax((-2, -1), keepdim=True)).nan_to_num()   # no words: 0 / 0, never on
    on = m[:, :2] > blend.threshold[:, :, None, None, None]
    wins = m[:, 0] > _strongest(m[:, 0], m[:, 2:])
    on = torch.stack([on[:, 0] & wins, on[:, 1]], dim=1).any(dim=2)   # in the source's map or the target's
    mask = (on[:, :1] | blend.everywhere[:, None, None, None]) & ~on[:, 1:]
    return mask & blend.fixed


def _strongest(words: Tensor, rivals: Tensor) -> Tensor:
    """The strongest rival that marks a thing of its own, at every position.

    words (N, 2, H, W), rivals (N, R, 2, H, W), as shares of their maxima  ->  (N, 2, H, W)
    """
    if not rivals.shape[1]:
        return torch.zeros_like(words)
    compact = (rivals > 0.5).float().mean((-2, -1)) < 0.3
    apart = (words[:, None] * (rivals == 1)).amax((-2, -1)) < 0.5
    return (rivals * (compact & apart)[..., None, None]).amax(1)


def feathered(mask: Tensor, blend: Blend) -> Tensor:
    """Masks (N, 1, H, W) bool -> how much of the targets stands at each position, 0 to 1, float32: the mask,
    smoothed by a triangle as wide as the feather on either side, and so exactly 0 beyond it."""
    n, reach = len(mask), blend.reach
    d = torch.arange(-reach, reach + 1, device=mask.device).abs()
    triangle = (1 - d / (blend.feather[:, None] + 1)).clamp(min=0)                      # (N, 2 reach + 1)
    kernel = (triangle / triangle.sum(1, keepdim=True))[:, None, None]
    soft = F.pad(mask.float().transpose(0, 1), [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(soft, kernel, groups=n), kernel.mT, groups=n).transpose(0, 1).clamp(max=1)


def local_blend(x: Tensor, seen: Tensor, blend: Blend, step: int,
                source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Puts the source's latents into the targets outside of their masks, once blending has begun.

    x (S + N, C, H, W) after a step, sources first; source (1, C, H, W): the source's stored latents.
    -> x, and where the targets may differ at this step, (N, 1, H, W) bool: the mask and its feather
    """
    started = (step >= blend.start)[:, None, None, None]
    n = len(blend.source_row)
    mask = masks(seen, blend, (x.shape[2], x.shape[3])) | ~started
    outside = x[blend.source_row]
    if source is not None:
        outside = torch.where(blend.sampled[:, None, None, None], outside, source)
    if not blend.reach:
        return torch.cat([x[:-n], torch.where(mask, x[-n:], outside)]), mask
    soft = torch.where((blend.feather > 0)[:, None, None, None], feathered(mask, blend), mask.float())
    return torch.cat([x[:-n], torch.lerp(outside, x[-n:], soft.to(x.dtype))]), soft > 0
