"""PIE-Bench's metrics: all that its authors' evaluator computes, in the official and a corrected convention.

Official (Ju et al. 2023, `evaluation/matrics_calculator.py`): pixels outside of the part that a figure is
about are black in both pictures and the figure is that of the whole frame, so a large mask flatters the kept
part; a part without pixels gives no number. Structure is computed from pictures in 0..255 under ImageNet's
normalisation, which is made for 0..1. Corrected: the mean over the part's pixels; structure of pictures in
0..1, the edit with the source's pixels outside the part. Figures are unscaled: the published table multiplies
structure and LPIPS by 10^3, MSE by 10^4 and SSIM by 10^2.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.errors import UsageError
from p2p.weights import digest
from p2p.weights.errors import CheckpointError
from p2p.weights.files import open_file

CONVENTIONS = ("official", "corrected")
COLUMNS = ("structure", "PSNR", "LPIPS", "MSE", "SSIM", "CLIP whole", "CLIP edited")  # of the published table


def label(metric: str, part: str) -> str:
    """A figure's name here; without a part for those of the published table: structure of the whole picture,
    and all others of the kept part."""
    return metric if part == ("whole" if metric == "structure" else "kept") else f"{metric} {part}"


# All figures, and the names that the authors' evaluator gives them
NAMES = {label(metric, part): name + suffix
         for part, suffix in (("whole", ""), ("kept", "_unedit_part"), ("edited", "_edit_part"))
         for metric, name in (("structure", "structure_distance"), ("PSNR", "psnr"), ("LPIPS", "lpips"),
                              ("MSE", "mse"), ("SSIM", "ssim"))} | {
    "CLIP source": "clip_similarity_source_image", "CLIP whole": "clip_similarity_target_image",
    "CLIP edited": "clip_similarity_target_image_edit_part"}
# (two pictures (1, 3, H, W) in 0..1, False) -> the metric's own average; (..., True) -> its map (H, W)
Metric = Callable[[Tensor, Tensor, bool], Tensor]


def torchmetrics():
    try:
        import torchmetrics.functional.image as functional
    except ImportError:
        raise UsageError('the metrics need torchmetrics: pip install -e ".[eval]" in the clone') from None
    return functional


class Embedder(NamedTuple):
    """An embedding of pictures and texts in one space."""

    pictures: Callable[[Tensor], Tensor]          # (B, 3, H, W) in 0..1 -> (B, D)
    texts: Callable[[Sequence[str]], Tensor]      # B texts -> (B, D)
    sha256: str | None = None                     # of the file that it was read from


@dataclass(frozen=True)
class Judges:
    """The metrics that are networks; None where no weights were given: the column is then absent."""

    lpips: Metric | None = None
    clip: Embedder | None = None
    structure: Callable[[Tensor, Tensor], float] | None = None
    # all that these were read from; None: unknown, so that their figures are measured again
    files: tuple[Path, ...] | None = None

    def identity(self) -> str | None:
        """A hash of the networks' files."""
        if self.files is None:
            return None
        return hashlib.sha256(" ".join(str(digest.sha256(f)) for f in self.files).encode()).hexdigest()[:16]


