"""Runs a list of jobs: in this process, in several, as ranks of torchrun, or on a Ray cluster.

Every engine does the same: whoever gets a group of jobs computes it and puts its results into the store. What is done is
read off the store when a run starts, so any of them goes on where any other was stopped.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from models.attention import Record
from p2p.errors import NumericsError, UsageError
from p2p.image import open_picture
from p2p.invert import invert
from p2p.jobs import Job, Store, arguments, groups, read
from p2p.model import Model, load
from p2p.run import Ready, Result, find_editor, prepared
from p2p.run import run as sample
from p2p.together import run_together

ENGINES = ("local", "torchrun", "ray")
Group = list[Job]


@dataclass(frozen=True)
class Batch:
    """What to run. `loading`: arguments of `p2p.load`, without the device."""

    jobs: Path
    out: Path
    loading: Mapping[str, Any]
    device: str | None = None
    together: int = 4            # jobs in a batch of the network, at most
    retry_failed: bool = False   # failed jobs, and these alone
    quiet: bool = False


FAILURES = (UsageError, NumericsError, torch.OutOfMemoryError)   # of a job; anything else ends the run


def compute(model: Model, group: Sequence[Job]) -> Iterator[tuple[Job, Result | Exception]]:
    """Each job's result, or why it has none. Jobs of one group share a batch, but for those that cannot be prepared."""
    ready = []
    for job in group:
        try:
            ready.append((job, _ready(model, job)))
        except FAILURES as error:
            yield job, error
    if len(ready) > 1:
        try:
            yield from zip([job for job, _ in ready], run_together(model, [r for _, r in ready]))
            return
        except FAILURES:
            pass   # one of them is to blame: each alone
    for job, each in ready:
        try:
            yield job, sample(model, each, Record(), False)
        except FAILURES as error:
            yield job, error


def _ready(model: Model, job: Job) -> Ready:
    """All that comes before the sampling of one job: a picture is inverted here."""
    how = dict(proximal=job.others.get("proximal"), editor=find_editor(job.others.get("editor")))
    if job.image is None:
        return prepared(model, **arguments(job), **how)
    inverted = invert(model, open_picture(job.image), job.source, **job.inverting, **job.sampling)
    return prepared(model, inverted, list(job.targets), guidance_scale=job.sampling["guidance_scale"], **how)


def work(model: Model, todo: Iterable[Group], store: Store, retry_failed: bool = False) -> Iterator[tuple[Job, str | None]]:
    """Runs groups and stores what comes of them; each job as it is finished, with its error if it failed."""
    for group in todo:
        if retry_failed:   # each alone: the group that it once shared may be done
            parts = [[job] for job in group if store.failed(job)]
        else:
            parts = [group] if any(not store.done(job) and not store.failed(job) for job in group) else []
        for part in parts:
            for job, result in compute(model, part):
                if store.done(job):
                    continue
                if isinstance(result, Exception):
                    store.fail(job, str(result) or type(result).__name__)
                else:
                    store.finish(job, result)
                yield job, str(result) if isinstance(result, Exception) else None


def run(batch: Batch, engine: str = "local", workers: int | None = None) -> dict[str, int]:
    """All jobs of the list that are not done; -> how many are done, failed and open (under torchrun: of this rank's share).

    Raises UsageError, CheckpointError.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is not known; known: {', '.join(ENGINES)}")
    rank, world = 0, 1
    if engine == "torchrun":
        if "RANK" not in os.environ:
            raise UsageError("--engine torchrun is started by it: torchrun --nproc-per-node N -m p2p batch ... --engine torchrun")
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() if batch.device in (None, "cuda") else 0
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if gpus and engine == "torchrun" else batch.device
    model = load(**batch.loading, device=device)
    for note in model.notes if rank == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    jobs, store = read(batch.jobs, model), Store(batch.out)
    share = groups(jobs, batch.together)[rank::world]
    todo = [g for g in share if any(_open(store, job, batch.retry_failed) for job in g)]
    many = workers or (max(1, gpus) if engine == "local" else 1)
    if engine == "ray":
        from p2p.cluster import on_ray
        finished = on_ray(batch, todo, many)
    elif many > 1 and engine == "local":
        from p2p.cluster import in_processes
        finished = in_processes(batch, todo, many, gpus)
    else:
        finished = work(model, todo, store, batch.retry_failed)
    _follow(finished, [job for g in todo for job in g if _open(store, job, batch.retry_failed)], len(jobs), batch.quiet)
    return store.index(jobs, {job.id for group in share for job in group})


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
