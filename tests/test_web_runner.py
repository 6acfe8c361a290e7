"""The thread that computes for the page."""
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2p.web.runner import Runner


class Ended(BaseException):
    """As Ctrl-C, which is no Exception either."""


def end():
    raise Ended
    yield


@pytest.fixture
def runner():
    """One that works in a thread of its own, until `end` is asked of it."""
    runner = Runner()
    with ThreadPoolExecutor(1) as pool:
        worked = pool.submit(runner.work)
        yield runner
        assert list(runner.each(end())) == []   # and nobody is left waiting
        assert isinstance(worked.exception(), Ended)


def test_all_values_of_all_threads_are_made_in_the_one_that_works(runner):
    made = [threading.get_ident()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: [*runner.each((made.append(threading.get_ident()), k)[1] for k in range(n))], range(8)))
    assert found == [list(range(n)) for n in range(8)]
    assert len(made) == 1 + sum(range(8)) and len(set(made)) == 2


def test_what_is_raised_reaches_who_asked_and_work_goes_on(runner):
    def two():
        yield 1
        raise ValueError("no more")

    values = runner.each(two())
    assert next(values) == 1
    with pytest.raises(ValueError, match="no more"):
        next(values)
    assert list(runner.each(iter("ab"))) == ["a", "b"]


def test_one_that_nobody_follows_any_more_is_closed(runner):
    closed = []

    def values():
        try:
            yield from range(9)
        finally:
            closed.append(True)

    followed = runner.each(values())
    next(followed)
    followed.close()
    assert closed == [True]
