"""Runs a list of jobs: in this process, in several, as ranks of torchrun, or on a Ray cluster.

Every engine works alike: each process computes the groups of jobs that it gets, and puts their results into
the store. A run reads from the store which jobs are done, so any engine continues where another was stopped.
"""
from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import torch
from tqdm import tqdm

from p2p.errors import UsageError
from p2p.lists.cluster import all_ended, in_processes, on_ray
from p2p.lists.job import groups
from p2p.lists.jobs import Job, Store, read
from p2p.lists.work import Batch, work
from p2p.model import Model
from p2p.request.loading import load
from p2p.weights.untrusted import printable

ENGINES = ("local", "torchrun", "ray")


def run(batch: Batch, engine: str = "local", workers: int | None = None) -> dict[str, int]:
    """Runs all jobs of the list that are not done.  -> how many are done, failed and open (under torchrun: of
    this rank's share)

    Raises UsageError, CheckpointError.
    """
    model = load_for(batch, engine)
    return run_jobs(model, read_for(batch, model, engine), batch, engine, workers)


def load_for(batch: Batch, engine: str = "local") -> Model:
    """The model in this process, whose notes are said once; under torchrun on its rank's GPU. Raises
    UsageError, CheckpointError."""
    rank, _ = _place(engine)
    gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    model = load(**batch.loading, device=gpu if engine == "torchrun" and _gpus(batch) else batch.device)
    for note in model.notes if rank == 0 else ():
        print(f"note: {printable(note)}", file=sys.stderr)
    return model


def read_for(batch: Batch, model: Model, engine: str = "local") -> list[Job]:
    """The jobs of the list, whose notes are said once. Raises UsageError."""
    jobs = read(batch.jobs, model, batch.defaults, batch.out)
    noted = Counter(note for job in jobs for note in job.notes)
    for note, count in noted.items() if _place(engine)[0] == 0 else ():
        print(f"note: {note} (lines: {count} of {len(jobs)})", file=sys.stderr)
    return jobs


def _place(engine: str) -> tuple[int, int]:
    """The rank of this process, and the number of processes that share the jobs. Raises UsageError."""
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
    """Runs jobs of any origin that are not done, each identity once. model: from `load_for`.

    However it ends, results.jsonl then has a row for each of the jobs. Raises UsageError, and
    KeyboardInterrupt after it has reported its progress.
    """
    if engine == "torchrun" and workers is not None:
        raise UsageError("--workers: torchrun starts the processes (--nproc-per-node); leave it out")
    (rank, world), store = _place(engine), Store(batch.out)
    once = list({job.id: job for job in reversed(jobs)}.values())[::-1]
    share = groups(once, batch.together)[rank::world]
    todo = [g for g in share if any(_open(store, job, batch.retry_failed) for job in g)]
    many = min(workers or (max(1, _gpus(batch)) if engine == "local" else 1), len(todo))
    # the workers' model is this one, whatever their device would have
    batch = replace(batch, loading={**batch.loading, "dtype": model.dtype}, identity=model.identity())
    if engine == "ray":
        finished = on_ray(batch, todo, workers)
    elif many > 1 and engine == "local":
        finished = in_processes(batch, todo, many, _gpus(batch))
    else:
        finished = work(model, todo, store, batch.retry_failed)
    mine = {job.id for group in share for job in group}
    waiting = [job for g in todo for job in g if _open(store, job, batch.retry_failed)]
    try:
        with closing(finished):
            _follow(finished, waiting, len(jobs), batch.quiet)
        if engine == "torchrun":   # then all results are there
            all_ended()
    except BaseException as stop:
        with suppress(UsageError):   # a full disk, say, which is the error being raised
            counts = store.index(jobs, mine)
            if isinstance(stop, KeyboardInterrupt):
                summary = ", ".join(f"{n} {state}" for state, n in counts.items())
                print(f"stopped: {summary}, see {store.root / 'results.jsonl'}; the same command goes on "
                      "from there", file=sys.stderr)
        raise
    return store.index(jobs, mine)


def _open(store: Store, job: Job, retry_failed: bool) -> bool:
    failed = store.failed(job) is not None
    return not store.done(job) and failed == retry_failed


def _follow(finished: Iterable[tuple[Job, str | None]], todo: Sequence[Job], total: int, quiet: bool) -> None:
    """Reports progress: a bar on a terminal, else a line now and then; failures at once."""
    started = reported = time.monotonic()
    if not quiet:
        print(f"{total} jobs, {len(todo)} to do", file=sys.stderr)
    with tqdm(total=len(todo), unit="job", disable=quiet or not sys.stderr.isatty()) as bar:
        for count, (job, error) in enumerate(finished, 1):
            bar.update()
            if error:
                tqdm.write(f"line {job.line} failed: {printable(error)}", file=sys.stderr)
            now = time.monotonic()
            if bar.disable and not quiet and (now - reported > 30 or count == len(todo)):
                reported, rate = now, count / (now - started)
                print(f"{count} of {len(todo)}, {rate:.2f} jobs/s, {(len(todo) - count) / rate:.0f} s left",
                      file=sys.stderr)
