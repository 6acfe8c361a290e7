"""Which options of an edit change nothing: weights, swaps and windows by comparing its tables with and
without each, the others case by case."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from typing import Any

import torch

from p2p import align
from p2p.blend import Blend, LocalBlend, reads_maps
from p2p.edits import Edit, Tables, alignment, covered, cross_alpha, decided, steps_of_windows, tables, window
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.attention import HybridAttention
from p2p.models.network import Network
from p2p.models.text import Tokens
from p2p.request import layers
from p2p.request.emphasis import read
from p2p.request.mask_sites import sites_of_side
from p2p.scope import added_words, subject

DEFAULT = {f.name: f.default for f in fields(Edit)} | {f.name: f.default for f in fields(LocalBlend)}
UNSAID = (None, 32 * 32)   # self_max_tokens: the latter is a UNet's own, as it is recorded


def idle_options(current: Tables, source: Tokens, target: Tokens, edit: Edit, mode: str, steps: int,
                 length: int, schedule_steps: int | None = None, hybrid: bool = False) -> list[str]:
    """Notes on each option that does nothing in an edit's tables, and why. current: the tables, as `tables`
    makes them of the other arguments. hybrid: some of the edited layers are hybrid attention."""
    given, edit = edit, decided(source, target, edit, mode, length)
    window_steps = steps_of_windows(edit, steps, schedule_steps)
    alpha = cross_alpha(edit.cross_replace_steps, target, window_steps, length)[:steps]

    def same(**changed: Any) -> bool:
        other = tables(source, target, replace(edit, **changed), steps, length, schedule_steps)
        return torch.equal(current.mix, other.mix) and torch.equal(current.keep, other.keep)

    notes = _windows(edit, given, steps, window_steps)
    if edit.windows_over != DEFAULT["windows_over"] and schedule_steps in (None, steps):
        notes.append("windows_over changes nothing: no step of the schedule is left out")
    empty = ("the source's attention is injected in none of the steps there, and it acts in those alone: see "
             "cross_replace_steps")
    for word, c in (edit.equalizer or {}).items():
        if same(equalizer=_less(edit.equalizer, word)):
            acts = alpha[:, align.word_tokens(target, word, length)].any()
            why = "it is 1" if c == 1 else "other names say as much of its words" if acts else empty
            notes.append(f'the weight of "{word}" (equalizer) changes nothing: {why}')
    for old, new in (edit.swap or {}).items():
        if same(swap=_less(edit.swap, old)):
            closed = not alpha[:, align.word_tokens(target, new, length)].any()
            why = empty if closed else f'mode {mode} pairs it with "{new}" anyhow'
            notes.append(f'swap of "{old}" changes nothing: {why}')
    by_word = given.cross_replace_steps
    if isinstance(by_word, Mapping):
        for word, bounds in by_word.items():
            other = window(by_word.get("default_", (0.0, 1.0)), word)
            others = _less(by_word, word)
            if word != "default_" and window(bounds, word) != other and same(cross_replace_steps=others):
                notes.append(f'the window of "{word}" (cross_replace_steps) changes nothing: the source has '
                             "no attention for it, or it covers the same steps as that of the other words")
    if edit.aligner != DEFAULT["aligner"] and same(aligner=DEFAULT["aligner"]):
        why = "the two align these prompts alike" if alpha.any() else empty
        notes.append(f"aligner {edit.aligner} changes nothing: {why}")
    if edit.renormalise and _rows_sum_to_one(current, hybrid):
        notes.append("renormalise changes nothing: every pixel's attention sums to 1 in all steps as it is")
    return notes + _blend(edit)


def idle(t: Tables) -> bool:
    """Whether an edit whose prompt is the source's leaves its maps as they are: mix + diag(keep) = 1 at every
    step."""
    mix, keep = t.mix, t.keep
    return torch.equal(mix + torch.diag_embed(keep), torch.eye(mix.shape[-1], dtype=mix.dtype).expand_as(mix))


def _less(mapping: Mapping[str, Any] | None, word: str) -> dict[str, Any]:
    return {k: v for k, v in (mapping or {}).items() if k != word}


def _windows(edit: Edit, given: Edit, steps: int, window_steps: int) -> list[str]:
    """Notes on windows that cover no step, and on limits of self-attention that is not injected. given: with
    None for windows that were chosen. window_steps: the number of steps that they are shares of."""
    notes, cross = [], edit.cross_replace_steps
    by_word = cross if isinstance(cross, Mapping) else {"default_": cross}
    named = {"cross_replace_steps": (by_word, window_steps + 1),
             "self_replace_steps": ({"default_": edit.self_replace_steps}, window_steps)}
    covers = {}
    for name, (windows, n) in named.items():
        for word, bounds in windows.items():
            lo, hi = window(bounds, name)
            covers[name] = any(i < steps for i in covered(bounds, n, name))
            if lo < hi and not covers[name]:
                notes.append(f"{name} {bounds!r}{'' if word == 'default_' else f' of {word!r}'} covers none "
                             f"of the {steps} steps")
    limit = edit.self_max_tokens
    if limit and limit not in UNSAID and not covers["self_replace_steps"]:
        notes.append("self_max_tokens changes nothing: self_replace_steps covers no step")
    if limit == 0 and given.self_replace_steps is not None and covers["self_replace_steps"]:
        notes.append("self_replace_steps changes nothing: self_max_tokens is 0")
    return notes


def hybrid_edited(current: Tables, unet: Network) -> bool:
    """Whether text is edited in a layer in which pixels attend to pixels and text in one softmax."""
    sites = [m.site for m in unet.layers(HybridAttention) if m.pixel_columns]
    return any(current.layers is None or current.layers[site][0] for site in sites)


def _rows_sum_to_one(current: Tables, hybrid: bool) -> bool:
    """Whether the rows of P_src mix + P diag(keep), and of pixels, sum to 1 for all maps P_src and P. In
    hybrid attention the text's share of a row is the source's, that of the pixels its own: they do not."""
    mix, keep = current.mix.sum(-1), current.keep                                          # (T, L) each
    if hybrid and mix.any():
        return False
    constant = all((x - x[:, :1]).abs().max() < 1e-9 for x in (mix, keep))                 # over the tokens
    return bool(constant and (mix[:, 0] + keep[:, 0] - 1).abs().max() < 1e-9)


def _blend(edit: Edit) -> list[str]:
    """Notes on options of the local blend that change nothing."""
    notes, b = [], edit.local_blend
    if b is None:
        return notes
    if edit.scope is not None and b.words is not None:
        notes.append("scope changes nothing in the picture: local_blend names words of its own")
    for name in ("threshold", "level", "middle") if not reads_maps(b, edit.scope) else ():
        if getattr(b, name) != DEFAULT[name]:
            notes.append(f"local_blend: {name} changes nothing: it is of maps of words, and none are named")
    of_words, of_substruct = b.thresholds
    if b.substruct is None and of_words != of_substruct:
        notes.append("local_blend: the second threshold changes nothing: it is for substruct, which is not "
                     "given")
    if b.substruct is not None and b.words is None and edit.scope is None and of_words != of_substruct:
        notes.append("local_blend: the first threshold changes nothing: it is for words, which are not given")
    if b.words is not None and b.rivals is None and of_words == 0:
        notes.append("local_blend: at threshold 0 the words limit nothing: all that attends to them counts")
    if b.substruct is not None and of_substruct == 0:
        notes.append("local_blend: at threshold 0 substruct leaves nothing to be edited: all that attends to "
                     "it is taken out")
    return notes


def blend_idle(b: LocalBlend, start: int, mask: torch.Tensor, steps: int) -> str | None:
    """Why a target's blend, or the mask in it, changes nothing; None where it may."""
    if start >= steps:
        return "local_blend starts after the last step"
    if not mask.any():
        return "local_blend's mask is dark: nothing may change"
    if b.mask is None or not mask.all():
        return None
    mask_only = b.words is None and b.substruct is None
    return f"local_blend{'' if mask_only else ': mask'} changes nothing: the mask is bright everywhere"


