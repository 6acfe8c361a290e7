"""A run as one self-contained HTML file: sliders between source and edits, maps on hover, settings and
timings."""
from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from p2p.align import words
from p2p.image import to_base64
from p2p.run import Result
from p2p.show.leakage import Leakage
from p2p.show.pictures import heat

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #28282e;
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
figure { display: inline-block; margin: 0 2rem 2rem 0; vertical-align: top; width: 24rem; }
.stack { position: relative; width: 24rem; aspect-ratio: var(--ratio); }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%;
  object-fit: fill; image-rendering: auto; }
.stack .over { clip-path: inset(0 0 0 var(--at, 50%)); }
.stack .map { opacity: 0; mix-blend-mode: screen; transition: opacity .12s; pointer-events: none; }
.stack .map.on { opacity: .9; } .stack.dim > img:not(.map) { filter: brightness(.55); }
.stack .line { position: absolute; top: 0; bottom: 0; width: 2px; left: var(--at, 50%);
  background: #fff; pointer-events: none; }
input[type=range] { width: 100%; margin: .4rem 0; accent-color: #cc3e16; }
.word { cursor: default; padding: 0 .15em; border-radius: .2em; }
.word:hover, .word:focus { background: #cc3e16; color: #fff; }
.prompt { margin: 0; } .label { color: #77777f; font-size: .85em; }
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
    """The page of an edit: a figure per target; with recorded maps of text, words show their
    attention on hover."""
    figures = "\n".join(_figure(result, k, leaks[k - 1] if leaks else None)
                        for k in range(1, len(result.images)))
    timings = "".join(f"<tr><td>{escape(name)}<td>{seconds:.2f} s"
                      for name, seconds in result.timings.items())
    notes = "".join(f"<li>{escape(note)}" for note in result.notes)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(result.prompts[0])}</title><style>{_STYLE}</style>
<h1>{escape(result.prompts[0])}</h1>
{figures}
<h2>Timings</h2><table>{timings}</table>
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<h2>Settings</h2><pre>{escape(json.dumps(short(result.settings), indent=2))}</pre>
<script>{_SCRIPT}</script></html>
"""


def _figure(result: Result, target: int, leak: Leakage | None) -> str:
    source, edited = result.images[0], result.images[target]
    lines, overlays = [], []
    for row, label in ((0, "source"), (target, "edit")):
        if result.maps is None:
            line = escape(result.prompts[row])
        else:
            spans = []
            texts = [word for word, _ in words(result.maps.prompts[row])]
            for i, (word, (_, values)) in enumerate(zip(texts, result.maps.each_word(row))):
                spans.append(f'<span class="word" tabindex="0" data-word="{row}-{i}">{escape(word)}</span>')
                overlays.append(f'<img class="map" data-map="{row}-{i}" alt="" src="{_data(_map(values))}">')
            line = " ".join(spans)
        lines.append(f'<p class="prompt"><span class="label">{label}</span> {line}</p>')
    spread = ""
    if leak is not None:
        by_word = ", ".join(f"{escape(w)} {share:.0%}" for w, share in leak.by_word.items() if share >= 0.005)
        spread = (f'<p class="label">about: {escape(", ".join(leak.about)) or "nothing"}; elsewhere '
                  f"{leak.outside:.1%} of the pixels changed "
                  f"visibly{f' ({by_word})' if by_word else ''}</p>")
    return f"""<figure><div class="stack" style="--ratio: {source.width} / {source.height}">
<img class="under" alt="source" src="{_data(source)}"><img class="over" alt="edit" src="{_data(edited)}">
{"".join(overlays)}<div class="line"></div></div>
<input type="range" min="0" max="100" value="50" aria-label="source or edit">
{"".join(lines)}{spread}</figure>"""


def _map(values: Tensor) -> Image.Image:
    return heat(values, (min(256, 4 * values.shape[1]), min(256, 4 * values.shape[0])))


def _data(image: Image.Image) -> str:
    return f"data:image/png;base64,{to_base64(image)}"


def short(value):
    """Settings with their pictures, in base64, cut short."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    return f"{value[:40]}..." if isinstance(value, str) and len(value) > 400 else value
