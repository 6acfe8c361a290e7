"""Prompts in the syntax of other programs, which a text tower would read as text: refused, with
what to write instead.

Weights in brackets are read, see `emphasis`. What else can only be syntax is refused: schedules
"[dog:cat:0.4]", alternatives "[dog|cat]" and "{dog|cat}", other programs' weights "(dog)1.4", "(dog)++" and
"{{dog}}", add-ons "<lora:name:1>" and "embedding:name", and the words BREAK and AND in capitals among words
that are not (nothing is lost: CLIP reads small letters alone). What may also be meant as it stands, as in
"a cat:1.4" or "{a cat}", is text, and a note says so; "16:9" and "10:30" are ordinary text.
Syntax of AUTOMATIC1111's web UI, ComfyUI, NovelAI, Compel and Midjourney ("cat::2").
"""
from __future__ import annotations

import re

from p2p.errors import UsageError
from p2p.request.emphasis import read
from p2p.weights.untrusted import brief

_EMPHASIS = "write the words alone, and weigh them in an edit: --weight {0}=1.2 (equalizer={{\"{0}\": 1.2}})"
_WEIGHT = "write the words alone, and weigh them in an edit: --weight {0}={1} (equalizer={{\"{0}\": {1}}})"
_SCHEDULE = ("write one of the words, and the other in an edit of that prompt; --cross WORD=0.4 "
             "(cross_replace_steps) says from when on the new word acts")
_ADDED = ("add-ons are given with the model: a LoRA with --lora FILE:WEIGHT (lora), an embedding with "
          "--embedding FILE:WORD (embeddings), whose word is then written as it is")
LONGEST = 20_000   # characters of a prompt
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
# Each repetition excludes the mark that ends it, so that no prompt takes more than linear time.
_SYNTAX = tuple((re.compile(pattern), what, instead) for pattern, what, instead in (
    (rf"\(([^():\[\]]*[^\s():\[\]])\s*:\s*({_NUMBER})\s*$", "a weight that is not closed", _WEIGHT),
    (r"\b__[\w/-]*\w__\b", "a wildcard", "write one of the words that it stands for"),
    (rf"\(([^():\[\]]*[^\s():\[\]])\)({_NUMBER})(?![\w:/.])", "a weight", _WEIGHT),
    (r"\(([^()]+)\)(?:\+\+*|--*)(?!\w)", "a weight", _EMPHASIS),
    (rf"\[[^\[\]|:]*:(?:[^\[\]|:]*:)?\s*{_NUMBER}\s*\]", "a schedule", _SCHEDULE),
    (r"\[[^\[\]|]*\|[^\[\]]*\]|\{[^{}|]*\|[^{}]*\}", "a choice between words", _SCHEDULE),
    (r"\{\s*\{[^{}]+\}\s*\}", "emphasis", _EMPHASIS),
    (r"<\s*(?:lora|lyco|locon|loha|hypernet|ti|embedding)\s*:[^<>]*>|\bembedding:\S+", "an add-on", _ADDED),
    (r"\)\s*\.(?:and|blend|swap)\(|\b\w+\.swap\(", "a conjunction",
     "write one prompt, and the other as an edit of it"),
))
_BARE = re.compile(r"(?<![\w:.'-])([^\W\d][\w'-]*)(?::([-+]?\d*\.\d+)|\s*::\s*([-+]?\d+\.?\d*|\.\d+))"
                   r"(?!\.?\w|:)")
_EMPTY = re.compile(rf"(?<!\\)\([\s()]*(?::\s*{_NUMBER}\s*)?\)|(?<!\\)\[\s*\]")
_TEXT = re.compile(r"\b(\w+)(?:\+\++|--+)(?!\w)|\{([^{}]+)\}")


def check(prompt: object) -> list[str]:
    """Notes on how a prompt is written. Raises UsageError for what is not text, and for other programs'
    syntax."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt is text, not {brief(prompt)}")
    if len(prompt) > LONGEST:
        raise UsageError(f"a prompt of {len(prompt):,} characters, {brief(prompt)}: text towers read a few "
                         f"hundred; shorten it to {LONGEST:,}")
    if prompt.endswith(".safetensors"):
        raise UsageError(f"{brief(prompt)}: a path would be read as a prompt; give Path(...), or what "
                         "Inversion.load gives")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the prompt {brief(prompt)} is not valid text (UTF-8 is expected)") from None
    for pattern, what, instead in _SYNTAX:
        for found in pattern.finditer(prompt):
            groups = [g.strip() for g in found.groups() if g is not None] or ["WORD"]
            if len(groups) == 2 and groups[1].isdigit() and ":" in found.group():
                if re.search(r"(?:^|\D)\d+$", groups[0]):
                    continue   # a ratio, or a time of day
            raise UsageError(f'"{_short(prompt)}": {_short(found.group())} is {what} in the syntax of other '
                             f"programs, and would be read as text: {instead.format(*groups)}")
    words = prompt.split()
    for i, word in enumerate(words):
        beside = [w for w in words[max(0, i - 1):i] + words[i + 1:i + 2] if any(c.isalpha() for c in w)]
        if word in ("BREAK", "AND") and any(w != w.upper() for w in beside):
            raise UsageError(f'"{_short(prompt)}": {word} joins prompts in other programs, and would be read '
                             f'as the word: leave it out, or write "{word.lower()}" for the word')
    return _text_notes(prompt)


def _text_notes(prompt: str) -> list[str]:
    """Notes on what may be meant as syntax, and is read as text."""
    notes = []
    text = read(prompt).text
    if found := _EMPTY.search(prompt):
        notes.append(f'"{_short(prompt)}": {_short(found.group())} holds no word, and weighs nothing; a '
                     'weight is written "(word:1.3)"')
    if colons := [part for part, weight in read(prompt).parts if weight != 1 and ":" in part]:
        notes.append(f'"{_short(prompt)}": {_short(colons[0])} is weighted by its brackets alone, and its '
                     'colon is text; a weight is written "(word:1.3)"')
    if found := _BARE.search(text):
        word, weight = filter(None, found.groups())
        weight = f"{float(weight):g}"
        notes.append(f'"{_short(prompt)}": {_short(found.group())} is read as text; if a weight is meant, '
                     f"write the word alone, and weigh it in an edit: --weight {word}={weight} "
                     f'(equalizer={{"{word}": {weight}}})')
    if found := _TEXT.search(text):
        notes.append(f'"{_short(prompt)}": {_short(found.group())} is read as text, not as emphasis; weigh a '
                     "word with --weight WORD=1.2 (equalizer)")
    return notes


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