def measure(picture: Tensor, edit: Tensor, masks: Mapping[str, Tensor], text: str, judges: Judges,
            source: str = "") -> dict[str, dict[str, float | None]]:
    """All figures of one item.

    picture, edit (1, 3, H, W) in 0..1; masks: edited pixels (H, W) bool, by convention; text, source: the
    prompts.  -> NAMES by convention: None without weights, NaN where no pixel was kept or none was edited
    """
    clip: list[float] = []   # of the source, of the edit, and of the edit within each mask
    if judges.clip is not None:
        seen = judges.clip.pictures(torch.cat([picture, edit, *(edit * edited for edited in masks.values())]))
        captions = judges.clip.texts([source, text])
        captions = torch.cat([captions, captions[1:].expand(len(masks), -1)])
        clip = (100 * F.cosine_similarity(seen, captions)).tolist()
    by_convention = {}
    for i, (convention, edited) in enumerate(masks.items(), 2):
        official = convention == "official"
        out: dict[str, float | None] = dict.fromkeys(NAMES)
        for part, pixels in (("whole", torch.ones_like(edited)), ("kept", ~edited), ("edited", edited)):
            for name, f in (("MSE", _mse), ("SSIM", _ssim), ("LPIPS", judges.lpips)):
                if f is not None:
                    out[label(name, part)] = _of_part(f, picture, edit, pixels.float(), official)
            # infinite for equal pictures
            out[label("PSNR", part)] = -10 * torch.tensor(out[label("MSE", part)]).log10().item()
            if judges.structure is not None:
                out[label("structure", part)] = _structure(judges.structure, picture, edit, pixels, official)
        if clip:
            figures = (clip[0], clip[1], clip[i] if edited.any() else float("nan"))
            for name, value in zip(("CLIP source", "CLIP whole", "CLIP edited"), figures):
                # torchmetrics clips negative scores
                out[name] = max(value, 0.0) if official and value == value else value
        by_convention[convention] = out
    return by_convention


def _of_part(f: Metric, picture: Tensor, edit: Tensor, part: Tensor, official: bool) -> float:
    if not part.any():
        return float("nan")
    if official:
        return f(picture * part, edit * part, False).item()
    return ((f(picture, torch.where(part > 0, edit, picture), True) * part).sum() / part.sum()).item()


def _structure(f: Callable[[Tensor, Tensor], float], picture: Tensor, edit: Tensor, part: Tensor,
               official: bool) -> float:
    if not part.any():
        return float("nan")
    if official:
        return f(255 * picture * part, 255 * edit * part)
    return f(picture, torch.where(part, edit, picture))


def _mse(a: Tensor, b: Tensor, where: bool) -> Tensor:
    error = (a - b).square()
    return error.mean(1)[0] if where else error.mean()


def _ssim(a: Tensor, b: Tensor, where: bool) -> Tensor:
    mean, image = torchmetrics().structural_similarity_index_measure(a, b, data_range=1.0,
                                                                     return_full_image=True)
    # its mean leaves out the border, where windows reach beyond the picture
    return image.mean(1)[0] if where else mean


def interval(values: Sequence[float | None]) -> tuple[float, float, int] | None:
    """Mean, half-width of its 95 % confidence interval, and number of the finite values; None without any."""
    finite = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    finite = finite[finite.isfinite()]
    if not len(finite):
        return None
    half = 1.96 * finite.std().item() / len(finite) ** 0.5 if len(finite) > 1 else float("nan")
    return finite.mean().item(), half, len(finite)


# ---------------------------------------------------------------------------------------- judges from weights

