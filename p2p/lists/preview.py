"""Before a long run: a few of its edits in few steps, with where they may change; a few of its samples with
what the judge says of them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from p2p.lists.dataset import Pair
from p2p.lists.ip2p import Recipe, check, drawn, judged
from p2p.lists.jobs import Job
from p2p.lists.metrics import Embedder
from p2p.lists.work import Failure, compute
from p2p.model import Model
from p2p.show.pictures import grid
from p2p.show.preview import STEPS, preview, shortened


def jobs(model: Model, listed: Sequence[Job]) -> Iterator[tuple[Job, Image.Image | Failure]]:
    """A row of pictures for each job, see `quick`, or why there is none."""
    for job in listed:
        for _, result, _ in compute(model, [quick(job)]):
            yield job, result if isinstance(result, Failure) else preview(result)


def quick(job: Job) -> Job:
    """A job in at most STEPS steps, what counts steps as large a share of them; explicit timesteps stay."""
    steps = job.sampling["steps"]
    if steps is None or steps <= STEPS or job.others.get("timesteps") is not None:
        return job
    return job._replace(sampling={**job.sampling, "steps": STEPS},
                        inverting={**job.inverting, **shortened(job.inverting, steps)})


def samples(model: Model, pairs: Sequence[Pair], embedder: Embedder, recipe: Recipe) -> Iterator[Image.Image]:
    """The first sample of each prompt, captioned with the similarities that the judge finds, and with the
    filter that drops it. Raises NumericsError, UsageError."""
    check(model, recipe)
    for pair in pairs:
        texts, draws = embedder.texts(list(pair.prompts)), [drawn(pair.prompts, 0, recipe, model)]
        (info, pictures, why), = judged(model, pair.prompts, draws, texts, embedder, recipe)
        a, b, direction, alike = (info[f"clip_sim_{name}"] for name in ("0", "1", "dir", "image"))
        verdict = "kept" if why is None else f"dropped by {why}"
        yield grid(pictures, [f"{pair.prompts.caption} (text {a:.2f})",
                              f"{pair.prompts.output} (text {b:.2f}, direction {direction:.2f}, "
                              f"image {alike:.2f}: {verdict})"])
