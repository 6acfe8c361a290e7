"""Which options of an edit change nothing: its tables with and without each are compared, so that no list
of cases is needed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from typing import Any

import torch

from p2p import align
from p2p.blend import Blend, LocalBlend, sites_of_side
from p2p.edits import Edit, Tables, alignment, cross_alpha, tables, window, windowed
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import SelfAttention
from p2p.models.text import Tokens
from p2p.scope import added, subject

DEFAULT = {f.name: f.default for f in fields(Edit)} | {f.name: f.default for f in fields(LocalBlend)}


def without(made: Tables, source: Tokens, target: Tokens, edit: Edit, mode: str, steps: int, length: int,
            whole: int | None = None) -> list[str]:
    """For each option that does nothing in an edit's tables, which one and why, in words; the rest is what
    `tables` made these of."""
    alpha = cross_alpha(edit.cross_replace_steps, target, windowed(edit, steps, whole), length)[:steps]

    def same(**changed: Any) -> bool:
        other = tables(source, target, replace(edit, **changed), mode, steps, length, whole)
        return torch.equal(made.mix, other.mix) and torch.equal(made.keep, other.keep)

    said = _windows(edit, steps, windowed(edit, steps, whole))
    if edit.windows_over != DEFAULT["windows_over"] and whole in (None, steps):
        said.append("windows_over changes nothing: no step of the schedule is left out")
    empty = ("the source's attention is injected in none of the steps there, and it acts in those alone: see "
             "cross_replace_steps")
    for word, c in (edit.equalizer or {}).items():
        if same(equalizer=_less(edit.equalizer, word)):
            why = "it is 1" if c == 1 else empty
            said.append(f'the weight of "{word}" (equalizer) changes nothing: {why}')
    for old, new in (edit.swap or {}).items():
        if same(swap=_less(edit.swap, old)):
            closed = not alpha[:, align.word_tokens(target, new, length)].any()
            why = empty if closed else f'mode {mode} pairs it with "{new}" anyhow'
            said.append(f'swap of "{old}" changes nothing: {why}')
    by_word = edit.cross_replace_steps
    if isinstance(by_word, Mapping):
        for word, bounds in by_word.items():
            other = window(by_word.get("default_", (0.0, 1.0)), word)
            without = _less(by_word, word)
            if word != "default_" and window(bounds, word) != other and same(cross_replace_steps=without):
                said.append(f'the window of "{word}" (cross_replace_steps) changes nothing: the source has '
                            "no attention for it, or it covers the same steps as that of the other words")
    if edit.aligner != DEFAULT["aligner"] and same(aligner=DEFAULT["aligner"]):
        said.append(f"aligner {edit.aligner} changes nothing: the two align these prompts alike")
    if edit.renormalise and _whole(made):
        said.append("renormalise changes nothing: every pixel's attention sums to 1 in all steps as it is")
    return said + _blend(edit)


def idle(t: Tables) -> bool:
    """Whether an edit of the source's own prompt leaves its maps as they are: mix + diag(keep) = 1 at every
    step."""
    mix, keep = t.mix, t.keep
    return torch.equal(mix + torch.diag_embed(keep), torch.eye(mix.shape[-1], dtype=mix.dtype).expand_as(mix))


def _less(mapping: Mapping[str, Any] | None, word: str) -> dict[str, Any]:
    return {k: v for k, v in (mapping or {}).items() if k != word}


def _windows(edit: Edit, steps: int, of: int) -> list[str]:
    """Of the windows, shares of so many steps: those that cover no step, and what limits self-attention
    that is not injected."""
    said, cross = [], edit.cross_replace_steps
    named = {"cross_replace_steps": (cross if isinstance(cross, Mapping) else {"default_": cross}, of + 1),
             "self_replace_steps": ({"default_": edit.self_replace_steps}, of)}
    covers = {}
    for name, (windows, n) in named.items():
        for word, bounds in windows.items():
            lo, hi = window(bounds, name)
            covers[name] = int(lo * n) < min(int(hi * n), steps)
            if lo < hi and not covers[name]:
                said.append(f"{name} {bounds!r}{'' if word == 'default_' else f' of {word!r}'} covers none "
                            f"of the {steps} steps")
    limit = edit.self_max_tokens != DEFAULT["self_max_tokens"]
    share = edit.self_replace_steps != DEFAULT["self_replace_steps"]
    if limit and edit.self_max_tokens and not covers["self_replace_steps"]:
        said.append("self_max_tokens changes nothing: self_replace_steps covers no step")
    if share and not edit.self_max_tokens and covers["self_replace_steps"]:
        said.append("self_replace_steps changes nothing: self_max_tokens is 0")
    return said


def _whole(made: Tables) -> bool:
    """Do the rows of P_src mix + P diag(keep) sum to 1, whatever the maps?"""
    borrowed, kept = made.mix.sum(-1), made.keep                                           # (T, L) each
    return bool((borrowed - borrowed[:, :1]).abs().max() < 1e-9 and (kept - kept[:, :1]).abs().max() < 1e-9
                and
                (borrowed[:, 0] + kept[:, 0] - 1).abs().max() < 1e-9)


def _blend(edit: Edit) -> list[str]:
    """Of the local blend's options."""
    said, b = [], edit.local_blend
    if b is None:
        return said
    if edit.scope is not None and b.words is not None:
        said.append("scope changes nothing in the picture: local_blend names words of its own")
    maps = b.words is not None or b.substruct is not None or edit.scope is not None
    said += [f"local_blend: {name} changes nothing: it is of maps of words, and none are named" for name in
             ("threshold", "level", "middle") if getattr(b, name) != DEFAULT[name] and not maps]
    pair = b.threshold if isinstance(b.threshold, (tuple, list)) else (b.threshold,)
    words, substruct = pair[0], pair[-1]
    if b.substruct is None and words != substruct:
        said.append("local_blend: the second threshold changes nothing: it is for substruct, which is not "
                    "given")
    if b.words is not None and b.rivals is None and words == 0:
        said.append("local_blend: at threshold 0 the words limit nothing: all that attends to them counts")
    if b.substruct is not None and substruct == 0:
        said.append("local_blend: at threshold 0 substruct leaves nothing to be edited: all that attends to "
                    "it is taken out")
    return said


