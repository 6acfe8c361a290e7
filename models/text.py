"""CLIP's text towers, with explicit padding, and open_clip's tokenizer."""
from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

START, END = 49406, 49407   # <start_of_text>, <end_of_text>


def _define_torchvision_operators() -> None:
    """Defines two operators of torchvision, so that open_clip, timm and transformers can be imported.

    With a CPU build of torch, a torchvision that was built for CUDA (the registry's) lacks its compiled
    operators, and its import fails. Nothing here calls them.
    """
    spec = find_spec("torchvision")
    if torch.version.cuda is not None or spec is None or spec.origin is None:
        return
    version = Path(spec.origin).with_name("version.py")
    for_cuda = version.is_file() and "+cu" in version.read_text(encoding="utf-8")
    if for_cuda and not hasattr(torch.ops.torchvision, "nms"):
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}",
                                 "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_define_torchvision_operators()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """open_clip's byte-pair encoder (lower case, ftfy, html unescaped).

    Its file is executed without its package, which imports torchvision, timm and transformers and takes
    seconds.
    """
    package = find_spec("open_clip")
    if package is not None and package.origin is not None:
        module = ModuleType("open_clip_tokenizer")
        module.__file__ = str(Path(package.origin).with_name("tokenizer.py"))
        try:
            SourceFileLoader(module.__name__, module.__file__).exec_module(module)
            return getattr(module, "_tokenizer", None) or module.SimpleTokenizer()
        except (AttributeError, ImportError, OSError):
            pass   # a release of open_clip in which that file does not stand alone
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def lowered(text: str) -> str:
    """In small letters, but for those whose small form is of another length: positions stay."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


class Tokens(NamedTuple):
    """A prompt as the tower reads it. `text` is cleaned (lower case, single spaces); the
    ends count as tokens."""

    text: str
    ids: list[int]                      # START, ..., END; not padded, not cut
    spans: list[tuple[int, int]]   # the characters of `text` that each token belongs to; (0, 0) for the ends
    # of several tokenizers, whose ids follow one another; each part has spans of its own, in its own text
    parts: tuple[Part, ...] = ()


class Part(NamedTuple):
    """What one of several tokenizers makes of a prompt, and the columns of the context that hold it."""

    tokens: Tokens
    first: int
    length: int   # number of columns

    def own(self, columns: Iterable[int]) -> list[int]:
        """Those of some columns that are this part's."""
        return [i for i in columns if 0 <= i - self.first < self.length]


def joined_tokens(split: Sequence[tuple[Tokens, int]]) -> Tokens:
    """A prompt as one or several tokenizers split it, each with its number of columns, in the context's
    order. One that is not there finds no text in it, and has no part."""
    if len(split) == 1:
        return split[0][0]
    firsts = accumulate((n for _, n in split), initial=0)
    parts = tuple(Part(tokens, first, n) for (tokens, n), first in zip(split, firsts)
                  if tokens.text or not any(other.text for other, _ in split))
    return Tokens(parts[0].tokens.text, [i for part in parts for i in part.tokens.ids], [], parts)


def tokens(prompt: str, added: Mapping[str, Sequence[int]] | None = None) -> Tokens:
    """Splits a prompt as `tokenizer().encode` does, keeping where each token came from. added: words beside
    CLIP's, with their ids."""
    text, added = tokenizer().clean_fn(prompt), added or {}
    found: list[tuple[int, tuple[int, int]]] = []   # ids and spans
    end = 0
    for word in _occurrences(text, added):
        found += _pieces(text, end, word.start())
        found += [(i, word.span()) for i in added[word.group()]]
        end = word.end()
    found += _pieces(text, end, len(text))
    return Tokens(text, [START, *(i for i, _ in found), END], [(0, 0), *(span for _, span in found), (0, 0)])


def _occurrences(text: str, words: Collection[str]) -> list[re.Match[str]]:
    """Finds words in a text, the longest where several match. A word that begins or ends with a letter
    matches whole words alone."""
    if not words:
        return []
    before, after = r"(?<!\w)", r"(?!\w)"
    patterns = ((before if w[0].isalnum() else "") + re.escape(w) + (after if w[-1].isalnum() else "")
                for w in sorted(words, key=len, reverse=True))
    return list(re.finditer("|".join(patterns), text))


def _pieces(text: str, start: int, end: int) -> list[tuple[int, tuple[int, int]]]:
    """CLIP's tokens of text[start:end]: their ids and spans."""
    bpe, out = tokenizer(), []
    for piece in bpe.pat.finditer(text[start:end]):
        encoded = "".join(bpe.byte_encoder[b] for b in piece.group().encode())
        span = start + piece.start(), start + piece.end()
        out += [(bpe.encoder[p], span) for p in bpe.bpe(encoded).split(" ")]
    return out


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower. The defaults are CLIP ViT-L/14, as Stable Diffusion 1 uses it."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int | None = None  # None: 4 times the width
    context_length: int = 77
    vocab_size: int = 49408
    quick_gelu: bool = True
    pad_id: int = END             # CLIP-L is padded with <end_of_text>, OpenCLIP towers with 0
    skip: int = 0                 # the number of last layers that the context leaves out
    final_norm: bool = True       # the context goes through the final LayerNorm
    pooled_dim: int | None = None  # width of the pooled text: last layer, LayerNorm, END token, projection
    projected: bool = True         # ... whether there is that projection (in FLUX there is none)
    compact: bool = False         # only the rows of the tokens listed in `vocab` are stored
    mask_padding: bool = False   # padding has a zero context: no text, but columns that take attention


