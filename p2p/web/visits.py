"""The visits of the page, by the tab's own name; the one that has done nothing for longest gives way."""
from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

from p2p.model import Model
from p2p.web.session import Session
from p2p.web.sources import Sources

MOST = 32


class Visits:
    def __init__(self, model: Model):
        self.model, self.sources = model, Sources(model)
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.lock = Lock()

    def of(self, request: Any) -> Session:
        """The session of a request (gradio.Request), which begins with its first one."""
        name = str(request.session_hash)[:64]
        with self.lock:
            session = self.sessions.pop(name, None) or Session(self.model, self.sources)
            self.sessions[name] = session
            idle = [n for n, other in self.sessions.items() if not other.busy and n != name]
            for n in idle[:max(len(self.sessions) - MOST, 0)]:
                self.sessions.pop(n).close()
            return session

    def known(self, request: Any) -> Session | None:
        """The session of a request that begins none."""
        return self.sessions.get(str(request.session_hash)[:64])

    def end(self, request: Any) -> None:
        with self.lock:
            session = self.sessions.pop(str(request.session_hash)[:64], None)
        if session is not None:
            session.close()
