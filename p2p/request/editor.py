"""What another editor than Prompt-to-Prompt's is, and what it does not read."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from p2p.denoise import Batch
from p2p.errors import UsageError
from p2p.models.network import Network
from p2p.request.source import Inversion
from p2p.request.start import Sampling


@runtime_checkable
class Editor(Protocol):
    """Another way to inject than Prompt-to-Prompt's, see `p2p.editors`: a dataclass, whose fields are
    recorded."""

    guided_source: bool          # an inverted source has an unconditional row too
    source_prompt: str | None    # what the source is conditioned on; None: its own prompt

    def plan(self, unet: Network, batch: Batch, steps: int, device: torch.device) -> list[Any]:
        """For each step an edit by site, or one for all."""


@runtime_checkable
class Guiding(Editor, Protocol):
    """An editor that joins two predictions of a target's latents, under the source's prompt and its own, in
    place of guidance."""

    def guide(self, source: Tensor, target: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """Predictions (N, C, H, W) -> the one that is sampled by."""


def without_guidance(editor: Editor | None, inversion: Inversion | None, sampling: Sampling,
                     given: Mapping[str, Any]) -> Sampling:
    """The sampling of an edit, by an editor that may stand in the place of guidance. Raises UsageError for
    what that cannot edit, and for what it would ignore."""
    if not isinstance(editor, Guiding):
        return sampling
    name = type(editor).__name__
    if inversion is None:
        raise UsageError(f"editor {name} edits pictures: invert one first, by uni-inv or another method")
    if inversion.method == "null-text":
        raise UsageError(f"editor {name}: the source's prompt stands in the place of the empty one, which "
                         "null-text inversion optimises; invert by another method")
    if unread := [setting for setting in ("proximal", "negative_prompt") if given.get(setting) is not None]:
        raise UsageError(f"{', '.join(unread)}: of guidance, in whose place editor {name} stands; leave it "
                         "out")
    return replace(sampling, negative_prompt=None)
