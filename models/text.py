"""Text towers: open_clip's tokenizer and TextTransformer, with the padding made explicit."""
from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


def _import_open_clip():
    """open_clip imports torchvision, whose compiled operators are missing beside a CPU build of torch.

    Nothing here calls them: that their schemas exist is enough for the import.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip.tokenizer
    import open_clip.transformer

    return open_clip


open_clip = _import_open_clip()

START, END = 49406, 49407   # <start_of_text>, <end_of_text>


@lru_cache(maxsize=1)
def tokenizer():
    """open_clip's byte-pair encoder (lower case, ftfy, html unescaped)."""
    return open_clip.tokenizer.SimpleTokenizer()


class Tokens(NamedTuple):
    """A prompt as the tower reads it. `text` is cleaned (lower case, single spaces); the ends count as tokens."""

    text: str
    ids: list[int]                      # START, ..., END; not padded, not cut
    spans: list[tuple[int, int]]        # the characters of `text` that each token belongs to; (0, 0) for the ends


def tokens(prompt: str) -> Tokens:
    """Splits a prompt as `tokenizer().encode` does, keeping where each token came from."""
    bpe = tokenizer()
    text = bpe.clean_fn(prompt)
    ids, spans = [START], [(0, 0)]
    for piece in bpe.pat.finditer(text):
        encoded = "".join(bpe.byte_encoder[b] for b in piece.group().encode())
        pieces = [bpe.encoder[p] for p in bpe.bpe(encoded).split(" ")]
        ids += pieces
        spans += [piece.span()] * len(pieces)
    return Tokens(text, [*ids, END], [*spans, (0, 0)])


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
    skip: int = 0                 # the context leaves out so many layers at the end
    final_norm: bool = True       # the context goes through the final LayerNorm
    pooled_dim: int | None = None  # width of the pooled text: last layer, LayerNorm, END token, projection
    compact: bool = False         # only the rows of the tokens listed in `vocab` are stored
    mask_padding: bool = False    # padding gives a zero context: no text, but a place where attention may rest


CLIP_L = TextConfig()
OPENCLIP_H = TextConfig(width=1024, heads=16, layers=23, quick_gelu=False, pad_id=0)   # of 24: the last is never used
SDXL_L = TextConfig(layers=11, final_norm=False)                                       # of 12
OPENCLIP_G = TextConfig(width=1280, heads=20, layers=32, quick_gelu=False, pad_id=0, skip=1, final_norm=False, pooled_dim=1280)
EMOJI = TextConfig(width=128, heads=4, layers=3, context_length=32, vocab_size=0, pad_id=0, compact=True, mask_padding=True)


class TextEncoder(nn.Module):
    """Token ids -> context (and, for towers that have one, the pooled text)."""

    def __init__(self, config: TextConfig = CLIP_L):
        super().__init__()
        self.config = c = config
        tower = open_clip.transformer.TextTransformer(
            context_length=c.context_length, vocab_size=c.vocab_size, width=c.width, heads=c.heads, layers=c.layers,
            mlp_ratio=(c.mlp_width or 4 * c.width) / c.width, output_dim=c.pooled_dim or 0,
            no_causal_mask=True,   # the causal mask is made in forward: no buffer to load or move
            act_layer=open_clip.transformer.QuickGELU if c.quick_gelu else nn.GELU,
        )
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final if c.final_norm or c.pooled_dim else None
        if c.pooled_dim:
            self.text_projection = tower.text_projection
        if c.compact:
            self.register_buffer("vocab", torch.zeros(c.vocab_size, dtype=torch.long))   # (V,) sorted token ids

    def tokens(self, prompt: str) -> Tokens:
        return tokens(prompt)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """-> ids (B, L), cut after L tokens (the last one END) and padded as this tower was trained."""
        length = self.config.context_length
        ids = torch.full((len(prompts), length), self.config.pad_id)
        for row, prompt in zip(ids, prompts):
            found = tokens(prompt).ids
            found = found if len(found) <= length else [*found[: length - 1], END]
            row[: len(found)] = torch.tensor(found)
        return ids

    def unknown(self, ids: Tensor) -> Tensor:
        """Which tokens a compact vocabulary does not hold.  (..., L) -> (..., L) bool"""
        return ~torch.isin(ids, self.vocab) if self.config.compact else torch.zeros_like(ids, dtype=torch.bool)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, L) -> context (B, L, C), pooled (B, P) or None."""
        c = self.config
        end = (ids == END).int().argmax(dim=1)                                   # (B,) the first END
        x = self._embed(ids) + self.positional_embedding[: ids.shape[1]]         # (B, L, C)
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        context = x
        for i, block in enumerate(self.transformer.resblocks):
            x = block(x, attn_mask=mask)
            if i == c.layers - 1 - c.skip:
                context = x
        if c.final_norm:
            context = self.ln_final(context)
        if c.mask_padding:
            context = context * (torch.arange(ids.shape[1], device=ids.device) <= end[:, None])[..., None]
        if not c.pooled_dim:
            return context, None
        rows = torch.arange(len(ids), device=ids.device)
        return context, self.ln_final(x)[rows, end] @ self.text_projection       # (B, P)

    def _embed(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, C); unknown tokens of a compact vocabulary embed as zero."""
        if not self.config.compact:
            return self.token_embedding(ids)
        rows = torch.searchsorted(self.vocab, ids.contiguous()).clamp(max=len(self.vocab) - 1)
        return self.token_embedding(rows) * (self.vocab[rows] == ids)[..., None]

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> context (B, L, C)"""
        return self.encode(ids)[0]
