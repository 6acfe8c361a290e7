"""What an inversion is given, and how it asks the network."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from p2p.model import Model
from p2p.models.conditioning import Conditioning
from p2p.request.inverting import guided
from p2p.request.schedules import Level, Schedule
from p2p.sampler import ddim_step, guide, x0_and_eps


class Run(NamedTuple):
    """What all methods are given. The schedule runs from noise to picture."""

    model: Model
    x_0: Tensor              # (1, C, H, W)
    null: Conditioning       # one row
    empty: Conditioning      # the same, read once for all steps, as are
    conditioning: Conditioning   # ... the prompt
    both: Conditioning       # ... the empty prompt and the prompt, for guidance
    schedule: Schedule
    progress: bool

    def lifted(self, x: Tensor, out: Tensor, after: Level, before: Level, guess: Tensor) -> Tensor:
        """x, at the level before, taken to the level after by what the network said of a guess of x there.

        A velocity leads along itself; what else is predicted says the noise of the guess, of which x is made.
        """
        if self.model.prediction == "flow":
            x_0, eps = x0_and_eps(x, out, before, "flow", self.model.clip)
        else:
            _, eps = x0_and_eps(guess, out, after, self.model.prediction, self.model.clip)
            x_0 = (x - before.sigma * eps) / before.alpha
        return ddim_step(x_0, eps, before, after)

    def guided(self, guidance_scale: float) -> bool:
        """Whether the network runs two rows."""
        return guided(self.model, guidance_scale)

    def predict(self, x: Tensor, t: int | float, guidance_scale: float = 1.0) -> Tensor:
        """The network's output for one picture: one row, or two with guidance that is neither 0 nor 1 and no
        input of the network."""
        if isinstance(t, float):   # between two timesteps
            t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        conditioning = self.conditioning if guidance_scale else self.empty
        conditioning = self.model.unet.with_guidance(conditioning, guidance_scale)
        if not self.guided(guidance_scale):
            return self.model.predict(x, t, conditioning)[0]
        return guide(*self.model.predict(x.expand(2, -1, -1, -1), t, self.both)[0].chunk(2), guidance_scale)

    def upwards(self) -> Iterable[tuple[int | float, Level, Level]]:
        """(t, level after the step, level before it), from the picture to the noise."""
        return self.with_bar(list(self.schedule)[::-1])

    def with_bar(self, steps: Iterable[Any]) -> Iterable[Any]:
        """These steps, with a bar where there is progress to be shown."""
        return tqdm(steps, disable=not self.progress, leave=False, unit="step")
