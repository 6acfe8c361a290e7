"""Textual inversion (Gal et al. 2022): words of a user's own, each of one or more vectors that the text
towers read as tokens.

    of A1111        {"string_to_param": {"*": (n, C)}, ...}, pickled: the word is the file's name
    ... converted   {"emb_params": (n, C)}: likewise
    of diffusers    {"<word>": (C,) or (n, C), ...}
    of SDXL         {"clip_l": (n, C), "clip_g": (n, C')}: one for each tower; the word is the file's name

A tensor belongs to the tower of its width; a word must have the same number of vectors in every tower of
the model.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from p2p.models.text import TextEncoder, tokenizer, tokens
from p2p.weights import refuse
from p2p.weights.detect import Added, Package
from p2p.weights.errors import CheckpointError
from p2p.weights.files import TensorFile, open_file
from p2p.weights.lora import check_numbers, holds_changes
from p2p.weights.refuse import WIDTHS
from p2p.weights.untrusted import brief

IN_FOLDERS = ("learned_embeds.safetensors", "learned_embeds.bin")
A1111 = "string_to_param"
NAMELESS = ("emb_params", "emp_params", "clip_l", "clip_g")   # the second is OneTrainer's
AFTER = ("emp_params_out", "clip_l_out", "clip_g_out")   # ... of vectors that come out of the text tower
MOST = 75      # vectors of a word: what stands between the ends of a text
SYNTAX = "()[]{}:|,\\"   # of prompts


@dataclass(frozen=True)
class Vectors:
    """A tensor (n, C) or (C,) in a file."""

    file: TensorFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, C)"""
        shape = self.file.shapes[self.key]
        return (1, *shape) if len(shape) == 1 else shape

    def read(self) -> Tensor:
        """(n, C). Raises CheckpointError."""
        tensor = self.file[self.key]
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.file.path}: {self.key} holds values that are not finite. It is "
                                  "damaged.")
        return tensor.reshape(self.shape)


# ----------------------------------------------------------------------------------------------------- a file

def holds_words(file: TensorFile) -> bool:
    """Whether a file has one of the layouts above."""
    plain = not any(name.endswith((".weight", ".bias")) for name in file.shapes)
    flat = all(len(shape) in (1, 2) for shape in file.shapes.values())
    return bool(file.shapes) and plain and flat and not holds_changes(file.shapes)


def recognised(file: TensorFile) -> bool:
    """Whether an unknown file is an embedding: by its names, or by the widths of CLIP's words."""
    named = any(key in NAMELESS or key.startswith(f"{A1111}.") for key in file.shapes)
    return holds_words(file) and (named or all(shape[-1] in WIDTHS for shape in file.shapes.values()))


def open_words(path: Path) -> tuple[TensorFile, dict[str, list[Vectors]]]:
    """A file, or that in the folder in which diffusers saved one, and its words with their tensors.

    Raises CheckpointError.
    """
    where = next((path / name for name in IN_FOLDERS if (path / name).exists()), path)
    if where.is_dir():
        raise CheckpointError(f"{path}: a folder without {' or '.join(IN_FOLDERS)}; give the file of the "
                              "embedding itself.")
    file = open_file(where, inside=A1111)
    if not holds_words(file):
        if holds_changes(file.shapes):
            raise CheckpointError(f"{where}: a LoRA or the like, not an embedding; give it with lora "
                                  "(--lora).")
        refuse.by_name(where, file.shapes, file.is_fp8())
        sample = ", ".join(list(file.shapes)[:3]) or "nothing"
        raise CheckpointError(f"{where}: no embedding: it holds {len(file.shapes)} tensors ({sample} ...).")
    if after := [key for key in AFTER if key in file.shapes]:
        raise CheckpointError(f"{where}: {', '.join(after)}: vectors that replace the text tower's output, "
                              "which is not supported; train the embedding without output embeddings.")
    check_numbers(file, file.shapes)
    found: dict[str, list[Vectors]] = {}
    for key in file.shapes:
        vectors = Vectors(file, key)
        if not 0 < vectors.shape[0] <= MOST:
            raise CheckpointError(f"{where}: {key} has {vectors.shape[0]} vectors; a text holds 1 to {MOST}.")
        nameless = key in NAMELESS or key.startswith(f"{A1111}.")
        found.setdefault(path.stem if nameless else key, []).append(vectors)
    return file, found


