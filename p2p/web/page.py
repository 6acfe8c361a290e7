"""The page: controls, and what they call. What they do is in `session`."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr

from p2p.errors import CheckpointError, NumericsError, UsageError
from p2p.image import data_url
from p2p.model import Model
from p2p.request.inverting import DEFAULT
from p2p.request.source import METHODS
from p2p.show.report import short
from p2p.web.asked import FILE, GUIDANCE, STEPS, Asked, layer_choices, read, text
from p2p.web.session import Session
from p2p.web.views import Item, View
from p2p.web.visits import Visits
from p2p.weights.untrusted import printable

USUAL_STEPS = 20
REFUSED = "not done"   # the title of a message


# The controls whose values `asked.read` takes, in its order; "hand" is what stage.js says.
VALUES = ("source", "target", "hand", "usual", "cross", "self_", "guidance", "steps", "seed", "negative",
          "layers", "blend", "method")
Components = dict[str, Any]   # by their names, which are their ids on the page
Each = Callable[[Iterator[View]], Iterator[View]]


def page(model: Model, each: Each) -> gr.Blocks:
    """each: hands on what a run shows; the thread in which it does is the one that computes."""
    c: Components = {}
    with gr.Blocks(analytics_enabled=False, title="Prompt-to-Prompt", delete_cache=(3600, 86400)) as blocks:
        gr.HTML(f"<h1>Prompt-to-Prompt</h1><p>{escape(model.name)}: a picture is edited by editing its "
                "prompt; a word's fader weighs its attention</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                _controls(c, model)
            with gr.Column(scale=3, min_width=300):
                _pictures(c)
        _wire(c, Calls(model, each), blocks)
    return blocks


def _controls(c: Components, model: Model) -> None:
    c["source"] = gr.Textbox(label="prompt", placeholder="a red cat on grass", elem_id="source")
    c["target"] = gr.Textbox(label="edited prompt", placeholder="a red dog on grass", elem_id="target")
    c["run"] = gr.Button("run", variant="primary", elem_id="run")
    with gr.Accordion("windows and sampling", open=False):
        c["usual"] = gr.Checkbox(True, label="windows by what the edit does", elem_id="usual")
        for name, label, value in (("cross", "cross-attention of the source, share of the steps", 0.8),
                                   ("self_", "self-attention of the source, share of the steps", 0.4)):
            c[name] = gr.Slider(0, 1, value, step=0.05, label=label, elem_id=name)
        c["guidance"] = gr.Slider(1, GUIDANCE, model.guidance_scale, step=0.5, label="guidance",
                                  elem_id="guidance")
        steps = min(USUAL_STEPS, model.steps)
        c["steps"] = gr.Slider(1, STEPS, steps, step=1, label="steps", elem_id="steps")
        c["seed"] = gr.Textbox("0", label="seed", elem_id="seed")
        c["negative"] = gr.Textbox(label="negative prompt", elem_id="negative")
        c["layers"] = gr.CheckboxGroup(list(layer_choices(model.unet)), label="inject in these layers alone",
                                       elem_id="layers")
    with gr.Accordion("where the picture may change", open=False):
        c["blend"] = gr.Textbox(label="blend words", placeholder="dog, or cat:dog", elem_id="blend",
                                info="words that mark the place; or paint it on the picture")
    with gr.Accordion("a picture of your own", open=False):
        c["upload"] = _html("upload", "", most=FILE)
        c["method"] = gr.Dropdown(list(METHODS), value=DEFAULT, label="inversion", elem_id="method")


def _pictures(c: Components) -> None:
    c["stage"] = _html("stage", {})
    c["hand"] = gr.HTML({}, html_template="", js_on_load=_file("hand.js"), elem_id="hand")
    c["gallery"] = gr.Gallery(label="this visit: choose one", allow_preview=False, buttons=[],
                              interactive=False, elem_id="gallery")
    with gr.Row():
        c["replay"] = gr.Button("replay", elem_id="replay", min_width=80)
        c["download"] = gr.DownloadButton("download", elem_id="download", min_width=80)
    with gr.Accordion("settings", open=False):
        c["settings"] = gr.Code(label="of the picture that was chosen", language="json", max_lines=16,
                                elem_id="settings", interactive=False, wrap_lines=True)


def _wire(c: Components, calls: Calls, blocks: gr.Blocks) -> None:
    values, shown = [c[name] for name in VALUES], [c["stage"], c["gallery"]]
    restored = [c[name] for name in VALUES if name != "hand"]
    told = [c["run"].click, *(c[name].submit for name in ("source", "target"))]
    moved = [*(c[name].input for name in ("hand", "usual", "layers", "method")),
             *(c[name].submit for name in ("seed", "negative", "blend"))]
    quiet: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
    work: dict[str, Any] = dict(quiet, concurrency_limit=1, concurrency_id="model")
    # Moves that come while one is computed: the page sends the last of them when it is done, and what stands
    # first stops what is computed until then (the page sends the calls of one event in this order, each when
    # the one before has ended).
    at_once: dict[str, Any] = dict(quiet, trigger_mode="multiple", queue=False)
    gr.on([*told, *moved], calls.newer, values, None, **at_once)
    c["replay"].click(calls.replayed, None, None, **at_once)
    gr.on(told, calls.run, values, shown, trigger_mode="always_last", **work)
    gr.on(moved, calls.moved, values, shown, trigger_mode="always_last", **work)
    for name in ("cross", "self_"):
        c[name].input(None, None, c["usual"], js="() => false")
    for name in ("cross", "self_", "guidance", "steps"):
        c[name].input(None, None, None, js="() => window.p2pSoon()")   # a move of "hand", when it rests
    c["upload"].upload(calls.upload, c["upload"], [c["stage"], c["upload"]], **work)
    c["upload"].clear(calls.forget, None, c["stage"], **work)
    c["gallery"].select(calls.choose, None, [c["settings"], c["download"]], **quiet)
    c["download"].click(calls.download, None, None, **quiet)
    c["replay"].click(calls.replay, None, [*shown, *restored], **work)
    blocks.unload(calls.leave)


class Calls:
    """What the controls call: values of the page in, and out; every refusal is a message on it."""

    def __init__(self, model: Model, each: Each):
        self.model, self.visits, self.each = model, Visits(model), each

    def run(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
        session = self.visits.of(request)
        yield from self._shown(session, lambda: session.run(read(self.model.unet, *values)))

    def moved(self, request: gr.Request, source: Any, *values: Any) -> Iterator[tuple[Any, Any]]:
        """As `run`, but before there is a prompt a control may be set in peace."""
        if source:
            yield from self.run(request, source, *values)

    def _shown(self, session: Session, begin: Callable[[], Iterator[View]],
               hand: dict[str, Any] | None = None) -> Iterator[tuple[Any, Any]]:
        try:
            for view in self.each(begin()):
                yield _value(view, session.photo, hand), session.pictures() if view.done else gr.skip()
                hand = None
        except (UsageError, NumericsError, CheckpointError) as error:
            # no exception: after one the page would forget a move that waits for this run's end
            gr.Warning(_said(error), title=REFUSED)
            yield {"refused": True, "said": "no picture was made"}, gr.skip()

    def newer(self, request: gr.Request, *values: Any) -> None:
        session = self.visits.known(request)
        try:
            if session is not None:
                session.want(read(self.model.unet, *values))
        except UsageError:
            pass   # `run` says so

    def replayed(self, request: gr.Request) -> None:
        session = self.visits.known(request)
        if session is not None and session.chosen is not None:
            session.announce(session.chosen)

    def upload(self, request: gr.Request, file: Any) -> tuple[Any, str]:
        """file: {"name": text, "url": data URL}, or the URL alone."""
        session = self.visits.of(request)
        try:
            file = file if isinstance(file, dict) else {"url": file, "name": "picture"}
            view = session.upload(file.get("url"), text("the picture's name", file.get("name")) or "picture")
            return _value(view, session.photo), ""
        except UsageError as error:
            raise _refused(error) from None

    def forget(self, request: gr.Request) -> Any:
        return _value(self.visits.of(request).forget(), "")

    def choose(self, request: gr.Request, event: gr.SelectData) -> tuple[str, str]:
        session = self.visits.of(request)
        try:
            item = session.choose(event.index)
        except UsageError as error:
            raise _refused(error) from None
        return json.dumps(short(item.settings), indent=1), str(session.download(item))

    def replay(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        session = self.visits.of(request)
        item = session.chosen
        if item is None:
            raise _refused("choose a picture of this visit first")
        hand = {"weights": dict(item.asked.weights), "mask": item.asked.mask}
        controls = _controls_of(item)
        for stage, gallery in self._shown(session, lambda: session.replay(item), hand):
            yield stage, gallery, *controls
            controls = (gr.skip(),) * len(controls)   # what is typed from now on stays

    def download(self, request: gr.Request) -> None:
        session = self.visits.known(request)
        if session is None or session.chosen is None:
            raise _refused("choose a picture of this visit first")

    def leave(self, request: gr.Request) -> None:
        self.visits.left(request)


def _controls_of(item: Item) -> tuple[Any, ...]:
    a: Asked = item.asked
    return (a.source, a.target, a.usual, a.cross, a.self_, a.guidance, a.steps, str(a.seed), a.negative,
            list(a.layers), a.blend, a.method)


def _refused(error: object) -> gr.Error:
    return gr.Error(_said(error), title=REFUSED, print_exception=False)


def _said(error: object) -> str:
    return escape(printable(error))


def _value(view: View, photo: str, hand: dict[str, Any] | None = None) -> dict[str, Any]:
    """A view as stage.js takes it; photo: the name of the uploaded picture; hand: faders and mask are set to
    this."""
    shown = view.edit or view.source
    return {"source": _url(view.source), "edit": _url(view.edit), "done": view.done, "said": view.said,
            "notes": list(view.notes), "photo": photo, "hand": hand,
            "ratio": f"{shown.width}/{shown.height}" if shown else "",
            "words": [{"name": w.name, "weight": w.weight, "map": _url(w.map)} for w in view.words]}


def _url(image: Any) -> str:
    # a fifth larger than at the usual level 6, in a third of the time
    return "" if image is None else data_url(image, compress_level=1)


def _html(name: str, value: Any, **props: Any) -> gr.HTML:
    return gr.HTML(value, html_template=_file(f"{name}.html"), css_template=_file(f"{name}.css"),
                   js_on_load=_file(f"{name}.js"), elem_id=name, apply_default_css=False, **props)


def _file(name: str) -> str:
    return (files("p2p.web") / name).read_text(encoding="utf-8")
