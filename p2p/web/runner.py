"""One thread computes for all visits: the one that loaded the model.

OpenMP keeps helpers for every thread that has computed. With more of them than cores they sleep between any
two operations: an edit of the bundled model then takes 1.3 times as long (measured on two cores).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Runner:
    """Runs the iterators of other threads in the thread that calls `work`."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def each(self, values: Iterator[T]) -> Iterator[T]:
        """The values of an iterator, each made by the thread that works; no more of them when that is
        interrupted. Raises what they raise."""
        end = object()
        with suppress(CancelledError):
            while (value := self._done(lambda: next(values, end))) is not end:
                yield value

    def _done(self, call: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self.calls.put((future, call))
        return future.result()

    def work(self) -> None:
        """Until it is interrupted; then the call that it was at is cancelled."""
        while True:
            _answer(*self.calls.get())


def _answer(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    except BaseException:
        future.cancel()
        raise
