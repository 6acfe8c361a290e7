"""Engines that run groups of jobs in other processes. They hand out groups; the store keeps the results."""
from __future__ import annotations

import queue
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from p2p.batch import Batch, Group, loaded, work
from p2p.errors import UsageError
from p2p.jobs import Job, Store

Finished = tuple[Job, str | None]


def in_processes(batch: Batch, todo: Sequence[Group], workers: int, gpus: int) -> Iterator[Finished]:
    """One process a GPU, or so many on the CPU; each takes the next group when it is free."""
    context = torch.multiprocessing.get_context("spawn")
    waiting, finished = context.Queue(), context.Queue()
    for group in [*todo, *[None] * workers]:   # None: nothing is left
        waiting.put(group)
    threads = max(1, torch.get_num_threads() // workers)
    devices = [f"cuda:{i % gpus}" if gpus else batch.device for i in range(workers)]
    running = [context.Process(target=_worker, args=(batch, waiting, finished, device, threads), daemon=True) for device in devices]
    for process in running:
        process.start()
    lost, ended = [], 0
    while ended < workers:
        try:
            kind, value = finished.get(timeout=1)
        except queue.Empty:
            dead = [p.exitcode for p in running if p.exitcode not in (None, 0)]
            if dead:
                raise UsageError(f"a worker died (exit code {dead[0]}); what is done is kept, start again to go on") from None
            continue
        if kind == "job":
            yield value
        else:
            ended += 1
            lost += [value] if value else []
    if len(lost) == workers:
        raise UsageError(f"every worker failed: {lost[0]}")
    if lost:   # the others did its share
        print(f"{len(lost)} of {workers} workers failed: {lost[0]}", file=sys.stderr)


def _worker(batch: Batch, waiting: Any, finished: Any, device: str | None, threads: int) -> None:
    torch.set_num_threads(threads)
    why = None
    try:
        model, store = loaded(batch, device), Store(batch.out)
        for group in iter(waiting.get, None):
            for each in work(model, [group], store, batch.retry_failed):
                finished.put(("job", each))
    except (RuntimeError, UsageError) as error:
        why = str(error)
    finished.put(("end", why))


def on_ray(batch: Batch, todo: Sequence[Group], workers: int) -> Iterator[Finished]:
    """Ray Data with one actor a device (extra "ray"); whatever cluster this process is connected to."""
    try:
        import ray
    except ImportError:
        raise UsageError('--engine ray needs Ray: pip install "prompt-to-prompt[ray]"') from None

    class Actor:
        def __init__(self):
            self.model, self.store = loaded(batch, None), Store(batch.out)

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            found = list(work(self.model, [todo[int(i)] for i in rows["group"]], self.store, batch.retry_failed))
            return {"line": [job.line for job, _ in found], "error": [error or "" for _, error in found]}

    by_line = {job.line: job for group in todo for job in group}
    data = ray.data.from_items([{"group": i} for i in range(len(todo))])
    gpus = 1 if torch.cuda.is_available() else 0
    done = data.map_batches(Actor, batch_size=1, concurrency=workers, num_gpus=gpus)
    for row in done.iter_rows():
        yield by_line[int(row["line"])], row["error"] or None
