"""Engines that run groups of jobs in other processes. They hand out groups; the store keeps the results."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from p2p.errors import UsageError
from p2p.lists.jobs import Job, Store
from p2p.lists.stop import deaf, stoppable
from p2p.lists.work import Batch, Group, loaded, work

Finished = tuple[Job, str | None]
_CALLS = count()   # of `all_ended`
PATIENCE = 10   # seconds that a worker has to clean up when it is stopped


def in_processes(batch: Batch, todo: Sequence[Group], workers: int, gpus: int) -> Iterator[Finished]:
    """Runs one process a GPU, or `workers` of them on the CPU; each gets the next group when it is free. They
    have a pipe each and no queue: by its pipe a worker notices that this process has died, and no data is
    left in transit when this one ends."""
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    crew: dict[Connection, Any] = {}   # our end of a pipe -> the worker at the other
    waiting, lost = iter(todo), []
    try:
        for i in range(workers):
            ours, theirs = context.Pipe()
            device = f"cuda:{i % gpus}" if gpus else batch.device
            worker = context.Process(target=_worker, args=(batch, theirs, device, threads), daemon=True)
            with deaf():   # Ctrl-C reaches the whole process group; this process ends its workers
                worker.start()
            crew[ours] = worker
            theirs.close()
        busy = set(crew)
        while busy:
            for pipe in wait(busy):
                try:
                    kind, value = pipe.recv()
                    if kind == "free" and (group := next(waiting, None)) is not None:
                        pipe.send(group)
                        continue
                except (EOFError, OSError):   # the end of it
                    crew[pipe].join()
                    raise UsageError(f"a worker died (exit code {crew[pipe].exitcode}); what is done is "
                                     "kept, start again to go on") from None
                if kind == "job":
                    yield value
                else:   # nothing is left for it, or it has no model
                    busy.remove(pipe)
                    pipe.close()
                    lost += [value] if kind == "lost" else []
        for process in crew.values():
            process.join(PATIENCE)
    finally:
        _dismiss(list(crew.values()))
    if len(lost) == workers:
        raise UsageError(f"every worker failed: {lost[0]}")
    if lost:   # the others did its share
        print(f"{len(lost)} of {workers} workers failed: {lost[0]}", file=sys.stderr)


def _dismiss(crew: Sequence[Any]) -> None:
    for end in ("terminate", "kill"):
        for process in crew:
            if process.is_alive():
                getattr(process, end)()
        for process in crew:
            process.join(PATIENCE)


def all_ended() -> None:
    """Waits until every rank of torchrun has called it as often: torchrun ends all ranks as soon as one exits
    with a failure, as a rank with a failed job does. When a rank dies, torchrun sends the others SIGTERM."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:   # started by another launcher, which may set no address
        return
    # torchrun holds the store: if a minute finds none, it was killed (PyTorch would try for half an hour)
    store, _, world = next(iter(torch.distributed.rendezvous("env://", timeout=timedelta(minutes=1))))
    key = f"p2p-ended-{next(_CALLS)}"
    store.add(key, 1)
    while store.add(key, 0) < world:
        time.sleep(0.1)


def _worker(batch: Batch, pipe: Connection, device: str | None, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        with stoppable():
            try:
                model, store = loaded(batch, device), Store(batch.out)
                while True:
                    pipe.send(("free", None))
                    for each in work(model, [pipe.recv()], store, batch.retry_failed):
                        pipe.send(("job", each))
            except (EOFError, BrokenPipeError, ConnectionResetError):   # nothing is left, or the parent died
                pass
            except Exception as error:
                pipe.send(("lost", str(error)))
    except (OSError, KeyboardInterrupt):   # stopped by the parent
        pass


def on_ray(batch: Batch, todo: Sequence[Group], workers: int | None) -> Iterator[Finished]:
    """Ray Data (extra "ray"), with one actor a GPU of whatever cluster this process is connected to, or
    `workers`; on its CPUs where the batch's device is not a GPU, or there is none."""
    try:
        import ray
    except ImportError:
        raise UsageError('--engine ray needs Ray: pip install -e ".[ray]" in the clone') from None

    here = os.getcwd()

    class Actor:
        def __init__(self):
            with suppress(OSError):   # paths may be relative, and a cluster's processes run elsewhere
                os.chdir(here)
            self.model, self.store = loaded(batch, None if gpus else batch.device), Store(batch.out)

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            results = list(work(self.model, [todo[int(i)] for i in rows["group"]], self.store,
                                batch.retry_failed))
            return {"id": [job.id for job, _ in results], "error": [error or "" for _, error in results]}

    jobs = {job.id: job for group in todo for job in group}
    gpus = int(ray.cluster_resources().get("GPU", 0)) if batch.device in (None, "cuda") else 0
    data = ray.data.from_items([{"group": i} for i in range(len(todo))])
    done = data.map_batches(Actor, batch_size=1, concurrency=workers or max(1, gpus), num_gpus=min(1, gpus))
    try:
        for row in done.iter_rows():
            yield jobs[row["id"]], row["error"] or None
    except ray.exceptions.RayError as error:   # an actor has no model, or nowhere to write
        why = str(error).strip().splitlines()[-1]
        raise UsageError(f"Ray ended the run ({why}); what is done is kept, start again to go on") from None
