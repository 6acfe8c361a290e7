"""The visits of the page, by the tab's own name. The one that has done nothing for longest gives way; until
then a tab that loses its connection finds its visit again, and the pictures of a closed one stay."""
from __future__ import annotations

from collections import OrderedDict, deque
from threading import Lock
from typing import Any

from p2p.model import Model
from p2p.web.session import Session
from p2p.web.sources import Sources

MOST = 32
REMEMBERED = 1024   # visits that gave way


class Visits:
    def __init__(self, model: Model):
        self.model, self.sources = model, Sources(model)
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.gone: deque[str] = deque(maxlen=REMEMBERED)
        self.lock = Lock()

    def of(self, request: Any) -> Session:
        """The session of a request (gradio.Request), which begins with its first one."""
        name = str(request.session_hash)[:64]
        with self.lock:
            session = self.sessions.get(name)
            if session is None:
                session = Session(self.model, self.sources, returned=name in self.gone)
            self.sessions[name] = session
            self.sessions.move_to_end(name)
            idle = [n for n, other in self.sessions.items() if not other.busy and n != name]
            for n in idle[:max(len(self.sessions) - MOST, 0)]:
                other = self.sessions.pop(n)
                if other.gallery or other.picture:
                    self.gone.append(n)
                other.close()
            return session

    def known(self, request: Any) -> Session | None:
        """The session of a request that begins none."""
        return self.sessions.get(str(request.session_hash)[:64])

    def left(self, request: Any) -> None:
        """The tab is closed, or has lost its connection: what runs for it stops."""
        session = self.known(request)
        if session is not None:
            session.wanted = None
