"""Weights in the prompt, as AUTOMATIC1111's web UI reads them: (word), [word], (word:1.3), nested, and
escaped as \\( \\) \\[ \\].

In a target a weight is the paper's fader, on attention (`Edit.equalizer`); elsewhere, and where an edit asks
for it, it is on the text's embedding, by that program's rule.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from p2p import align
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.conditioning import Conditioning
from p2p.models.text import END, START, TextEncoder, Tokens
from p2p.weights.untrusted import brief

ROUND, SQUARE = 1.1, 1 / 1.1
BRACKETS = 200   # text towers read 77 tokens
PART = ("a weight is on a part of a word; put whole words into the brackets, with spaces around these, or "
        r"write \( and \) for brackets that are text")
_WEIGHT = r"(?:(?<!\d):\s*([-+]?\d+)|:\s*([-+]?(?:\d+\.\d*|\.\d+)))\s*\)"   # "(at 10:30)" is a time of day
_MARK = re.compile(rf"\\[()\[\]\\]|[(\[]|{_WEIGHT}|[)\]]|[^\\()\[\]:]+|.", re.S)


class Weighted(NamedTuple):
    """A prompt without its marks, in parts that have a weight each."""

    parts: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def plain(self) -> bool:
        return all(weight == 1 for _, weight in self.parts)


@lru_cache(1024)
def read(prompt: str) -> Weighted:
    """(x) weighs 1.1, [x] 1 / 1.1, (x:w) w; what is nested is multiplied; a bracket that is not closed holds
    to the end, and one that was not opened is text. Raises UsageError for too many."""
    if prompt.count("(") + prompt.count("[") > BRACKETS:
        raise UsageError(f"{brief(prompt)}: more than {BRACKETS} brackets; weight fewer words")
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}   # the parts from which open brackets hold

    def scale(first: int, weight: float) -> None:
        parts[first:] = [(text, w * weight) for text, w in parts[first:]]

    for found in _MARK.finditer(prompt):
        mark, weight = found.group(), found[1] or found[2]
        if mark in opened:
            opened[mark].append(len(parts))
        elif mark[-1] == ")" and mark[0] != "\\" and opened["("]:
            scale(opened["("].pop(), ROUND if weight is None else float(weight))
        elif mark == "]" and opened["["]:
            scale(opened["["].pop(), SQUARE)
        else:
            parts.append((mark[1:] if mark[0] == "\\" and len(mark) == 2 else mark, 1.0))
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):
        for first in opened[bracket]:
            scale(first, weight)
    if not all(math.isfinite(weight) for _, weight in parts):
        raise UsageError(f"{brief(prompt)}: a weight is not finite")
    joined = [("".join(text for text, _ in same), w) for w, same in groupby(parts, lambda part: part[1])]
    return Weighted(tuple(joined))


def escaped(text: str) -> str:
    """A prompt in which brackets are text."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def token_weights(prompt: Weighted, tokens: Callable[[str], Tokens]) -> list[float]:
    """Of every token, the ends included. Raises UsageError where a part of a word is weighed."""
    ids, weights = [START], [1.0]
    for text, weight in prompt.parts:
        found = tokens(text).ids[1:-1]
        ids, weights = ids + found, weights + [weight] * len(found)
    if [*ids, END] != tokens(prompt.text).ids:
        raise UsageError(f"{brief(prompt.text)}: {PART}")
    return [*weights, 1.0]


def equalizer(prompt: Weighted, tokens: Callable[[str], Tokens]) -> dict[str, float]:
    """{word: weight} of the words that are weighed, as `Edit` names them: "cat#2" is the second one."""
    whole, weights, out = tokens(prompt.text), token_weights(prompt, tokens), {}
    known: dict[tuple[int, str], list[list[int]]] = {}
    for word, columns in align.words(whole):
        for weight, run in groupby(columns, lambda i: weights[i]):  # its punctuation may weigh something else
            if weight != 1:
                name = align.name_of(whole, list(run), known)
                if name is None:
                    raise UsageError(f'{brief(prompt.text)}, "{word}": {PART}')
                out[name] = weight
    return out


