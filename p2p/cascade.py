"""The cascade of the paper's backbone: an edit at low resolution, then super-resolution with the edited prompts."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p2p.errors import UsageError
from p2p.image import from_pil
from p2p.model import Model, find_model
from p2p.request.checks import flag, whole
from p2p.request.start import Low
from p2p.run import Result, edit, generate
from p2p.weights.untrusted import brief


def upscale(model: Model | str | Path, small: Result, *, steps: int | None = None, guidance_scale: float | None = None,
            eta: float | None = None, noise_level: int | None = None, edited: bool = False, progress: bool = False) -> Result:
    """Four times larger pictures of a run, by a super-resolution stage that is told the same prompts.

    All rows share the noise of the run's seed, so what source and targets have in common stays common. The stage's attention
    is left alone, as in the paper; edited: it is injected as the run's was. noise_level: timestep of the noise put on the small
    pictures, None for the model's own (250 of 1000 for IF). The settings are the run's, with those of this stage under "upscale".
    """
    model = find_model(model)
    if not isinstance(small, Result):
        raise UsageError(f"what is enlarged is a Result, as edit and generate give it, not {brief(small)}")
    pictures = torch.cat([from_pil(i) for i in small.images])
    noise_level = whole("noise_level", model.noise_level if noise_level is None else noise_level, 0, len(model.alphas_cumprod) - 1)
    seed = small.settings["seed"]
    common: dict[str, Any] = dict(steps=model.steps if steps is None else steps, guidance_scale=guidance_scale, eta=eta,
                                  low=Low(pictures, noise_level), progress=progress)
    if not flag("edited", edited):
        large = generate(model, small.prompts, seed=0 if seed is None else seed, **common)
    elif small.settings["command"] != "edit":
        raise UsageError("only an edit can be injected into the super-resolution stage")
    elif small.settings["editor"] is not None:
        raise UsageError("edited: the run was injected by another editor, which is made for its own model; leave it out")
    else:
        large = edit(model, small.prompts[0], small.edits,
                     seed=0 if seed is None else seed, **common)
    said = {k: large.settings[k] for k in ("model", "places", *model.identity(), "steps", "guidance_scale", "eta")}
    large.settings = small.settings | {"upscale": said | {"noise_level": noise_level, "edited": edited}}
    large.notes, large.rows = [*small.notes, *large.notes], small.rows + large.rows
    large.timings = {k: small.timings[k] + v for k, v in large.timings.items()}
    return large
