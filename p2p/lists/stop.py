"""Being told to stop: by Ctrl-C, by a signal, or by a reader that has left."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does, by a KeyboardInterrupt (that holds the signal's
    number), so that what was half done is cleared away. Signals that are ignored (nohup) or handled stay
    so."""
    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    found = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))   # Windows has one of them
    with _handled([s for s in found if s and signal.getsignal(s) is signal.SIG_DFL], stop):
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started inside do not hear Ctrl-C."""
    with _handled([signal.SIGINT], signal.SIG_IGN):
        yield


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Only a process's main thread may say what its signals do; in others they stay as they are."""
    ours = signals if threading.current_thread() is threading.main_thread() else []
    before = [signal.signal(s, handler) for s in ours]
    try:
        yield
    finally:
        for s, handler in zip(ours, before):
            signal.signal(s, handler)


def exit_code(stop: KeyboardInterrupt) -> int:
    """As a shell gives it: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


class Lasting:
    """A text stream whose reader may leave (`p2p batch 2>&1 | head -1`): what is said is lost, the work is
    not."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")   # None: it was closed (2>&-)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:   # what is buffered, and what follows, goes nowhere: or it would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