def blends_without(edits: Sequence[Edit], blend: Blend, model: Model, shape: Sequence[int],
                   as_stored: bool) -> list[str]:
    """Notes on options of local blends that do nothing in this model, or with this source.

    blend: of all these edits. shape: of the latents, (C, H, W). as_stored: the source's row follows its
    stored latents, or none are stored.
    """
    sites = sites_of_side(model.unet, (shape[1], shape[2]), blend.side)
    middle_sites = sum(site.startswith("mid_block") for site in sites)
    notes = []
    for e in edits:
        b = e.local_blend or LocalBlend()
        if b.keep != DEFAULT["keep"] and as_stored:
            notes.append(f'"{e.prompt}": local_blend: keep changes nothing: the source is generated, or '
                         "follows what is stored")
        if b.middle and sites and not 0 < middle_sites < len(sites):
            why = "it alone has maps" if middle_sites else "it has no maps"
            notes.append(f'"{e.prompt}": local_blend: middle changes nothing: the middle block counts where '
                         f"others count too, and {why} of {blend.side[0]} x {blend.side[1]} here")
    return notes


def self_idle(given: Sequence[Edit], edits: Sequence[Edit], model: Model, shape: Sequence[int]) -> list[str]:
    """Notes on settings of self-attention that do nothing here. edits: `given` with the windows that were
    chosen. shape: of the latents, (C, H, W)."""
    pixels, all_sites = model.unet.site_pixels(shape[1], shape[2]), model.unet.self_sites()
    notes = []
    for g, e in zip(given, edits):
        sites = layers.chosen(e.layers, model.unet)
        sizes = [pixels[site] for site in all_sites if sites is None or sites[site][1]]
        if not sizes:
            said = {"self_replace_steps": g.self_replace_steps is not None,
                    "self_max_tokens": g.self_max_tokens not in UNSAID}
            where = "of this model" if sites is None else "that is chosen"
            notes += [f'"{e.prompt}": {name} changes nothing: no layer {where} is self-attention'
                      for name in said if said[name]]
        injected = window(e.self_replace_steps, "self_replace_steps")[1] > 0
        limit = layers.for_network(e, model.unet).self_max_tokens
        if sizes and injected and limit and limit < min(sizes):
            notes.append(f'"{e.prompt}": self_max_tokens {limit} leaves self-attention alone: '
                         f"its smallest maps are of {min(sizes)} pixels here")
    return notes


