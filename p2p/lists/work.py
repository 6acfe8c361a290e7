"""What one process does with the jobs that it is given: each is computed, and its results are
put into the store."""
from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from p2p.errors import NumericsError, UsageError
from p2p.image import open_picture
from p2p.lists.jobs import Job, Store
from p2p.lists.protocol import resampled, square
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
    """What to run. `loading`: arguments of `p2p.load`, without the device; it is what workers load."""

    jobs: Path | None            # the list; None where `run_jobs` is given the jobs
    out: Path
    loading: Mapping[str, Any]
    device: str | None = None
    together: int = 4            # jobs in a batch of the network, at most
    retry_failed: bool = False   # failed jobs, and these alone
    quiet: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)   # see `jobs.read`


class Failure(NamedTuple):
    """Why a job has no result. Not the exception itself, which would keep alive what its frames hold."""

    error: str
    trace: str | None = None   # of what nobody foresaw


def compute(model: Model, group: Sequence[Job]) -> Iterator[tuple[Job, Result | Failure, float]]:
    """Each job's result, or why it has none, and its seconds: jobs of one group share a batch and its time,
    but for those that cannot be prepared. Whatever is raised is a job's failure; but a lost device is a
    UsageError."""
    ready = []
    for job in group:
        made, seconds = _tried(model, lambda job=job: _ready(model, job))
        if isinstance(made, Failure):
            yield job, made, seconds
        else:
            ready.append((job, made, seconds))
    if len(ready) > 1:
        results, spent = _tried(model, lambda: run_together(model, [each for _, each, _ in ready]))
        if not isinstance(results, Failure):
            for (job, _, seconds), result in zip(ready, results):
                yield job, result, seconds + spent / len(ready)
            return   # otherwise one of them is to blame: each alone
    for job, each, seconds in ready:
        result, spent = _tried(model, lambda each=each: sample(model, each))
        yield job, result, seconds + spent


def _tried(model: Model, do: Callable[[], T]) -> tuple[T | Failure, float]:
    """What it gives, or why it does not, and the seconds it took. Raises UsageError if the device is lost."""
    began, failure = time.perf_counter(), None
    try:
        made = do()
    except (UsageError, NumericsError) as error:
        failure = Failure(str(error) or type(error).__name__)
    except Exception as error:   # of this job alone, whatever it is: out of memory, or a fault of ours
        failure = Failure(f"{type(error).__name__}: {error}".removesuffix(": "), traceback.format_exc())
    if failure is None:
        return made, time.perf_counter() - began
    try:
        _probe(model.device)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:   # after some faults of a GPU no process can use it again
        raise UsageError(f"{model.device} no longer answers ({str(error).splitlines()[0]}), since: "
                         f"{failure.error}; what is done is kept, start again to go on") from None
    return failure, time.perf_counter() - began


def _probe(device: torch.device) -> None:
    torch.ones(1, device=device).add(1).item()


def _ready(model: Model, job: Job) -> Ready:
    """All that comes before the sampling of one job: a picture is inverted here."""
    source: Any = job.source
    if job.image is not None:
        said, picture = job.inversion(), open_picture(job.image)
        if said["fit"] == "square":
            picture, said["fit"] = square(picture, (said["height"], said["width"])), None
        source = invert(model, picture, job.source, **said)
        if job.inverting["path"] == "resampled":
            source = resampled(model, source)
    return prepared(model, source=source, **job.editing())


def work(model: Model, todo: Iterable[Group], store: Store,
         retry_failed: bool = False) -> Iterator[tuple[Job, str | None]]:
    """Runs groups and stores what comes of them; each job as it is finished, with its error if it failed."""
    for group in todo:
        if retry_failed:   # each alone: the group that it once shared may be done
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
    """The model in a worker; its absence there is said by whoever started the worker."""
    try:
        return load(**batch.loading, device=device)
    except Exception as error:
        raise RuntimeError(f"no model on {device or 'this worker'}: {error}") from None
