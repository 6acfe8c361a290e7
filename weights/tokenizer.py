"""Checks the folder of CLIP's tokenizer. Our own tokenizer is used: it must give the same tokens."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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
        with _refused(path):
            added = _field(c, "added_tokens_decoder", dict)
            _check_added([(_content(token), i) for i, token in added.items()])
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
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None
        known = path.name, sha256(text.encode()).digest()
        if known not in _CLIPS:   # both towers of SDXL have the same files
            with _refused(path):
                _check_vocabulary(path.name, text)
            _CLIPS.add(known)
    return PADS.get(pad, config.pad_id), [*configs, *vocabularies]


class _Foreign(Exception):
    """What is not CLIP's."""


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Makes CheckpointErrors that name the file."""
    try:
        yield
    except _Foreign as error:
        raise CheckpointError(f"{path}: {error}.") from None


def _check_vocabulary(name: str, text: str) -> None:
    """Raises _Foreign unless the words and merges in a file of that name are CLIP's."""
    if name == "merges.txt":   # after the version; transformers ignores what follows
        _same(text.replace("\r\n", "\n").rstrip("\n").split("\n")[1:len(merges()) + 1], merges())
        return
    try:
        contents = parse_json(text)
    except ValueError as error:
        raise _Foreign(f"not readable as JSON ({error})") from None
    if not isinstance(contents, dict):
        raise _Foreign(f"holds {kind_of(contents)}, not an object")
    if name == "added_tokens.json":
        _check_added(contents.items())
    elif name == "vocab.json":
        _same(contents, vocabulary())
    else:
        model, added = _field(contents, "model", dict), _field(contents, "added_tokens", list)
        _same(model.get("vocab"), vocabulary())
        pieces = model.get("merges")
        if isinstance(pieces, list):   # a pair, or one string, depending on the version
            pieces = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in pieces]
        _same(pieces, merges())
        _check_added([(_content(token), token.get("id")) for token in added if isinstance(token, dict)])


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


def _same(words: Any, known: Any) -> None:
    if words != known:
        raise _Foreign("another vocabulary than CLIP's; its tokens are not known here")


def _check_added(tokens: Collection[tuple[Any, Any]]) -> None:
    """Raises _Foreign for tokens (a word and its number, maybe as text) that are not CLIP's."""
    known = vocabulary()
    if odd := [word for word, i in tokens
               if not isinstance(word, str) or word not in known or str(known[word]) != str(i)]:
        raise _Foreign(f"adds the token {fields.short(odd[0])}, which is not one of CLIP's")


def _field(c: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that is an object or a list; an absent one is empty. Raises _Foreign."""
    value = c.get(name) or kind()
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise _Foreign(f"{name} = {fields.short(value)}; expected {expected}")
    return value


def _content(token: Any) -> Any:
    """The text of a token, which may be an object that holds it."""
    return token["content"] if isinstance(token, dict) and isinstance(token.get("content"), str) else token