def blend_idle(blends: Sequence[LocalBlend | None], made: Blend, steps: int) -> list[str | None]:
    """For every target what keeps its blend, or the mask in it, from mattering, in words."""
    said: list[str | None] = []
    for b, start, fixed in zip(blends, made.start.tolist(), made.fixed):
        white = b is not None and b.mask is not None and bool(fixed.all())
        alone = b is not None and b.words is None and b.substruct is None
        bright = f"local_blend{'' if alone else ': mask'} changes nothing: the mask is bright everywhere"
        said.append(None if b is None else "local_blend starts after the last step" if start >= steps else
                    "local_blend's mask is dark: nothing may change" if not fixed.any() else
                    bright if white else None)
    return said


def blends_without(edits: Sequence[Edit], blend: Blend, model: Model, shape: Sequence[int],
                   alike: bool) -> list[str]:
    """Of local blends the options that do nothing in this model, or with this source. blend: of all
    these edits; shape: of the latents (C, H, W); alike: the source's row is what is stored of the
    source, or nothing is."""
    sites = sites_of_side(model.unet, (shape[1], shape[2]), blend.side)
    there = sum(site.startswith("mid_block") for site in sites)
    said = []
    for e in edits:
        b = e.local_blend or LocalBlend()
        if b.keep != DEFAULT["keep"] and alike:
            said.append(f'"{e.prompt}": local_blend: keep changes nothing: the source is generated, or '
                        "follows what is stored")
        if b.middle and sites and not 0 < there < len(sites):
            why = "it alone has maps" if there else "it has no maps"
            said.append(f'"{e.prompt}": local_blend: middle changes nothing: the middle block counts where '
                        f"others count too, and {why} of {blend.side[0]} x {blend.side[1]} here")
    return said


def self_idle(edits: Sequence[Edit], model: Model, shape: Sequence[int]) -> list[str]:
    """Of self-attention's settings those that do nothing here; shape: of the latents, (C, H, W)."""
    pixels = model.unet.site_pixels(shape[1], shape[2])
    sizes = [pixels[layer.site] for layer in model.unet.layers(SelfAttention)]
    said = []
    for e in edits:
        for name in ("self_replace_steps", "self_max_tokens") if not sizes else ():
            if getattr(e, name) != DEFAULT[name]:
                said.append(f'"{e.prompt}": {name} changes nothing: no layer of this model is '
                            "self-attention")
        injected = window(e.self_replace_steps, "self_replace_steps")[1] > 0
        if sizes and injected and 0 < e.self_max_tokens < min(sizes):
            said.append(f'"{e.prompt}": self_max_tokens {e.self_max_tokens} leaves self-attention alone: its '
                        f"smallest maps are of {min(sizes)} pixels here")
    return said


def editor_idle(editor: Any, planned: Sequence[Any], steps: int) -> list[str]:
    """Whether another editor does anything, and which of its shares of the steps cover none."""
    name = type(editor).__name__
    if not any(planned):
        return [f"editor {name} changes nothing: as it is set it acts in no layer, or in none of the {steps} "
                "steps"]
    shares = {share: getattr(editor, share, None) for share in ("features", "attention")}
    return [f"editor {name}: {share} {value} covers none of the {steps} steps"
            for share, value in shares.items() if isinstance(value, Real) and 0 < value < 1 / steps]


def left_out(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> list[str]:
    """A note of the words whose change the scope of an edit leaves out. Raises UsageError where that
    is all that changes.

    A word that is added belongs to the scope where it stands before one of the scope's words ("a big cat");
    of others ("a cat at night", "a cat with a hat") nobody can tell: they act inside of it.
    """
    aligned = alignment(source, target, edit, mode, length)
    old, new = subject(source, target, replace(edit, scope=None), mode, length, aligned)
    ours, theirs = subject(source, target, edit, mode, length, aligned)
    loose, joins = [], False
    for name, columns in reversed(align.named_words(target)):
        if not added(mode, aligned[1], columns):
            joins = name in theirs
        elif not joins:
            loose.insert(0, name)
    scope = ", ".join([edit.scope] if isinstance(edit.scope, str) else edit.scope)
    if (old or new) and not {*ours, *theirs} & {*old, *new}:
        raise UsageError(f'"{target.text}": nothing of what changes '
                         f'({", ".join(dict.fromkeys([*old, *new]))}) is in the scope ({scope}), and outside '
                         "of it the picture stays as it is: name the words that change, or leave it out")
    outside = [*(w for w in new if w not in theirs), *loose]
    left = f"what {', '.join(outside)} would change outside of the scope ({scope}) is left out"
    return [left] if outside else []
