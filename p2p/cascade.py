"""The cascade of the paper's backbone: an edit at low resolution, then super-resolution with the edited prompts."""
from __future__ import annotations

from typing import Any

import torch

from p2p.edit import from_dict
from p2p.errors import UsageError
from p2p.image import from_pil
from p2p.model import Model
from p2p.run import Result, edit, generate
from p2p.start import Low


def upscale(model: Model, small: Result, *, steps: int | None = None, guidance_scale: float | None = None, eta: float | None = None,
            noise_level: int | None = None, edited: bool = False, progress: bool = False) -> Result:
    """Four times larger pictures of a run, by a super-resolution stage that is told the same prompts.

    All rows share the noise of the run's seed, so what source and targets have in common stays common. The stage's attention
    is left alone, as in the paper; edited: it is injected as the run's was. noise_level: timestep of the noise put on the small
    pictures, None for the model's own (250 of 1000 for IF). The settings are the run's, with those of this stage under "upscale".
    """
    pictures = torch.cat([from_pil(i) for i in small.images])
    noise_level = model.noise_level if noise_level is None else noise_level
    seed = small.settings["seed"]
    common: dict[str, Any] = dict(steps=model.steps if steps is None else steps, guidance_scale=guidance_scale, eta=eta,
                                  low=Low(pictures, noise_level), progress=progress)
    if not edited:
        large = generate(model, small.prompts, seed=0 if seed is None else seed, **common)
    elif small.settings["command"] != "edit":
        raise UsageError("only an edit can be injected into the super-resolution stage")
    else:
        large = edit(model, small.prompts[0], [from_dict(t) for t in small.settings["targets"]],
                     seed=0 if seed is None else seed, **common)
    said = {k: large.settings[k] for k in ("model", "places", *model.identity(), "steps", "guidance_scale", "eta")}
    large.settings = small.settings | {"upscale": said | {"noise_level": noise_level, "edited": edited}}
    large.notes, large.rows = [*small.notes, *large.notes], small.rows + large.rows
    large.timings = {k: small.timings[k] + v for k, v in large.timings.items()}
    return large
