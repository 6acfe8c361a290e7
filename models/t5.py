"""T5, which encodes the text of DeepFloyd IF, Stable Diffusion 3 and FLUX, through transformers; or prompts
that were encoded beforehand."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from p2p.models.text import Tokens, lowered

END = 1   # T5's </s>


@dataclass(frozen=True)
class T5Config:
    width: int = 4096
    context_length: int = 77
    pooled_dim: int | None = None
    # as DeepFloyd IF reads prompts: in small letters, padding masked inside T5; Stable Diffusion 3 and FLUX
    # read them as they are, padding too
    masked: bool = True


def as_read(prompt: str, masked: bool) -> str:
    """A prompt as T5 is given it; masked: as DeepFloyd IF has it, see `T5Config`."""
    text = " ".join(prompt.split())
    return text.lower() if masked else text


def tokens(tokenizer: Any, prompt: str, masked: bool) -> Tokens:
    """Tokens and their positions in the prompt; a token that is only a space belongs to the next word."""
    prompt = as_read(prompt, masked)
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ids, spans = list(encoded["input_ids"]), [tuple(s) for s in encoded["offset_mapping"]]
    after = (0, 0)
    for i in reversed(range(len(spans))):
        start, stop = spans[i]
        while start < stop and prompt[start] == " ":
            start += 1
        if start < stop:
            after = (start, stop)
        spans[i] = after
    return Tokens(lowered(prompt), ids, spans)


class T5Encoder(nn.Module):
    """transformers' T5EncoderModel and its (fast) tokenizer, with the methods of
    `p2p.models.text.TextEncoder`.

    Padding is masked inside T5, if anywhere: the network attends to all `context_length` tokens.
    """

    def __init__(self, tower: Any, tokenizer: Any, context_length: int = 77, masked: bool = True):
        super().__init__()
        self.tower: Any = tower
        self.tokenizer = tokenizer
        self.config = T5Config(tower.config.d_model, context_length, masked=masked)

    def tokens(self, prompt: str) -> Tokens:
        return tokens(self.tokenizer, prompt, self.config.masked)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """-> ids (B, L), cut after L tokens (the last one the end token) and padded."""
        encoded = self.tokenizer([as_read(p, self.config.masked) for p in prompts], truncation=True,
                                 padding="max_length", max_length=self.config.context_length,
                                 return_tensors="pt")
        return encoded["input_ids"]

    def unknown(self, ids: Tensor) -> Tensor:
        return ids == self.tokenizer.unk_token_id

    def encode(self, ids: Tensor) -> tuple[Tensor, None]:
        """ids (B, L) -> context (B, L, C); no pooled text."""
        mask = (ids != self.tokenizer.pad_token_id).long() if self.config.masked else None
        return self.tower(input_ids=ids, attention_mask=mask).last_hidden_state, None


class EncodedPrompts(nn.Module):
    """Prompts with their embeddings and tokens, in place of the tower that encoded them (read from a file by
    `p2p.weights.t5`).

    The file: `prompt_embeds` (P, L, C), and in its metadata "prompts" and "tokens", JSON: for each prompt its
    text and [text, ids, spans] as `Tokens` holds them; and "padding": "read" where T5 read it. The empty
    prompt is needed for guidance.
    """

    embeddings: Tensor

    def __init__(self, prompts: list[str], tokens: list[Tokens], embeddings: Tensor, masked: bool = True):
        super().__init__()
        self.prompts, self.split = prompts, dict(zip(prompts, tokens))
        self.register_buffer("embeddings", embeddings)
        self.config = T5Config(embeddings.shape[2], embeddings.shape[1], masked=masked)

    @staticmethod
    def encoded_by(tower: T5Encoder, prompts: list[str]) -> EncodedPrompts:
        """Encodes the empty prompt and these, one at a time."""
        device = next(tower.parameters()).device
        prompts = list(dict.fromkeys(["", *prompts]))
        with torch.no_grad():
            rows = [tower.encode(tower.tokenize([p]).to(device))[0].cpu() for p in prompts]
        return EncodedPrompts(prompts, [tower.tokens(p) for p in prompts], torch.cat(rows),
                              tower.config.masked)

    def _known(self, prompt: str) -> str:
        if prompt not in self.split:
            raise ValueError(f'the prompt "{prompt}" is not among the encoded ones: '
                             f'{", ".join(repr(p) for p in self.prompts)}')
        return prompt

    def tokens(self, prompt: str) -> Tokens:
        return self.split[self._known(prompt)]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """-> the prompts' numbers (B, 1)"""
        return torch.tensor([[self.prompts.index(self._known(p))] for p in prompts])

    def unknown(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    def encode(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.embeddings[ids[:, 0]], None


class NoT5(nn.Module):
    """In T5's place where a model runs without it (Stable Diffusion 3): zeros, whatever the prompt."""

    zeros: Tensor

    def __init__(self, width: int, context_length: int):
        super().__init__()
        self.config = T5Config(width, context_length, masked=False)
        self.register_buffer("zeros", torch.zeros(context_length, width))

    def tokens(self, prompt: str) -> Tokens:
        """Those of no text: the end alone."""
        return Tokens("", [END], [(0, 0)])

    def tokenize(self, prompts: list[str]) -> Tensor:
        """-> (B, 1)"""
        return torch.full((len(prompts), 1), END)

    def unknown(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    def encode(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.zeros.expand(len(ids), -1, -1), None