def layers_idle(given: Sequence[Edit], edits: Sequence[Edit], edit_tables: Sequence[Tables],
                unet: Network) -> list[str]:
    """Notes on layers that change nothing, and on what is said of words where no layer is left
    that reads them. edits: `given` with what was chosen; edit_tables: theirs."""
    notes = []
    for g, e, t in zip(given, edits, edit_tables):
        acts = {"cross": bool(t.reads_text().any()), "self": bool(t.inject.any())}
        sites = layers.chosen(e.layers, unet)
        if sites is not None and sites == layers.chosen((0.0, 1.0), unet):
            notes.append(f'"{e.prompt}": layers changes nothing: all layers are chosen')
        elif sites is not None and not any(acts.values()):
            notes.append(f'"{e.prompt}": layers changes nothing: nothing is injected in any step')
        elif isinstance(e.layers, Mapping):
            notes += [f'"{e.prompt}": layers of {kind}-attention change nothing: nothing is injected there '
                      "in any step" for kind in e.layers if not acts[kind]]
        if sites is not None and acts["cross"] and not any(text for text, _ in sites.values()):
            said = [name for name in ("equalizer", "swap", "cross_replace_steps", "aligner", "renormalise")
                    if getattr(e if name == "equalizer" else g, name) != DEFAULT[name]]
            notes += [f'"{e.prompt}": {name} changes nothing: no layer that is chosen reads text'
                      for name in said]
    return notes


def emphasis_idle(edits: Sequence[Edit]) -> list[str]:
    """Notes on emphasis that changes nothing."""
    return [f'"{e.prompt}": emphasis changes nothing: no word of the prompt is weighted' for e in edits
            if e.emphasis != DEFAULT["emphasis"] and read(e.prompt).plain]


def editor_idle(editor: Any, planned: Sequence[Any], steps: int) -> list[str]:
    """Notes on another editor that does nothing, and on its shares of the steps that cover none."""
    name = type(editor).__name__
    if not any(planned):
        return [f"editor {name} changes nothing: as it is set it acts in no layer, or in none of the {steps} "
                "steps"]
    shares = {share: getattr(editor, share, None) for share in ("features", "attention")}
    return [f"editor {name}: {share} {value} covers none of the {steps} steps"
            for share, value in shares.items() if isinstance(value, Real) and 0 < value < 1 / steps]


def left_out(source: Tokens, target: Tokens, edit: Edit, mode: str, length: int) -> list[str]:
    """A note on the words whose change the scope of an edit leaves out, see `scope.loose`. Raises UsageError
    where it leaves out all: words that are only removed, swapped or weighed elsewhere."""
    aligned = alignment(source, target, edit, mode, length)
    old, new = subject(source, target, replace(edit, scope=None), mode, length, aligned)
    ours, theirs = subject(source, target, edit, mode, length, aligned)
    scope = ", ".join([edit.scope] if isinstance(edit.scope, str) else edit.scope)
    words = {*ours, *theirs, *added_words(target, mode, aligned[1])}
    if (old or new) and not words & {*old, *new}:
        raise UsageError(f'"{target.text}": nothing of what changes '
                         f'({", ".join(dict.fromkeys([*old, *new]))}) is in the scope ({scope}), and outside '
                         "of it the picture stays as it is: name the words that change, or leave it out")
    outside = [word for word in new if word not in theirs]
    left = f"what {', '.join(outside)} would change outside of the scope ({scope}) is left out"
    return [left] if outside else []
