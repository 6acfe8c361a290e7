"""Loads tensors from files into modules: every name and shape is checked before the first is loaded."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from p2p.models.layers import widened_names
from p2p.models.unet import UNetConfig
from p2p.weights import keys
from p2p.weights.detect import Part
from p2p.weights.errors import CheckpointError
from p2p.weights.fields import listed
from p2p.weights.keys import Source
from p2p.weights.keys_mmdit import diffusers_sources
from p2p.weights.sizes import check_bill

# safetensors' words for torch's
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored(part: Part) -> torch.dtype:
    """The dtype that most numbers of a part are stored in; it computes in this one, even if some layers are
    stored in another."""
    counts: Counter[torch.dtype] = Counter()
    for name, shape in part.file.shapes.items():
        kind = getattr(torch, DTYPES.get(dtype_name := part.file.dtypes[name], dtype_name), None)
        if name.startswith(part.prefix) and isinstance(kind, torch.dtype) and kind.is_floating_point:
            counts[kind] += math.prod(shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def sources(part: Part, names: list[str]) -> dict[str, Source]:
    """Where every tensor of a module comes from in its file, without the prefix."""
    prefixes = keys.unet_prefixes if isinstance(part.config, UNetConfig) else keys.vae_prefixes
    return {
        "ldm": lambda: keys.ldm_sources(names, prefixes(part.config)),
        "hf": lambda: keys.hf_sources(names), "open_clip": lambda: keys.same_sources(names),
        "own": lambda: keys.same_sources(names), "own, old": lambda: keys.old_vae_sources(names),
        "deepfloyd": lambda: keys.deepfloyd_sources(names, part.config),
        "diffusers": lambda: diffusers_sources(names, part.config),
    }[part.naming]()


def fill(what: str, part: Part, build: Callable[..., nn.Module], device: torch.device,
         dtype: torch.dtype | None, held: torch.dtype | None = None) -> nn.Module:
    """Builds a module without memory, checks it against the file's header, then puts the tensors in one by
    one.

    dtype: None as in the file. held: another, for what linear layers and convolutions hold; they widen it as
    they compute.
    """
    with torch.device("meta"):
        module = built(part, build)
    large, state = widened_names(module), {}
    for name, tensor in read_tensors(part, lambda _: module, what):
        wanted = held if held and name in large else dtype
        state[name] = (tensor.to(wanted) if wanted and tensor.is_floating_point() else tensor).to(device)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def built(part: Part, build: Callable[[Any], nn.Module]) -> nn.Module:
    if part.config is not None:
        check_bill(part.file.path, part.config, sum(k.startswith(part.prefix) for k in part.file.shapes))
    try:
        return build(part.config)
    except (ArithmeticError, AssertionError, IndexError, KeyError, RuntimeError, TypeError,
            ValueError) as error:
        raise CheckpointError(f"{part.file.path}: no network has the sizes that it names ({error}). Is it "
                              "damaged?") from None


def read_tensors(part: Part, build: Callable[..., nn.Module],
                 what: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Own name and tensor, one at a time, after names and shapes of all were checked; tensors that
    add-ons change (see `p2p.weights.lora`) in float32 or wider. Raises CheckpointError."""
    path, shapes = part.file.path, part.file.shapes
    with torch.device("meta"):
        want = built(part, build).state_dict()
    plan = {name: s._replace(keys=tuple(part.prefix + k for k in s.keys))
            for name, s in sources(part, list(want)).items()}
    read = {k for s in plan.values() for k in s.keys}
    ignored = tuple(part.prefix + k for k in part.ignored)
    missing = sorted(read - shapes.keys())
    extra = sorted(k for k in shapes if k.startswith(part.prefix) and k not in read
                   and not (ignored and k.startswith(ignored)))
    if missing or extra:
        raise CheckpointError(f"{path}: its {what} does not fit. "
                              + "; ".join(listed(n, k)
                                          for n, k in (("missing", missing), ("unexpected", extra)) if k)
                              + ". Is it complete, and of the family that it seems to be?")
    wrong = []
    for name, s in plan.items():
        parts = [shapes[k] for k in s.keys]
        fit = [p[:1] for p in parts] == ([(n,) for n in s.rows] or [parts[0][:1]] * len(parts))
        shape = (sum(p[0] for p in parts) // s.share[1], *parts[0][1:]) if fit and parts[0] else parts[0]
        if not fit or squeezed(shape[::-1] if s.transposed else shape) != squeezed(tuple(want[name].shape)):
            wrong.append(f"{s.keys[0]} is {list(shape)}, expected {list(want[name].shape)}")
    if wrong:
        raise CheckpointError(f"{path}: its {what} does not fit: {listed('shapes', wrong)}")
    for name, s in plan.items():
        tensor = _tensor(part, s, want[name])
        for change in part.changes.get(name, ()):
            tensor = change(tensor)
        yield name, tensor


def _tensor(part: Part, source: Source, want: Tensor) -> Tensor:
    tensors = [part.file[k] for k in source.keys]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if source.share[1] > 1:
        k, n, dim = source.share
        tensor = tensor.unflatten(0, (-1, n, dim))[:, k].flatten(0, 1)
    if source.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    tensor = (tensor.T if source.transposed else tensor).reshape(want.shape)
    if tensor.is_floating_point() != want.is_floating_point():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds {tensor.dtype}.")
    # isfinite() of the whole would allocate as much again, and the allocator keeps what it once held
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds values that are not finite.")
    return tensor.contiguous()


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions and linear layers hold the same numbers; files mix them."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape
