"""Changes of single weights, as add-on files hold them: what LoRA, LoHa, LoKr, DoRA, a difference does to W.

    W' = W + m s D        m: the user's weight; s = alpha / rank, or 1 where nothing is factorised
    LoRA                  D = up down; of a convolution, for each place of its kernel   (Hu et al. 2021)
    LoCon with a middle   D[o, c] = sum over i, j of up[o, i] mid[i, j] down[j, c], likewise   (LyCORIS)
    LoHa                  D = (a1 b1) * (a2 b2), each perhaps with a middle   (Hyeon-Woo et al. 2022)
    LoKr                  D = kron(w1, w2), each perhaps factorised, w2 perhaps with a middle   (LyCORIS)
    difference            D as it stands
    DoRA, of any of them  W' (1 + m (d / |W'| - 1)): norms over what each output takes, or, where d is a row,
                          over what each input gives   (Liu et al. 2024, LyCORIS)
    ... as PEFT saves it  W' d / |W'|, norms over what each output takes: there m weighs D alone
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2p.weights.errors import CheckpointError
from p2p.weights.files import TensorFile
from p2p.weights.fill import squeezed

Shape = tuple[int, ...]
DORA, DORA_PEFT = "dora_scale", "magnitude"


@dataclass(frozen=True)
class Change:
    """What one add-on does to one weight, or to the k-th of n shares of its rows."""

    file: TensorFile
    kind: str                            # of `WHOLE`
    keys: Mapping[str, str]              # by their roles: the names of its tensors
    scale: float                         # s
    weight: float                        # m
    share: tuple[int, int] = (0, 1)      # (k, n)
    transposed: bool = False             # the weight lies the other way round than in the add-on's naming

    def __call__(self, tensor: Tensor) -> Tensor:
        """The weight with this change, in float32 or wider. Raises CheckpointError where it is not finite."""
        # a copy: the tensor may be in use, by a pipeline in memory
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        k, n = self.share
        piece = (wide.T if self.transposed else wide).chunk(n)[k]
        held = {role: self._read(key).to(wide) for role, key in self.keys.items()}
        changed = piece + (self.weight * self.scale) * delta(self.kind, held).reshape(piece.shape)
        if DORA in held:
            changed = changed * (1 + self.weight * (relative(held[DORA], changed) - 1))
        elif DORA_PEFT in held:
            changed = changed * relative(held[DORA_PEFT].flatten(), changed)
        if not changed.isfinite().all():
            key = next(iter(self.keys.values()))
            raise CheckpointError(f"{self.file.path}: {key}, with the weight {self.weight:g}, makes weights "
                                  "that are not finite; give a smaller one.")
        piece.copy_(changed)
        return wide

    def _read(self, key: str) -> Tensor:
        tensor = self.file[key]
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.file.path}: {key} holds values that are not finite. It is damaged.")
        return tensor


def relative(d: Tensor, w: Tensor) -> Tensor:
    """DoRA's magnitudes d over the norms of w: by output, d (out, ...), or by input, d (1, in, ...)."""
    outputs, least = d.shape[0] == w.shape[0], torch.finfo(w.dtype).tiny
    norms = (w if outputs else w.transpose(0, 1)).flatten(1).norm(dim=1).clamp(min=least)
    ones = [1] * (w.ndim - 2)
    return (d.flatten() / norms).view(*((-1, 1) if outputs else (1, -1)), *ones)


def delta(kind: str, t: Mapping[str, Tensor]) -> Tensor:
    """D by its tensors. Its numbers lie as the weight's, but a kernel's places may be in one dimension."""
    if kind == "LoRA":
        return _product(t["up"].flatten(1), t["down"], t.get("mid"))
    if kind == "LoHa":
        one, other = (_factors(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in "12")
        return one * other
    if kind == "LoKr":
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else _factors(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
        return torch.kron(w1, w2.flatten(1))
    [alone] = t.values()
    return alone


def _product(up: Tensor, down: Tensor, middle: Tensor | None) -> Tensor:
    """(o, i), (j, c, ...), (i, j, ...) or None  ->  (o, c, ...), or (o, c ...) in two dimensions"""
    if middle is None:
        return up @ down.flatten(1)
    return torch.einsum("oi,ij...,jc->oc...", up, middle, down.flatten(1))


def _factors(a: Tensor, b: Tensor, middle: Tensor | None) -> Tensor:
    """The product of LyCORIS' factors, whose first is transposed where there is a middle."""
    return _product(a if middle is None else a.T, b, middle)


# ------------------------------------------------------------------------------------------ checked by shapes

_LOHA = {f"hada_w{i}_{x}" for i in "12" for x in "ab"}
_LOKR = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}]
_SCALED = {"alpha", DORA, DORA_PEFT}
# Of each kind the sets of tensors that make it up, and what may be there besides.
WHOLE: dict[str, tuple[list[set[str]], set[str]]] = {
    "LoRA": ([{"up", "down"}, {"up", "down", "mid"}], _SCALED),
    "LoHa": ([_LOHA, _LOHA | {"hada_t1", "hada_t2"}], _SCALED),
    "LoKr": ([one | other for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) for other in _LOKR], _SCALED),
    "difference": ([{"diff"}, {"diff_b"}, {"w_norm"}, {"b_norm"}], set()),
}