def _weights(file: Path, option: str) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or a pickle. Raises UsageError."""
    try:
        tensors = open_file(file)
        return {k: tensors[k] for k in tensors.shapes}
    except CheckpointError as error:
        raise UsageError(f"{option} {file}: cannot be read ({error})") from None


def _filled(module: nn.Module, state: dict[str, Tensor], option: str, file: Path) -> nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        messages = str(error).splitlines()
        raise UsageError(f"{option} {file}: {messages[0]} {messages[-1].strip()}") from None
    return module.eval().requires_grad_(False)


def lpips(squeezenet: Path) -> Metric:
    """LPIPS on SqueezeNet, as PIE-Bench uses it. squeezenet: torchvision's squeezenet1_1; the other weights
    come with torchmetrics."""
    torchmetrics()
    from torchmetrics.functional.image.lpips import _LPIPS
    net = _LPIPS(net="squeeze", pnet_rand=True, spatial=True)
    state = _weights(squeezenet, "--lpips")
    # slices.1.3.squeeze.weight
    names = {name: "features." + name.split(".", 2)[2] for name in net.net.state_dict()}
    missing = [n for n in names.values() if n not in state]
    if missing:
        raise UsageError(f"--lpips {squeezenet}: not torchvision's squeezenet1_1 ({missing[0]} is missing)")
    _filled(net.net, {name: state[n] for name, n in names.items()}, "--lpips", squeezenet)

    def distance(a: Tensor, b: Tensor, where: bool) -> Tensor:
        net.spatial = where
        return net(2 * a - 1, 2 * b - 1).squeeze()

    return distance


def shortest(x: Tensor, side: int) -> Tensor:
    """Resizes pictures in 0..1 as CLIP's processor does: the shorter side scaled (bicubic, 8 bits), the
    centre cropped."""
    h, w = x.shape[2:]
    size = [int(side * n / min(h, w)) for n in (h, w)]
    x = (255 * F.interpolate(x, size=size, mode="bicubic", antialias=True,
                             align_corners=False)).round().clamp(0, 255) / 255
    top, left = ((n - side) // 2 for n in size)
    return x[..., top:top + side, left:left + side]


def squeezed(x: Tensor, side: int) -> Tensor:
    """Resizes as InstructPix2Pix's `ClipSimilarity` does: both sides, bicubic without antialiasing."""
    return F.interpolate(x.float(), size=(side, side), mode="bicubic", align_corners=False)


def clip(file: Path, model: str = "ViT-L-14-quickgelu",
         prepare: Callable[[Tensor, int], Tensor] = shortest) -> Embedder:
    """CLIP. file: open_clip's weights of that model (OpenAI's ViT-L/14). prepare: (B, 3, H, W) in 0..1 and
    the network's side -> its input, before normalisation."""
    import open_clip
    state = {k.removeprefix("module."): v for k, v in _weights(file, "--clip").items()}
    net, tokenizer = open_clip.create_model(model), open_clip.get_tokenizer(model)
    net = _filled(net, state, "--clip", file)
    side = net.visual.image_size[0] if isinstance(net.visual.image_size, tuple) else net.visual.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1)
                 for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return Embedder(lambda x: net.encode_image((prepare(x, side) - mean) / std),
                    lambda texts: net.encode_text(tokenizer(list(texts))), digest.sha256(file))


def structure(file: Path, model: str = "vit_base_patch8_224.dino") -> Callable[[Tensor, Tensor], float]:
    """Distance of the self-similarities of DINO's keys (Tumanyan et al. 2022, as PIE-Bench uses it); the
    file: timm's weights.

    Pictures that are not square are squeezed, where the evaluator keeps their shape (those of PIE-Bench
    are square). They are resized with antialiasing, as torchvision does from 0.17 on; the one of 2023 left
    that out for tensors.
    """
    import timm  # open_clip needs it too

    net = timm.create_model(model, pretrained=False, num_classes=0)
    net = _filled(net, _weights(file, "--dino"), "--dino", file)
    side = net.patch_embed.img_size[0]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    seen: list[Tensor] = []
    qkv = getattr(net.blocks[-1].attn, "qkv", None)
    if not isinstance(qkv, nn.Linear) or qkv.out_features != 3 * net.embed_dim:
        raise UsageError(f"--dino {file}: the last block of {model} has no layer that gives queries, keys "
                         f"and values of {net.embed_dim} channels each, in this version of timm "
                         f"({timm.__version__})")
    # (1, tokens, 3 width), all heads in each
    qkv.register_forward_hook(lambda module, inputs, out: seen.append(out))

    def similarities(picture: Tensor) -> Tensor:
        seen.clear()
        net((F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True,
                           align_corners=False) - mean) / std)
        keys = F.normalize(seen[0].chunk(3, dim=-1)[1][0], dim=-1)              # (tokens, width)
        return keys @ keys.T

    return lambda a, b: F.mse_loss(similarities(b), similarities(a)).item()
