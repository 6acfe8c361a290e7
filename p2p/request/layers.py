"""`Edit.layers`: which attention layers an edit injects into."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from p2p.blend import reads_maps
from p2p.edits import Edit, Tables, window
from p2p.errors import UsageError
from p2p.models.attention import AttentionEdit
from p2p.models.network import Network
from p2p.models.unet import UNet
from p2p.request.mask_sites import level_in
from p2p.weights.untrusted import brief

FORM = ('a part of layers\' names ("up", "mid", "down_blocks.1"), (first, last) as shares of depth, a list '
        'of these, or {"cross": ..., "self": ...}')


def check(layers: Any) -> None:
    """Raises UsageError for what is not of that form."""
    kinds = layers if isinstance(layers, Mapping) else {"cross": layers}
    if not kinds or any(kind not in ("cross", "self") for kind in kinds):
        raise UsageError(f"layers: {brief(layers)} is not {FORM}")
    for each in kinds.values():
        for item in [] if each is None else _items(each):
            if not isinstance(item, str):
                window(item, "layers")
            elif not item:
                raise UsageError(f"layers: {brief(layers)} is not {FORM}")


def _items(layers: Any) -> list[Any]:
    """Parts of names, and shares of depth."""
    if isinstance(layers, str) or _is_share(layers):
        return [layers]
    if isinstance(layers, (list, tuple)) and layers and all(isinstance(i, str) or _is_share(i)
                                                            for i in layers):
        return list(layers)
    raise UsageError(f"layers: {brief(layers)} is not {FORM}")


def _listed(layers: Any) -> str:
    return ", ".join(brief(item) for item in _items(layers))


def _is_share(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(v, Real) for v in item)


def chosen(layers: Any, unet: Network) -> dict[str, tuple[bool, bool]] | None:
    """By site, whether its columns of text are edited, and whether its pixels borrow; None: everywhere.

    A layer i of n of its kind, in the order in which they run, has the depth (i + 1/2) / n. Of a mapping, the
    kind that is not named is injected everywhere. Raises UsageError where nothing is left.
    """
    if layers is None:
        return None
    kinds = layers if isinstance(layers, Mapping) else {"cross": layers, "self": layers}
    parts = []
    pixel_sites = unet.self_sites()
    for kind, sites in (("cross", unet.text_sites()), ("self", pixel_sites)):
        wanted = kinds.get(kind)
        parts.append(set(sites) if wanted is None else _found(_items(wanted), sites))
        if wanted is not None and not parts[-1] and isinstance(layers, Mapping):
            raise UsageError(f"layers: no layer is chosen for {kind}-attention by {_listed(wanted)}; they "
                             f"are {', '.join(sites) or 'none'}")
    if not parts[0] | parts[1]:
        raise UsageError(f"layers: none is chosen by {_listed(layers)}; they are "
                         f"{', '.join(unet.text_sites())}")
    sites = dict.fromkeys([*unet.text_sites(), *pixel_sites])
    return {site: (site in parts[0], site in parts[1]) for site in sites}


def _found(items: Sequence[Any], sites: Sequence[str]) -> set[str]:
    def fits(i: int, site: str, item: Any) -> bool:
        return item in site if isinstance(item, str) else item[0] <= (i + 0.5) / len(sites) <= item[1]

    return {site for i, site in enumerate(sites) if any(fits(i, site, item) for item in items)}


def for_network(edit: Edit, unet: Network) -> Edit:
    """The edit with what is usual in its kind of network in place of None."""
    limit, blend = edit.self_max_tokens, edit.local_blend
    if limit is None and isinstance(unet, UNet):
        limit = 32 * 32
    if blend is not None and reads_maps(blend, edit.scope):
        blend = replace(blend, level=level_in(unet, blend.level))
    return replace(edit, self_max_tokens=limit, local_blend=blend)


def by_site(edit: AttentionEdit, tables: Sequence[Tables]) -> dict[str, AttentionEdit]:
    """An edit of all layers, limited to those that each target's tables name."""
    sites = next(t.layers for t in tables if t.layers is not None)
    limited: dict[tuple, AttentionEdit] = {}   # layers with the same targets share one
    out = {}
    for site in sites:
        on = tuple(zip(*((True, True) if t.layers is None else t.layers[site] for t in tables)))
        if on not in limited:
            limited[on] = _limited(edit, *(torch.tensor(each, device=edit.source.device) for each in on))
        out[site] = limited[on]
    return out


def _limited(edit: AttentionEdit, text: torch.Tensor, pixels: torch.Tensor) -> AttentionEdit:
    """Of some targets (E,) bool alone; the others keep their own text columns, and their own pixels."""
    if not text.any():
        edit = edit._replace(mix=None, keep=None, renormalise=None)
    if not pixels.any():
        edit = edit._replace(pixels=None, max_pixels=None)
    if edit.mix is not None and edit.keep is not None:
        edit = edit._replace(mix=edit.mix * text[:, None, None],
                             keep=torch.where(text[:, None], edit.keep, torch.ones_like(edit.keep)))
    if edit.pixels is not None:
        edit = edit._replace(pixels=torch.where(pixels, edit.pixels, edit.pixels[2]))   # the row itself
    return edit
