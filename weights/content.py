"""sha256 of a model in memory: of its networks' weights as they are, and of what is set beside them."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SET = ("prediction", "clip", "offset", "final_alpha", "timestep_spacing", "latent_scale", "zero_negative",
       "sampler")   # beside the networks


def content(model: Any, known: dict[str, str] | None = None) -> str:
    """The digest of all that decides a model's pixels: the same from a pipeline in memory and from the folder
    that it was saved to, and however wide the numbers are stored.

    known: digests by sums of the weights, which tell whether these have changed.
    """
    parts = [model.unet, *model.text_encoders, *([model.vae] if model.vae else [])]
    tensors = [(name, t.detach()) for part in parts for name, t in _tensors(part)]
    known = {} if known is None else known
    sums = repr([_sum(t) for _, t in tensors])
    if sums not in known:
        settings = [*(part.config for part in parts), *(getattr(model, name) for name in SET)]
        settings += [model.flow] if model.flow else []
        settings += [_words(part.tokenizer) for part in parts if hasattr(part, "tokenizer")]
        digest = hashlib.sha256(repr((settings, model.alphas_cumprod.tolist())).encode())
        for name, t in tensors:
            digest.update(repr((name, tuple(t.shape))).encode())
            digest.update(t.to("cpu", torch.promote_types(t.dtype, torch.float32)).contiguous().numpy().data)
        known[sums] = digest.hexdigest()
    return known[sums]


def _words(tokenizer: Any) -> str:
    """How T5's tokenizer splits text, without what a call leaves behind in it."""
    said = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    ends = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    return json.dumps([said, ends], sort_keys=True)


def _sum(t: Tensor) -> float:
    return (t.cpu() if t.device.type == "mps" else t).sum(dtype=torch.float64).item()   # MPS has no float64


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A module's tensors by the names that they are read by, also those that are made of others."""
    children, names = dict(module.named_children()), {*module._parameters, *module._buffers}
    if parametrize.is_parametrized(module):
        names |= children.pop("parametrizations")._modules.keys()
    for name in sorted(names):
        if (tensor := getattr(module, name)) is not None:
            yield prefix + name, tensor
    for name in sorted(children):
        yield from _tensors(children[name], f"{prefix}{name}.")
