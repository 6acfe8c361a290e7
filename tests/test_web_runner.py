"""The thread that computes for the page."""
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from web_page import DOG, values

import p2p
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


@pytest.mark.slow
def test_the_thread_that_serves_is_the_one_that_computes(shallow, monkeypatch):
    from p2p.web import serve  # and Gradio, which takes seconds
    from p2p.web.page import Calls

    real, threads, shown = p2p.Model.predict, set(), []

    def predict(model, *given, **named):
        threads.add(threading.get_ident())
        return real(model, *given, **named)

    @contextmanager
    def served(model, host, port, share, each):
        def visit():
            try:
                shown.extend(Calls(model, each).run(SimpleNamespace(session_hash="a"), *values({"target": DOG})))
            finally:
                list(each(end()))

        with ThreadPoolExecutor(1) as pool:
            pool.submit(visit)
            yield SimpleNamespace(local_url="", share_url=None)

    monkeypatch.setattr(p2p.Model, "predict", predict)
    monkeypatch.setattr(serve, "served", served)
    with pytest.raises(Ended):
        serve.serve(shallow, "127.0.0.1", None, False)
    assert threads == {threading.get_ident()} and shown[-1][0]["done"]