def describe(path: Path) -> list[str]:
    """A readable description. Raises CheckpointError."""
    lines = [f"{path}", "add-on      textual inversion"]
    for word, each in open_words(path)[1].items():
        sizes = [f"{n} of width {width} ({WIDTHS.get(width, 'of no family known here')})"
                 for n, width in (vectors.shape for vectors in each)]
        lines.append(f"word        {word}: {', '.join(sizes)}")
    return [*lines, f"note        give it beside a model: --embedding {path}"]


# ----------------------------------------------------------------------------------------------- into a model

def attach_words(package: Package, given: Sequence[tuple[Path, str | None]]) -> None:
    """Adds the words of files to a package; a word that is given replaces the file's own. Raises
    CheckpointError."""
    if given and not package.text:
        raise CheckpointError(f"{given[0][0]}: an embedding, but {package.where}, of the family "
                              f"{package.family}, has no CLIP text tower that could read it.")
    towers: dict[str, dict[int, Vectors]] = {}
    for path, asked in given:
        file, found = open_words(path)
        if asked is not None and len(found) > 1:
            raise CheckpointError(f"{path}: holds the words {', '.join(list(found)[:5])}; leave out "
                                  f"{brief(asked)}.")
        words = [_word(path, own if asked is None else asked) for own in found]
        for word, each in zip(words, found.values()):
            for vectors in each:
                tower = _tower(vectors, package)
                if tower in towers.setdefault(word, {}):
                    raise CheckpointError(f"{path}: the word {word} is there already; give it another: "
                                          'FILE:WORD (embeddings={"WORD": FILE}).')
                towers[word][tower] = vectors
        package.embeddings.append(Added(path, {file.path.name: file.path}, tuple(words)))
    for word, by_tower in towers.items():
        package.words[word] = _complete(word, by_tower, package)
        n = by_tower[0].shape[0]
        package.notes.append(f"{word}: {n} vector{'s' if n > 1 else ''} of {by_tower[0].file.path.name}")


def _word(path: Path, name: str) -> str:
    """The word as prompts are cleaned. Raises CheckpointError for what is no word, or one of CLIP's."""
    word = tokenizer().clean_fn(name)
    instead = f"give it another, such as <{path.stem[:20]}>: FILE:WORD (embeddings={{\"WORD\": FILE}})"
    if not word or len(word) > 200 or any(c.isspace() or c in SYNTAX for c in word):
        raise CheckpointError(f"{path}: its word would be {brief(name)}, which is no single word in a prompt "
                              f"(no spaces, none of {' '.join(SYNTAX)}); {instead}.")
    if len(tokens(word).ids) == 3:   # between the ends
        raise CheckpointError(f"{path}: its word would be {brief(name)}, which CLIP knows already; "
                              f"{instead}.")
    return word


def _tower(vectors: Vectors, package: Package) -> int:
    """The number of the text tower that reads vectors of their width. Raises CheckpointError."""
    widths, width = [part.config.width for part in package.text], vectors.shape[1]
    if width not in widths:
        ours, theirs = " and ".join(map(str, widths)), WIDTHS.get(width, "another model")
        raise CheckpointError(f"{vectors.file.path}: {vectors.key} has vectors of width {width}, as for "
                              f"{theirs}; {package.where} is of the family {package.family}, whose words "
                              f"have width {ours}.")
    return widths.index(width)


def _complete(word: str, by_tower: Mapping[int, Vectors], package: Package) -> list[Vectors]:
    """Raises CheckpointError where a tower has no vectors of a word, or another number of them."""
    files = " and ".join(dict.fromkeys(str(vectors.file.path) for vectors in by_tower.values()))
    where = f"{files}: the word {word}, for {package.where}, of the family {package.family}"
    if missing := [part.config.width for i, part in enumerate(package.text) if i not in by_tower]:
        raise CheckpointError(f"{where}, has no vectors of width {missing[0]}, which one of its text towers "
                              "reads: give the file for that one too, with the same word.")
    each = [by_tower[i] for i in range(len(package.text))]
    if len({vectors.shape[0] for vectors in each}) > 1:
        numbers = " and ".join(str(vectors.shape[0]) for vectors in each)
        raise CheckpointError(f"{where}, has {numbers} vectors in its text towers; each needs the "
                              "same number.")
    return each


def add_words(words: Mapping[str, Sequence[Vectors]], text: Sequence[nn.Module]) -> None:
    """Adds words to the text towers. Raises CheckpointError."""
    for i, tower in enumerate(text if words else ()):
        if isinstance(tower, TextEncoder):
            tower.add_words({word: each[i].read() for word, each in words.items()})
