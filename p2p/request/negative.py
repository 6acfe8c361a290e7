"""Negative prompts: one for all rows, or one a row."""
from __future__ import annotations

from collections.abc import Sequence

from p2p.denoise import Batch
from p2p.errors import UsageError
from p2p.model import Model
from p2p.request.prompts import check as check_prompt
from p2p.request.source import REPLACE_EMPTY, Inversion
from p2p.weights.untrusted import brief


def negatives(negative_prompt: str | Sequence[str] | None, rows: int) -> list[str]:
    """One negative prompt a row; as many as are given where these are not one for all."""
    if isinstance(negative_prompt, (list, tuple)):
        return list(negative_prompt)
    return [negative_prompt or ""] * rows


def check_negative(model: Model, negative_prompt: str | Sequence[str] | None, guidance_scale: float,
                   rows: int, inversion: Inversion | None = None) -> None:
    """Raises UsageError for a negative prompt that the run would not read."""
    if negative_prompt is None:
        return
    if not isinstance(negative_prompt, (str, list, tuple)):
        raise UsageError(f"negative_prompt: a text, or a list of one for each row, is needed, not "
                         f"{brief(negative_prompt)}")
    each = negatives(negative_prompt, rows)
    if len(each) != rows:
        raise UsageError(f"negative_prompt: {len(each)} given for {rows} rows; give one for all, or one for "
                         "each, the source's first")
    for prompt in each:
        check_prompt(prompt)
    if inversion is not None and set(each) == {inversion.negative_prompt}:
        return   # it was made under it
    if not model.guided(guidance_scale):
        why = "this model reads no text; leave it out"
        if model.text_encoders:
            why = "this model was distilled with its guidance; leave it out" if guidance_scale != 1 else \
                "give a guidance_scale other than 1, or leave it out"
        raise UsageError(f"negative_prompt: nothing leads away from it without guidance; {why}")
    if inversion is not None:
        refuse_replaced(inversion.method)


def refuse_replaced(method: str) -> None:
    """Raises UsageError for a negative prompt beside an inversion that has its own in its place."""
    if method in REPLACE_EMPTY:
        raise UsageError(f"negative_prompt: an inversion by {method} has its own in its place; leave it out, "
                         "or invert by direct")


def check_sources(each: str | Sequence[str] | None, batch: Batch, inversion: Inversion | None) -> None:
    """Raises UsageError for a negative prompt of a source that is not guided, nor was inverted under it."""
    followed = batch.absent or batch.unconditional < batch.conditional   # and not guided
    if inversion is not None and isinstance(each, (list, tuple)) and each[0] == inversion.negative_prompt:
        return
    if isinstance(each, (list, tuple)) and each[0] and batch.guided and followed:
        raise UsageError(f"negative_prompt: {brief(each[0])} is given for the source, whose stored latents "
                         'are followed without guidance here; give "" for it')
