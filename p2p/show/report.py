"""A run as one self-contained HTML file: sliders between source and edits, maps on hover, settings and
timings."""
from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from p2p.align import words
from p2p.image import data_url
from p2p.run import Result
from p2p.show.leakage import Leakage, mapped
from p2p.show.pictures import ACCENT, heat, marked
from p2p.show.preview import local_mask

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #28282e; overflow-wrap: anywhere;
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 2rem; } figure { margin: 0; width: min(24rem, 100%); }
.stack { position: relative; width: 100%; aspect-ratio: var(--ratio); }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%;
  object-fit: fill; }
.stack .over { clip-path: inset(0 0 0 var(--at, 50%)); }
.stack .map { opacity: 0; mix-blend-mode: screen; transition: opacity .12s; pointer-events: none; }
.stack .map.on { opacity: .9; } .stack.dim > img:not(.map) { filter: brightness(.55); }
.stack .line { position: absolute; top: 0; bottom: 0; width: 2px; left: var(--at, 50%);
  background: #fff; pointer-events: none; }
input[type=range] { width: 100%; margin: .4rem 0; accent-color: #cc3e16; }
ins { color: #cc3e16; text-decoration: none; } del { color: #77777f; }
.word { cursor: help; border-bottom: 2px dotted #b9b9c0; }
.word:hover, .word:focus { background: #cc3e16; color: #fff; }
.prompt { margin: 0; } .label { color: #77777f; font-size: .85em; } summary { cursor: pointer; }
table { border-collapse: collapse; } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
pre { overflow: auto; font-size: .85em; }
"""

_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const stack = figure.querySelector(".stack"), range = figure.querySelector("input");
  range.addEventListener("input", () => stack.style.setProperty("--at", range.value + "%"));
  for (const word of figure.querySelectorAll(".word")) {
    const map = stack.querySelector(`[data-map="${word.dataset.word}"]`);
    const show = on => { map.classList.toggle("on", on); stack.classList.toggle("dim", on); };
    for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]])
      word.addEventListener(event, () => show(on));
  }
}
"""


def report(result: Result, leaks: Sequence[Leakage] = ()) -> str:
    """The page of an edit: a figure per target, words that source and target do not share marked; with
    recorded maps of text, words show their attention on hover, local edits where they could act."""
    figures = "\n".join(_figure(result, k, leaks[k - 1] if leaks else None)
                        for k in range(1, len(result.images)))
    timings = "".join(f"<tr><td>{escape(name)}<td>{seconds:.2f} s"
                      for name, seconds in result.timings.items())
    settings = escape(json.dumps(short(result.settings), indent=2))
    notes = "".join(f"<li>{escape(note)}" for note in result.notes)
    hint = "" if not mapped(result) else (
        '<p class="label">Dotted words show where pixels attend to them: point at one, or tap it.</p>')
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(result.prompts[0])}</title><style>{_STYLE}</style>
<h1>{escape(result.prompts[0])}</h1>
{hint}<div class="figures">{figures}</div>
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<details><summary>Timings</summary><table>{timings}</table></details>
<details><summary>Settings</summary><pre>{settings}</pre></details>
<script>{_SCRIPT}</script></html>
"""


def _figure(result: Result, target: int, leak: Leakage | None) -> str:
    source, edited = result.images[0], result.images[target]
    texts = {row: _words(result, row) for row in (0, target)}
    lines, overlays = [], []
    for row, label, other, tag in ((0, "source", target, "del"), (target, "edit", 0, "ins")):
        line = [escape(word) for word in texts[row]]
        if mapped(result):
            have = [place for place, _, _ in result.maps.read_words(row)]
            maps = zip(have, result.maps.each_word(row))
            overlays += [_overlay(f"{row}-{i}", _map(values)) for i, (_, values) in maps]
            line = [_hovered(f"{row}-{i}", word) if i in have else word for i, word in enumerate(line)]
        alone = marked(" ".join(texts[other]), " ".join(texts[row]))
        line = [f"<{tag}>{shown}</{tag}>" if new else shown for shown, (_, new) in zip(line, alone)]
        told = result.captions()[row].removeprefix(result.prompts[row]) if row else ""
        line += [f'<span class="label">{escape(told.strip())}</span>'] if told else []
        lines.append(f'<p class="prompt"><span class="label">{label}</span> {" ".join(line)}</p>')
    if (mask := local_mask(result, target)) is not None:
        overlays.append(_overlay(f"{target}-mask", _coloured(mask)))
        lines.append(f'<p class="label">{_hovered(f"{target}-mask", "where it may change")}</p>')
    spread = ""
    if leak is not None:
        by_word = ", ".join(f"{escape(w)} {share:.0%}" for w, share in leak.by_word.items() if share >= 0.005)
        spread = (f'<p class="label">about: {escape(", ".join(leak.about)) or "nothing"}; elsewhere '
                  f"{leak.outside:.1%} of the pixels changed "
                  f"visibly{f' ({by_word})' if by_word else ''}</p>")
    under, over = data_url(source), data_url(edited)
    return f"""<figure><div class="stack" style="--ratio: {source.width} / {source.height}">
<img class="under" alt="source" src="{under}"><img class="over" alt="edit" src="{over}">
{"".join(overlays)}<div class="line"></div></div>
<input type="range" min="0" max="100" value="50" aria-label="source or edit">
{"".join(lines)}{spread}</figure>"""


def _words(result: Result, row: int) -> list[str]:
    """Of a prompt, as they were read where maps tell."""
    if result.maps is None:
        return result.prompts[row].split()
    return [word for word, _ in words(result.maps.prompts[row])]


def _hovered(key: str, text: str) -> str:
    return f'<span class="word" tabindex="0" data-word="{key}">{text}</span>'


def _overlay(key: str, picture: Image.Image) -> str:
    return f'<img class="map" data-map="{key}" alt="" src="{data_url(picture)}">'


def _coloured(mask: Tensor) -> Image.Image:
    return Image.fromarray((mask[..., None] * torch.tensor(ACCENT)).byte().numpy())


def _map(values: Tensor) -> Image.Image:
    return heat(values, (min(256, 4 * values.shape[1]), min(256, 4 * values.shape[0])))


def short(value):
    """Settings with their pictures, in base64, cut short."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    return f"{value[:40]}..." if isinstance(value, str) and len(value) > 400 else value
