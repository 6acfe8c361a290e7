"""Being told to stop: by Ctrl-C, by a signal, or by a reader that has left."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def _interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does, by a KeyboardInterrupt (that holds the signal's
    number), so that what was half done is cleared away. Signals that are ignored (nohup) or handled stay
    so."""
    with _handled([s for s in _known("SIGTERM", "SIGHUP") if signal.getsignal(s) is signal.SIG_DFL],
                  _interrupt):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C, and the signals of `stoppable`, end the process itself: for imports, in which there is nothing
    to clear away, and extension modules lose a KeyboardInterrupt or make other errors of it."""
    def end(number: int, _: Any) -> None:
        with suppress(OSError):
            os.write(2, b"p2p: interrupted\n")
        os._exit(128 + number)

    ours = (signal.default_int_handler, _interrupt)
    with _handled([s for s in _known("SIGINT", "SIGTERM", "SIGHUP") if signal.getsignal(s) in ours], end):
        yield


def _known(*names: str) -> list[signal.Signals]:
    """Windows lacks SIGHUP."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


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
        except OSError as error:  # what is buffered, and what follows, goes nowhere: or it would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
