"""The server of the page, and its bounds."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from p2p.errors import UsageError
from p2p.model import Model
from p2p.web.asked import FILE
from p2p.web.page import Each, page
from p2p.web.runner import Runner

BODY = 2 * FILE     # bytes of a request
WAITING = 16        # requests for pictures that wait
FONTS: dict[str, Any] = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
#hand, footer { display: none !important; }
#gallery .grid-wrap { min-height: 0 !important; height: auto !important; max-height: 22rem; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) !important; }
#gallery .caption-label { font-size: .7em; max-width: 100%; }
#settings, #gallery { contain: inline-size; }   /* long lines do not widen the page */
"""


class Bounded:
    """Requests of at most BODY bytes. None uploads a file or names one (pictures arrive inside of messages);
    the files that are given are those below the folder."""

    def __init__(self, app: Any, folder: str):
        self.app, self.folder = app, folder

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any],
                       send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        route, given, file = scope["path"].partition("/file=")
        foreign = "/file/" in route or (given and not file.startswith(self.folder))
        if foreign or scope["path"].rstrip("/").endswith("/upload"):
            return await _refuse(send, 403)
        if not length.isdigit() or int(length) > BODY:
            return await _refuse(send, 413)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more and len(body) <= BODY:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > BODY:
            return await _refuse(send, 413)
        if _names_a_file(body):
            return await _refuse(send, 403)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, read, send)


def _names_a_file(body: bytes) -> bool:
    """Whether a control's value is a file of Gradio's, which it would fetch from wherever that is."""
    try:
        return '"gradio.FileData"' in json.dumps(json.loads(body)["data"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


async def _refuse(send: Callable[[Any], Any], status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def served(model: Model, host: str = "127.0.0.1", port: int | None = None, share: bool = False,
           each: Each = iter) -> Iterator[gr.Blocks]:
    """The page, served while the context lasts; its `local_url` says where. port: None: the first free one
    from 7860. each: as of `page`. Raises UsageError."""
    if not model.text_encoders:
        raise UsageError(f"{model.name} reads no text, and the page edits prompts: name a model that does")
    with TemporaryDirectory(prefix="p2p-web-") as temporary:
        folder = os.path.realpath(temporary)
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        blocks = page(model, each)
        blocks.queue(max_size=WAITING, api_open=False)
        blocks._queue.sleep_when_free = 0.02   # seconds; Gradio's 0.001 takes 9 % of a core
        try:
            blocks.launch(server_name=host, server_port=port, share=share, prevent_thread_lock=True,
                          quiet=True, show_error=True, inbrowser=False, max_file_size=1, footer_links=[],
                          run_history=False, enable_monitoring=False, ssr_mode=False, mcp_server=False,
                          pwa=False, num_workers=0, state_session_capacity=64,
                          theme=gr.themes.Default(**FONTS), css=CSS,
                          app_kwargs={"middleware": [Middleware(Bounded, folder=folder)]})
        except OSError as error:
            raise UsageError(f"--host {host} --port {port}: cannot listen there ({error})") from None
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


def serve(model: Model, host: str, port: int | None, share: bool) -> None:
    """Until it is interrupted; this thread computes."""
    runner = Runner()
    with served(model, host, port, share, runner.each) as blocks:
        print(f"{model.name} on {blocks.local_url}", flush=True)
        if share and blocks.share_url is None:
            raise UsageError("--share: no link could be had; without it the page is on this machine alone")
        runner.work()
