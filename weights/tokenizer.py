"""Checks the folder of CLIP's tokenizer. Our own tokenizer is used: it must give the same tokens."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from p2p.models.text import END, START, TextConfig, tokenizer
from p2p.weights import fields
from p2p.weights.errors import CheckpointError
from p2p.weights.sizes import read_json
from p2p.weights.untrusted import kind_of, parse_json, read_text

PADS = {"<|endoftext|>": END, "!": 0}   # what CLIP's tokenizers pad with
# the second one takes precedence, as in transformers
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json")
_CLIPS: set[tuple[str, bytes]] = set()   # files that were found to hold CLIP's words: their names and digests


def read_tokenizer(folder: Path, config: TextConfig) -> tuple[int, list[Path]]:
    """The token that it pads with, and the files that were read. Raises CheckpointError."""
    settings: dict[str, Any] = {}
    configs = [p for p in (folder / name for name in CONFIGS) if p.exists()]
    for path in configs:
        c = {name: _content(value) for name, value in read_json(path).items()}
        fields.check(path, c, fields.TOKENIZER, strangers=True)
        added = _field(path, c, "added_tokens_decoder", dict)
        _check_added(path, [(_content(token), i) for i, token in added.items()])
        settings |= {k: c[k] for k in ("pad_token", "model_max_length") if c.get(k) is not None}
    length, longest = settings.get("model_max_length", config.context_length), config.context_length
    unlimited = isinstance(length, (int, float)) and length > 10**9   # as transformers writes it
    if length != longest and not unlimited:
        raise CheckpointError(f"{configs[0]}: model_max_length {fields.short(length)}, but the text tower "
                              f"reads {longest} tokens.")
    pad = settings.get("pad_token")
    if pad not in (None, *PADS):
        raise CheckpointError(f"{configs[0]}: pads with {fields.short(pad)}; supported: {', '.join(PADS)}.")
    vocabularies = [p for p in (folder / name for name in VOCABULARIES) if p.exists()]
    for path in vocabularies:
        _check_vocabulary(path)
    return PADS.get(pad, config.pad_id), [*configs, *vocabularies]


def _check_vocabulary(path: Path) -> None:
    """Raises CheckpointError unless its words and merges are CLIP's."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None
    known = path.name, sha256(text.encode()).digest()
    if known in _CLIPS:   # both towers of SDXL have the same files
        return
    if path.name == "merges.txt":   # after the version; transformers ignores what follows
        _same(path, text.replace("\r\n", "\n").rstrip("\n").split("\n")[1:len(merges()) + 1], merges())
    else:
        _check_words(path, text)
    _CLIPS.add(known)


def _check_words(path: Path, text: str) -> None:
    try:
        contents = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: holds {kind_of(contents)}, not an object.")
    if path.name == "added_tokens.json":
        _check_added(path, contents.items())
    elif path.name == "vocab.json":
        _same(path, contents, vocabulary())
    else:
        model, added = _field(path, contents, "model", dict), _field(path, contents, "added_tokens", list)
        _same(path, model.get("vocab"), vocabulary())
        pieces = model.get("merges")
        if isinstance(pieces, list):   # a pair, or one string, depending on the version
            pieces = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in pieces]
        _same(path, pieces, merges())
        _check_added(path, [(_content(token), token.get("id")) for token in added if isinstance(token, dict)])


@cache
def vocabulary() -> dict[str, int]:
    """CLIP's words, as transformers writes them."""
    ends = {START: "<|startoftext|>", END: "<|endoftext|>"}
    return {ends.get(i, word): i for word, i in tokenizer().encoder.items()}


@cache
def merges() -> list[str]:
    """The pairs of pieces that are merged, in order of rank."""
    ranks = tokenizer().bpe_ranks
    return [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]


def _same(path: Path, words: Any, known: Any) -> None:
    if words != known:
        raise CheckpointError(f"{path}: another vocabulary than CLIP's; its tokens are not known here.")


def _check_added(path: Path, tokens: Collection[tuple[Any, Any]]) -> None:
    """Raises CheckpointError for tokens (a word and its number, maybe as text) that are not CLIP's."""
    known = vocabulary()
    if odd := [word for word, i in tokens
               if not isinstance(word, str) or word not in known or str(known[word]) != str(i)]:
        raise CheckpointError(f"{path}: adds the token {fields.short(odd[0])}, which is not one of CLIP's.")


def _field(path: Path, c: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that is an object or a list; an absent one is empty. Raises CheckpointError."""
    value = c.get(name) or kind()
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise CheckpointError(f"{path}: {name} = {fields.short(value)}; expected {expected}.")
    return value


def _content(token: Any) -> Any:
    """The text of a token, which may be an object that holds it."""
    return token["content"] if isinstance(token, dict) and isinstance(token.get("content"), str) else token
