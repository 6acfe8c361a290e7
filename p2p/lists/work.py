"""Runs jobs in one process: each is computed, and its results are put into the store."""
from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from p2p.errors import NumericsError, UsageError
from p2p.image import check_file, open_picture
from p2p.lists.jobs import Job, Store, content_of
from p2p.lists.protocol import resampled, square
from p2p.lists.stop import unmasked
from p2p.lists.together import run_together
from p2p.model import Model
from p2p.request.loading import load
from p2p.request.ready import Ready, prepared
from p2p.run import Result
from p2p.run import run as sample
from p2p.sources.methods import invert

Group = list[Job]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The settings of a run. loading: arguments of `p2p.load` without the device, for the workers."""

    jobs: Path | None            # the list; None if the jobs are passed to `run_jobs`
    out: Path
    loading: Mapping[str, Any]
    device: str | None = None
    together: int = 4            # jobs in a batch of the network, at most
    retry_failed: bool = False   # run failed jobs only
    quiet: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)   # see `jobs.read`
    identity: Mapping[str, Any] | None = None   # of the model that the jobs' identities are of


class Failure(NamedTuple):
    """Why a job has no result; not the exception, whose traceback would keep its frames' tensors alive."""

    error: str
    trace: str | None = None   # of an unforeseen error


def compute(model: Model, group: Sequence[Job]) -> Iterator[tuple[Job, Result | Failure, float]]:
    """Each job's result or failure, and its seconds. Jobs of one group share a batch and its time, but for
    those that cannot be prepared. Any exception is a job's failure, except a lost device: UsageError."""
    ready = []
    for job in group:
        outcome, seconds = _tried(model, lambda job=job: _ready(model, job))
        if isinstance(outcome, Failure):
            yield job, outcome, seconds
        else:
            ready.append((job, outcome, seconds))
    if len(ready) > 1:
        results, spent = _tried(model, lambda: run_together(model, [each for _, each, _ in ready]))
        if not isinstance(results, Failure):
            for (job, _, seconds), result in zip(ready, results):
                yield job, result, seconds + spent / len(ready)
            return   # one of them fails: run each by itself
    for job, each, seconds in ready:
        result, spent = _tried(model, lambda each=each: sample(model, each))
        yield job, result, seconds + spent


def _tried(model: Model, do: Callable[[], T]) -> tuple[T | Failure, float]:
    """Calls `do`.  -> its value or failure, and the seconds. Raises UsageError if the device is lost."""
    started, failure = time.perf_counter(), None
    try:
        with unmasked():
            value = do()
    except (UsageError, NumericsError) as error:
        failure = Failure(str(error) or type(error).__name__)
    except Exception as error:   # any other failure of this job: out of memory, or a bug
        failure = Failure(f"{type(error).__name__}: {error}".removesuffix(": "), traceback.format_exc())
    if failure is None:
        return value, time.perf_counter() - started
    try:
        _probe(model.device)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:   # after some faults of a GPU no process can use it again
        raise UsageError(f"{model.device} no longer answers ({str(error).splitlines()[0]}), since: "
                         f"{failure.error}; what is done is kept, start again to go on") from None
    return failure, time.perf_counter() - started


def _probe(device: torch.device) -> None:
    torch.ones(1, device=device).add(1).item()


def _ready(model: Model, job: Job) -> Ready:
    """Prepares one job for sampling: inverts its picture, if it has one."""
    source: Any = job.source
    if job.image is not None:
        check_file(job.image)   # raises
        if content_of(job.image) != job.content:
            raise UsageError(f"{job.image}: not the picture that it was when the list was read; start again "
                             "for this one")
        settings, picture = job.inversion(model), open_picture(job.image)
        if settings["fit"] == "square":
            picture, settings["fit"] = square(picture, (settings["height"], settings["width"])), None
        source = invert(model, picture, job.source, **settings)
        if job.inverting["path"] == "resampled":
            source = resampled(model, source)
    return prepared(model, source=source, **job.editing())


def work(model: Model, todo: Iterable[Group], store: Store,
         retry_failed: bool = False) -> Iterator[tuple[Job, str | None]]:
    """Runs groups and stores their results; yields each finished job, with its error if it failed."""
    for group in todo:
        if retry_failed:   # each by itself: the rest of its group may be done
            parts = [[job] for job in group if store.failed(job)]
        else:
            parts = [group] if any(not store.done(job) and not store.failed(job) for job in group) else []
        for part in parts:
            for job, result, seconds in compute(model, part):
                if store.done(job):
                    continue
                if isinstance(result, Failure):
                    store.fail(job, *result)
                    yield job, result.error
                else:
                    store.finish(job, result, seconds)
                    yield job, None


def loaded(batch: Batch, device: str | None) -> Model:
    """Loads the model in a worker. Raises RuntimeError, which the parent process reports."""
    try:
        with unmasked():
            model = load(**batch.loading, device=device)
            here, there = batch.identity or {}, model.identity()
            if other := [name for name in here if here[name] != there.get(name)]:
                raise UsageError(f"there it has another {', '.join(other)} than where the list was read")
            return model
    except Exception as error:
        raise RuntimeError(f"no model on {device or 'this worker'}: {error}") from None