CLIP_L = TextConfig()
# of 24: the last is never used
OPENCLIP_H = TextConfig(width=1024, heads=16, layers=23, quick_gelu=False, pad_id=0)
SDXL_L = TextConfig(layers=11, final_norm=False)                                       # of 12
OPENCLIP_G = TextConfig(width=1280, heads=20, layers=32, quick_gelu=False, pad_id=0, skip=1, final_norm=False,
                        pooled_dim=1280)
EMOJI = TextConfig(width=128, heads=4, layers=3, context_length=32, vocab_size=0, pad_id=0, compact=True,
                   mask_padding=True)


def _drawn(std: float, *shape: int) -> Tensor:
    """Draws uniform weights: for normal ones on the meta device torch imports its compiler, which takes
    seconds."""
    return torch.empty(shape).uniform_(-(3**0.5) * std, 3**0.5 * std)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block (Radford et al. 2021).  (B, L, C) -> (B, L, C)"""

    def __init__(self, width: int, heads: int, mlp_width: int, act: type[nn.Module]):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, mlp_width), gelu=act(),
                                             c_proj=nn.Linear(mlp_width, width)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    """Token ids -> context (and, for towers that have one, the pooled text). Tensors are
    named as in open_clip."""

    vocab: Tensor

    def __init__(self, config: TextConfig = CLIP_L):
        super().__init__()
        self.config = c = config
        self.token_embedding = nn.Embedding.from_pretrained(_drawn(0.02, c.vocab_size, c.width), freeze=False)
        self.positional_embedding = nn.Parameter(_drawn(0.01, c.context_length, c.width))
        act = QuickGELU if c.quick_gelu else nn.GELU
        blocks = (Block(c.width, c.heads, c.mlp_width or 4 * c.width, act) for _ in range(c.layers))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(c.width) if c.final_norm or c.pooled_dim else nn.Identity()
        if c.pooled_dim and c.projected:
            self.text_projection = nn.Parameter(_drawn(c.width**-0.5, c.width, c.pooled_dim))
        if c.compact:
            # (V,) sorted token ids
            self.register_buffer("vocab", torch.zeros(c.vocab_size, dtype=torch.long))
        self.words: dict[str, range] = {}   # words added to CLIP's, with their ids, which follow CLIP's

    def add_words(self, words: Mapping[str, Tensor]) -> None:
        """Adds words, written as `Tokens.text`, of n tokens each, which are embedded by these vectors
        (n, C)."""
        table = self.token_embedding.weight
        first = new = END + 1 + sum(map(len, self.words.values()))
        for word, vectors in words.items():
            self.words[word] = range(new, new := new + len(vectors))
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.cat([table, *(v.to(table) for v in words.values())]))
        if self.config.compact:
            self.vocab = torch.cat([self.vocab, torch.arange(first, new).to(self.vocab)])

    def tokens(self, prompt: str) -> Tokens:
        return tokens(prompt, self.words)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """-> ids (B, L), cut after L tokens (the last one END) and padded as this tower was trained."""
        length = self.config.context_length
        ids = torch.full((len(prompts), length), self.config.pad_id)
        for row, prompt in zip(ids, prompts):
            encoded = self.tokens(prompt).ids
            encoded = encoded if len(encoded) <= length else [*encoded[: length - 1], END]
            row[: len(encoded)] = torch.tensor(encoded)
        return ids

    def unknown(self, ids: Tensor) -> Tensor:
        """Whether each token is missing in a compact vocabulary.  (..., L) -> (..., L) bool"""
        return ~torch.isin(ids, self.vocab) if self.config.compact else torch.zeros_like(ids).bool()

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, L) -> context (B, L, C), pooled (B, P) or None."""
        c = self.config
        end = (ids == END).int().argmax(dim=1)                                   # (B,) the first END
        x = self._embed(ids) + self.positional_embedding[: ids.shape[1]]         # (B, L, C)
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        context = x
        for i, block in enumerate(self.transformer["resblocks"].children()):
            x = block(x, mask)
            if i == c.layers - 1 - c.skip:
                context = x
        if c.final_norm:
            context = self.ln_final(context)
        if c.mask_padding:
            context = context * (torch.arange(ids.shape[1], device=ids.device) <= end[:, None])[..., None]
        if not c.pooled_dim:
            return context, None
        pooled = self.ln_final(x)[torch.arange(len(ids), device=ids.device), end]
        return context, pooled @ self.text_projection if c.projected else pooled   # (B, P)

    def _embed(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, C); unknown tokens of a compact vocabulary embed as zero."""
        if not self.config.compact:
            return self.token_embedding(ids)
        rows = torch.searchsorted(self.vocab, ids.contiguous()).clamp(max=len(self.vocab) - 1)
        return self.token_embedding(rows) * (self.vocab[rows] == ids)[..., None]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> context (B, L, C)"""
        return self.encode(ids)[0]
