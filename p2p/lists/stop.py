"""Interruption: by Ctrl-C, by a signal, or by a reader that closes its end of a pipe."""
from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

SIGNALS = "SIGINT", "SIGTERM", "SIGHUP"
GRACE = 2.0   # seconds after a signal in which further ones are dropped: cleaning up is not interrupted
_heard: tuple[int, float] | None = None   # the signal that came, and when


def _interrupt(number: int, _: Any) -> None:
    global _heard
    if _heard is None or time.monotonic() - _heard[1] > GRACE:
        _heard = number, time.monotonic()
        raise KeyboardInterrupt(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP raise a KeyboardInterrupt with the signal's number, so that unfinished
    files are removed. Signals that are ignored (nohup) or handled already stay so."""
    global _heard
    _heard = None
    untouched = (signal.SIG_DFL, signal.default_int_handler)
    with _handled([s for s in _known(*SIGNALS) if signal.getsignal(s) in untouched],
                  _interrupt):
        yield


@contextmanager
def unmasked() -> Iterator[None]:
    """After a signal every exception is its doing: raises KeyboardInterrupt instead (safetensors reports a
    damaged file)."""
    try:
        yield
    except Exception:
        if _heard is not None:
            raise KeyboardInterrupt(_heard[0]) from None
        raise


@contextmanager
def at_once() -> Iterator[None]:
    """Makes Ctrl-C and the signals of `stoppable` end the process immediately: for imports, during which
    there is nothing to clean up, and extension modules swallow a KeyboardInterrupt or replace it."""
    def end(number: int, _: Any) -> None:
        with suppress(OSError):
            os.write(2, b"p2p: interrupted\n")
        os._exit(128 + number)

    with _handled([s for s in _known(*SIGNALS) if signal.getsignal(s) is _interrupt], end):
        yield


def _known(*names: str) -> list[signal.Signals]:
    """The signals that this system has: Windows lacks SIGHUP."""
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextmanager
def deaf() -> Iterator[None]:
    """Makes processes that are started inside ignore Ctrl-C and the end of their terminal."""
    with _handled(_known("SIGINT", "SIGHUP"), signal.SIG_IGN):
        yield


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Sets a handler for signals; only in the main thread, as Python allows it nowhere else."""
    ours = signals if threading.current_thread() is threading.main_thread() else []
    before = [signal.signal(s, handler) for s in ours]
    try:
        yield
    finally:
        for s, handler in zip(ours, before):
            signal.signal(s, handler)


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code that a shell reports: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


class Lasting:
    """A text stream whose reader may close the pipe (`p2p batch 2>&1 | head -1`): output is then discarded,
    and the work goes on."""

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
        except OSError as error:  # discard the buffer and later output, or flushing would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