def kind_of(roles: set[str]) -> str | None:
    """The kind that a weight's tensors make up; None where some are missing, or of two kinds."""
    if {DORA, DORA_PEFT} <= roles:
        return None
    return next((kind for kind, (sets, more) in WHOLE.items() if roles - more in sets), None)


def rank(kind: str, s: Mapping[str, Shape]) -> int | None:
    """Of what is factorised, if anything is."""
    rows = {"LoRA": ("down",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
    return next((s[role][0] for role in rows if role in s), None)


def check(kind: str, s: Mapping[str, Shape], want: Shape) -> None:
    """Raises ValueError unless tensors of these shapes make a change of a weight of the shape `want`."""
    if any(not n for shape in s.values() for n in shape):
        raise ValueError("an empty tensor")
    if kind == "LoRA":
        made = _multiplied(s["up"], s["down"], s.get("mid"))
    elif kind == "LoHa":
        made, other = (_turned(s[f"hada_w{i}_a"], s[f"hada_w{i}_b"], s.get(f"hada_t{i}")) for i in "12")
        if made != other or s["hada_w1_b"][0] != s["hada_w2_b"][0]:
            raise ValueError("its two factors differ in shape")
    elif kind == "LoKr":
        made = _kron(s)
    else:
        [made] = s.values()
    flat = len(want) > 2 and made[1:] == (math.prod(want[1:]),)
    if made[:1] != want[:1] or not (flat or squeezed(made) == squeezed(want)):
        raise ValueError(f"of a weight {list(made)}, expected {list(want)}")
    for role in {DORA, DORA_PEFT} & s.keys():
        d, n = s[role], math.prod(s[role])
        outputs = n == want[0] and (role == DORA_PEFT or d[:1] == (n,))
        inputs = role == DORA and want[1:2] == (n,) and d[:2] == (1, n)
        if not (outputs or inputs):
            raise ValueError(f"its {role} is {list(d)}")


def _kron(s: Mapping[str, Shape]) -> Shape:
    w1 = s["lokr_w1"] if "lokr_w1" in s else _multiplied(s["lokr_w1_a"], s["lokr_w1_b"], None)
    w2 = s["lokr_w2"] if "lokr_w2" in s else _turned(s["lokr_w2_a"], s["lokr_w2_b"], s.get("lokr_t2"))
    if len(w1) != 2 or len(w2) < 2:
        raise ValueError(f"factors {list(w1)} and {list(w2)}")
    if len({s[role][0] for role in ("lokr_w1_b", "lokr_w2_b") if role in s}) > 1:
        raise ValueError("its factors are of two ranks")
    return w1[0] * w2[0], w1[1] * w2[1], *w2[2:]


def _turned(a: Shape, b: Shape, middle: Shape | None) -> Shape:
    """The shape of `_factors`. Raises ValueError."""
    return _multiplied(a if middle is None else a[::-1], b, middle)


def _multiplied(up: Shape, down: Shape, middle: Shape | None) -> Shape:
    """The shape of `_product`. Raises ValueError."""
    core = down if middle is None else middle
    fits = min(map(len, (up, down, core))) >= 2 and up[1] == core[0] and set(up[2:]) <= {1}
    if fits and middle is not None:
        fits = middle[1] == down[0] and set(down[2:]) <= {1}
    if not fits:
        raise ValueError(f"factors {' and '.join(str(list(x)) for x in (up, middle, down) if x is not None)}")
    return up[0], down[1], *core[2:]
