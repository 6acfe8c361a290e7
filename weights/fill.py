"""Loads tensors from files into modules: every name and shape is checked before the first is loaded."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
    they compute. Tensors that are in use elsewhere stay the same memory, see `_shared`.
    """
    with torch.device("meta"):
        module = built(part, build).requires_grad_(False)
    large, state, made = widened_names(module), {}, {}
    plan = _plan(part, module, what)
    for name, tensor in _read(part, plan, module):
        wanted = held if held and name in large else dtype
        if _shared(part, plan[name], name, device, wanted):
            tensors = [part.file[k] for k in plan[name].keys]
            as_it_is = tensor.data_ptr() == tensors[0].data_ptr() and tensor.is_contiguous()
            if as_it_is and (wanted in (None, tensor.dtype) or name in large):
                state[name] = tensor
            else:
                made[name] = Made(tensors, plan[name], tensor.shape, wanted)
        else:
            tensor = tensor.to(wanted) if wanted and tensor.is_floating_point() else tensor
            state[name] = tensor.to(device)
    put(module, state, made)
    return module.eval().requires_grad_(False)


def put(module: nn.Module, state: Mapping[str, Tensor], made: Mapping[str, Made]) -> None:
    """Gives a module all of its tensors."""
    module.load_state_dict(state, strict=not made, assign=True)
    for name, how in made.items():
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(module.get_submodule(owner), leaf, how, unsafe=True)


def _shared(part: Part, source: Source, name: str, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether a tensor of a module is made of the memory of one that is in use elsewhere: unless an add-on
    changes it, or it lies on another device, or is wider than asked for."""
    if not part.file.shared or name in part.changes:
        return False
    held = part.file[source.keys[0]]
    fits = dtype is None or dtype == held.dtype or dtype.itemsize > held.dtype.itemsize
    return lies_on(held, device) and fits


def lies_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def copied(part: Part, module: nn.Module) -> int:
    """Bytes of a module's weights beyond those of a file whose tensors are in use elsewhere."""
    there = {part.file[key].untyped_storage().data_ptr() for key in part.file.shapes}
    return sum(p.nbytes for p in module.parameters() if p.untyped_storage().data_ptr() not in there)


class Made(nn.Module):
    """A tensor that is made of others (queries, keys and values joined, say) whenever it is read, so that it
    takes no memory and follows their changes."""

    def __init__(self, tensors: list[Tensor], source: Source, shape: torch.Size, dtype: torch.dtype | None):
        super().__init__()
        self.source, self.shape, self.dtype, self._tensors = source, shape, dtype, tensors

    def right_inverse(self, _: Tensor) -> list[Tensor]:
        """The tensors themselves, which torch registers in place of the parameter."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def forward(self, *tensors: Tensor) -> Tensor:
        return _joined(tensors, self.source, self.shape).to(self.dtype or tensors[0].dtype).contiguous()


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
    with torch.device("meta"):
        module = built(part, build)
    return _read(part, _plan(part, module, what), module)


def _plan(part: Part, module: nn.Module, what: str) -> dict[str, Source]:
    """Where every tensor comes from, with the prefix. Raises CheckpointError unless names and shapes fit."""
    path, shapes, want = part.file.path, part.file.shapes, module.state_dict()
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
    return plan


def _read(part: Part, plan: dict[str, Source], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    want = module.state_dict()
    for name, s in plan.items():
        tensor = _tensor(part, s, want[name])
        for change in part.changes.get(name, ()):
            tensor = change(tensor)
        yield name, tensor


def _joined(tensors: Sequence[Tensor], source: Source, shape: torch.Size) -> Tensor:
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if source.share[1] > 1:
        k, n, dim = source.share
        tensor = tensor.unflatten(0, (-1, n, dim))[:, k].flatten(0, 1)
    if source.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return (tensor.T if source.transposed else tensor).reshape(shape)


def _tensor(part: Part, source: Source, want: Tensor) -> Tensor:
    tensor = _joined([part.file[k] for k in source.keys], source, want.shape)
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} is fp8; use the fp16 or fp32 file of the "
                              "same model.")
    if tensor.is_floating_point() != want.is_floating_point():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds {tensor.dtype}.")
    # isfinite() of the whole would allocate as much again, and the allocator keeps what it once held
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{part.file.path}: {source.keys[0]} holds values that are not finite.")
    return tensor.contiguous()


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions and linear layers hold the same numbers; files mix them."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape
