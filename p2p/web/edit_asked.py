"""From the page's controls to an `Edit`."""
from __future__ import annotations

from typing import Any

from p2p.align import word_tokens
from p2p.blend import SOFT, LocalBlend
from p2p.edits import Edit
from p2p.errors import UsageError
from p2p.model import Model
from p2p.models.text import Tokens
from p2p.request.emphasis import prompt_tokens
from p2p.request.emphasis import read as weighed
from p2p.request.prompts import check as check_prompt
from p2p.request.words import read_words
from p2p.web.asked import Asked, layer_choices, mask_picture
from p2p.weights.untrusted import brief


def tokens_of(model: Model, asked: Asked) -> tuple[Tokens, Tokens]:
    """Of the source's prompt and of the edited one. Raises UsageError."""
    for prompt in (asked.source, asked.target):
        check_prompt(prompt)
    source = prompt_tokens(model, asked.source)
    return source, prompt_tokens(model, asked.target) if asked.target else source


def dropped_words(model: Model, asked: Asked) -> list[str]:
    """Words of faders that the edited prompt has no more."""
    names = read_words(tokens_of(model, asked)[1], model.length)
    return [word for word, _ in asked.weights if word not in names]


def edit_of(model: Model, asked: Asked) -> Edit:
    """Raises UsageError."""
    settings: dict[str, Any] = {}
    if not asked.usual:
        settings |= dict(cross_replace_steps=asked.cross, self_replace_steps=asked.self_)
    choices, prompt = layer_choices(model.unet), asked.target or asked.source
    if not weighed(prompt).plain:   # as the source's: on attention there are the faders
        settings["emphasis"] = "embedding"
    return Edit(prompt, equalizer=dict(asked.weights) or None,
                local_blend=_blend(model, asked), layers=[choices[name] for name in asked.layers] or None,
                **settings)


def _blend(model: Model, asked: Asked) -> LocalBlend | None:
    """Words separated by commas, each in the prompts that have it, or old:new. Raises UsageError."""
    tokens, sides = tokens_of(model, asked), ([], [])
    for item in filter(None, (part.strip() for part in asked.blend.split(","))):
        if ":" in item:
            named = [word.strip() for word in item.split(":", 1)]
            if not any(named):
                raise UsageError(f'blend words: "{brief(item)}" names none')
            for side, word in zip(sides, named):
                side += [word] if word else []
            continue
        found = [side for side, prompt in zip(sides, tokens) if _has(prompt, item, model.length)]
        if not found:
            word_tokens(tokens[1], item, model.length)   # raises, with the words that there are
        for side in found:
            side.append(item)
    mask = mask_picture(asked.mask)
    if not any(sides) and mask is None:
        return None
    words = (tuple(sides[0]), tuple(sides[1])) if any(sides) else None
    return LocalBlend(words=words, mask=mask, feather=SOFT if words else 0.0)


def _has(prompt: Tokens, word: str, length: int) -> bool:
    try:
        return bool(word_tokens(prompt, word, length))
    except UsageError:
        return False