def weigh(context: Tensor, weights: Sequence[float], widths: Sequence[int]) -> Tensor:
    """The rule of that program ("original") for a context (L, C): every token times its weight, then all
    times the mean before over the mean after, for each text tower's `widths` alone. Padding weighs 1, and
    so does what fills a context that is wider than its towers."""
    row = torch.ones(len(context), 1, dtype=context.dtype, device=context.device)
    read = [*weights[:len(row) - 1], 1.0] if len(weights) > len(row) else weights   # the end's weighs 1
    row[:len(read), 0] = torch.tensor(read, dtype=context.dtype)
    *towers, filling = context.split([*widths, context.shape[-1] - sum(widths)], dim=-1)
    weighed = [part * row * (part.mean() / (part * row).mean()) for part in towers]
    return torch.cat([*weighed, filling], dim=-1)


# ----------------------------------------------------------------------------- prompts, as a model reads them

def parsed(model: Model, prompt: str) -> Weighted:
    """Of models that read their text by CLIP, alone or beside T5; to others, brackets are text."""
    clip = model.text_encoders and isinstance(model.text_groups[0][0], TextEncoder)
    return read(prompt) if clip else Weighted(((prompt, 1.0),))


def as_text(model: Model, prompt: str) -> str:
    """A prompt whose brackets are text, as this model is to be given it."""
    return prompt if parsed(model, prompt).text == prompt else escaped(prompt)


def first_tokens(model: Model) -> Callable[[str], Tokens]:
    """The tokenizer by whose words weights are named: CLIP's."""
    return model.text_groups[0][0].tokens


def prompt_tokens(model: Model, prompt: str) -> Tokens:
    return model.tokens(parsed(model, prompt).text)


def condition(model: Model, prompts: Sequence[str], height: int, width: int) -> Conditioning:
    """`Model.condition` of prompts with weights, which act on the embeddings. Raises UsageError."""
    found = [parsed(model, prompt) for prompt in prompts]
    made = model.condition([each.text for each in found], height, width)
    if all(each.plain for each in found):
        return made
    rows = [row if each.plain else _weighed(model, row, each) for row, each in zip(made.context, found)]
    return made._replace(context=torch.stack(rows))


def _weighed(model: Model, row: Tensor, prompt: Weighted) -> Tensor:
    """`weigh` of each tokenizer's columns; CLIP's come first, and name the words for the others."""
    whole, out = model.tokens(prompt.text), []
    firsts = [model.text_encoders.index(tower) for tower, _ in model.text_groups]
    for part, i, j in zip(align.parts(whole, model.length), firsts, [*firsts[1:], None]):
        weights = token_weights(prompt, first_tokens(model))
        if part.first:
            weights = [1.0] * part.length
            for word, weight in equalizer(prompt, first_tokens(model)).items():
                for column in part.own(align.word_tokens(whole, word, model.length)):
                    weights[column - part.first] = weight
        widths = [tower.config.width for tower in model.text_encoders[i:j]]
        out.append(weigh(row[part.first:part.first + part.length], weights, widths))
    return torch.cat([*out, row[part.first + part.length:]])


def weights_as_equalizer(model: Model, edit: Edit) -> Edit:
    """The weights of a target's prompt as its equalizer, where they are on attention. Raises UsageError."""
    prompt = parsed(model, edit.prompt)
    if edit.emphasis == "embedding" or (prompt.plain and prompt.text == edit.prompt):
        return edit
    weights = equalizer(prompt, first_tokens(model))
    if both := sorted(weights.keys() & (edit.equalizer or {}).keys()):
        raise UsageError(f'"{edit.prompt}" and its equalizer both weight {", ".join(both)}: weigh each word '
                         "once")
    merged = {**weights, **(edit.equalizer or {})}
    return replace(edit, prompt=escaped(prompt.text), equalizer=merged or None)


def below_zero(prompt: str, weights: Mapping[str, float]) -> list[str]:
    """A note on weights that often break a picture."""
    words = ", ".join(f"{word} x {weight:.4g}" for word, weight in weights.items() if weight < 0)
    return [f'"{prompt}": weights below 0 ({words}) are in the paper, but often break pictures: if this one '
            "does, give a weight nearer to 0, or 0, or shorter windows"] if words else []


def notes(model: Model, prompt: str) -> list[str]:
    """What the weights of a prompt whose embedding they act on are. Raises UsageError."""
    found = parsed(model, prompt)
    if found.plain:
        return [] if read(prompt).plain else [f'"{prompt}": brackets are text to {model.name}, and weigh '
                                              "nothing"]
    weights = equalizer(found, first_tokens(model))
    words = ", ".join(f"{word} x {weight:.4g}" for word, weight in weights.items())
    return [f'"{prompt}": weights on the embedding: {words}', *below_zero(prompt, weights)]
