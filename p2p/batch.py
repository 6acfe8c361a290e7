"""Runs a list of jobs: in this process, in several, as ranks of torchrun, or on a Ray cluster.

Every engine does the same: whoever gets a group of jobs computes it and puts its results into the store. What is done is
read off the store when a run starts, so any of them goes on where any other was stopped.
"""
from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from models.attention import Record
from p2p.errors import NumericsError, UsageError
from p2p.image import open_picture
from p2p.invert import invert, settings_read
from p2p.jobs import Job, Store, arguments, groups, read
from p2p.model import Model, load
from p2p.protocol import resampled, square
from p2p.run import Ready, Result, find_editor, prepared
from p2p.run import run as sample
from p2p.together import run_together
from weights.untrusted import printable

ENGINES = ("local", "torchrun", "ray")
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
        result, spent = _tried(model, lambda each=each: sample(model, each, Record(), False))
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
    how = {**job.others, "editor": find_editor(job.others.get("editor"))}
    if job.image is None:
        return prepared(model, **arguments(job), **how)
    if job.image.exists() and not job.image.is_file():   # to open a pipe would wait for ever
        raise UsageError(f"{job.image}: not a file")
    said = {**job.inverting, **job.sampling}
    fit, path, picture = said.pop("fit"), said.pop("path"), open_picture(job.image)
    if fit == "square":
        picture = square(picture, (said["height"], said["width"]))
    source = invert(model, picture, job.source, **settings_read(said["method"], said))
    if path == "resampled":
        source = resampled(model, source)
    return prepared(model, source, list(job.targets), guidance_scale=job.sampling["guidance_scale"], **how)


def work(model: Model, todo: Iterable[Group], store: Store, retry_failed: bool = False) -> Iterator[tuple[Job, str | None]]:
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


def run(batch: Batch, engine: str = "local", workers: int | None = None) -> dict[str, int]:
    """All jobs of the list that are not done; -> how many are done, failed and open (under torchrun: of this rank's share).

    Raises UsageError, CheckpointError.
    """
    model = load_for(batch, engine)
    return run_jobs(model, read(batch.jobs, model, batch.defaults), batch, engine, workers)


def load_for(batch: Batch, engine: str = "local") -> Model:
    """The model in this process; under torchrun on its rank's GPU. Raises UsageError, CheckpointError."""
    _place(engine)
    gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    return load(**batch.loading, device=gpu if engine == "torchrun" and _gpus(batch) else batch.device)


def _place(engine: str) -> tuple[int, int]:
    """Which of how many processes this is, each with a share of the jobs."""
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is not known; known: {', '.join(ENGINES)}")
    if engine != "torchrun":
        return 0, 1
    if "RANK" not in os.environ:
        raise UsageError("--engine torchrun is started by it: torchrun --nproc-per-node N -m p2p batch ... "
                         "--engine torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _gpus(batch: Batch) -> int:
    return torch.cuda.device_count() if batch.device in (None, "cuda") else 0


def run_jobs(model: Model, jobs: Sequence[Job], batch: Batch, engine: str = "local",
             workers: int | None = None) -> dict[str, int]:
    """`run` for jobs of any origin, and the model that `load_for` gave: those that are not done, each
    identity once.

    However it ends, results.jsonl then has a row for each of the jobs. Raises UsageError; KeyboardInterrupt,
    once it has said how far it came.
    """
    (rank, world), store = _place(engine), Store(batch.out)
    for note in model.notes if rank == 0 else ():
        print(f"note: {printable(note)}", file=sys.stderr)
    once = list({job.id: job for job in reversed(jobs)}.values())[::-1]
    share = groups(once, batch.together)[rank::world]
    todo = [g for g in share if any(_open(store, job, batch.retry_failed) for job in g)]
    many = workers or (max(1, _gpus(batch)) if engine == "local" else 1)
    if engine == "ray":
        from p2p.cluster import on_ray
        finished = on_ray(batch, todo, many)
    elif many > 1 and engine == "local":
        from p2p.cluster import in_processes
        finished = in_processes(batch, todo, many, _gpus(batch))
    else:
        finished = work(model, todo, store, batch.retry_failed)
    mine = {job.id for group in share for job in group}
    waiting = [job for g in todo for job in g if _open(store, job, batch.retry_failed)]
    try:
        with closing(finished):
            _follow(finished, waiting, len(jobs), batch.quiet)
    except BaseException as stop:
        with suppress(UsageError):   # a full disk, say, which is being told
            counts = store.index(jobs, mine)
            if isinstance(stop, KeyboardInterrupt):
                said = ", ".join(f"{n} {state}" for state, n in counts.items())
                print(f"stopped: {said}, see {store.root / 'results.jsonl'}; the same command goes on from "
                      "there", file=sys.stderr)
        raise
    return store.index(jobs, mine)


def _open(store: Store, job: Job, retry_failed: bool) -> bool:
    failed = store.failed(job) is not None
    return not store.done(job) and failed == retry_failed


def _follow(finished: Iterable[tuple[Job, str | None]], todo: Sequence[Job], total: int, quiet: bool) -> None:
    """Says how far it is: a bar on a terminal, else a line now and then; failures at once."""
    began = said = time.monotonic()
    if not quiet:
        print(f"{total} jobs, {len(todo)} to do", file=sys.stderr)
    with tqdm(total=len(todo), unit="job", disable=quiet or not sys.stderr.isatty()) as bar:
        for count, (job, error) in enumerate(finished, 1):
            bar.update()
            if error:
                tqdm.write(f"line {job.line} failed: {error}", file=sys.stderr)
            now = time.monotonic()
            if bar.disable and not quiet and (now - said > 30 or count == len(todo)):
                said, rate = now, count / (now - began)
                print(f"{count} of {len(todo)}, {rate:.2f} jobs/s, {(len(todo) - count) / rate:.0f} s left", file=sys.stderr)


def loaded(batch: Batch, device: str | None) -> Model:
    """The model in a worker; its absence there is said by whoever started the worker."""
    try:
        return load(**batch.loading, device=device)
    except Exception as error:
        raise RuntimeError(f"no model on {device or 'this worker'}: {error}") from None
