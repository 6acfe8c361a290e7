"""How an edit is judged on PIE-Bench: the published columns, as its authors compute them and over the kept pixels alone.

Official (Ju et al. 2023, `evaluation/`): what was edited is blackened in both pictures and the figure is that of the whole
frame, so a large mask flatters it; a mask that covers everything gives no number. Corrected: the mean over the kept pixels.
Figures are plain: the published table multiplies structure and LPIPS by 10^3, MSE by 10^4 and SSIM by 10^2.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2p.errors import UsageError
from weights.errors import CheckpointError
from weights.files import open_file

CONVENTIONS = ("official", "corrected")
COLUMNS = ("structure", "PSNR", "LPIPS", "MSE", "SSIM", "CLIP whole", "CLIP edited")
# Two pictures (1, 3, H, W) in 0..1 -> one number, as the metric averages itself; or, if asked, where it lies, (H, W)
Metric = Callable[[Tensor, Tensor, bool], Tensor]


def torchmetrics():
    try:
        import torchmetrics.functional.image as found
    except ImportError:
        raise UsageError('the metrics need torchmetrics: pip install "prompt-to-prompt[eval]"') from None
    return found


class Embedder(NamedTuple):
    """A space that pictures and texts share."""

    pictures: Callable[[Tensor], Tensor]          # (B, 3, H, W) in 0..1 -> (B, D)
    texts: Callable[[Sequence[str]], Tensor]      # B texts -> (B, D)


@dataclass(frozen=True)
class Judges:
    """What is read from weights; None where they were not given: the column is then absent."""

    lpips: Metric | None = None
    clip: Embedder | None = None
    structure: Callable[[Tensor, Tensor], float] | None = None


def measure(picture: Tensor, made: Tensor, masks: Mapping[str, Tensor], text: str,
            judges: Judges) -> dict[str, dict[str, float | None]]:
    """One item: pictures (1, 3, H, W) in 0..1, the source and its edit; what was edited (H, W) bool, by convention; text: the
    edited prompt.  -> columns by convention

    Columns of missing weights are None, figures that do not exist (no pixel was kept, none was edited) NaN.
    """
    structure = judges.structure and judges.structure(picture, made)
    clip: list[float] = []                                               # of the whole, and of what each mask leaves
    if judges.clip is not None:
        seen = judges.clip.pictures(torch.cat([made, *(made * edited for edited in masks.values())]))
        clip = (100 * F.cosine_similarity(seen, judges.clip.texts([text]))).tolist()
    found = {}
    for i, (convention, edited) in enumerate(masks.items(), 1):
        out: dict[str, float | None] = dict.fromkeys(COLUMNS) | {"structure": structure}
        for name, f in (("MSE", _mse), ("SSIM", _ssim), ("LPIPS", judges.lpips)):
            if f is not None:
                out[name] = _kept(f, picture, made, (~edited).float(), convention == "official")
        out["PSNR"] = -10 * torch.tensor(out["MSE"]).log10().item()      # of equal pictures: infinite, as torchmetrics says
        if clip:
            out["CLIP whole"], out["CLIP edited"] = clip[0], clip[i] if edited.any() else float("nan")
        found[convention] = out
    return found


def _kept(f: Metric, picture: Tensor, made: Tensor, kept: Tensor, official: bool) -> float:
    if not kept.any():
        return float("nan")
    if official:
        return f(picture * kept, made * kept, False).item()
    return ((f(picture, torch.where(kept > 0, made, picture), True) * kept).sum() / kept.sum()).item()


def _mse(a: Tensor, b: Tensor, where: bool) -> Tensor:
    error = (a - b).square()
    return error.mean(1)[0] if where else error.mean()


def _ssim(a: Tensor, b: Tensor, where: bool) -> Tensor:
    whole, full = torchmetrics().structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    return full.mean(1)[0] if where else whole   # the whole leaves the frame out, where windows reach beyond the picture


def interval(values: Sequence[float | None]) -> tuple[float, float, int] | None:
    """Mean, half-width of its 95 % confidence interval, and of how many: what is not finite is left out. None: nothing is left."""
    finite = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    finite = finite[finite.isfinite()]
    if not len(finite):
        return None
    half = 1.96 * finite.std().item() / len(finite) ** 0.5 if len(finite) > 1 else float("nan")
    return finite.mean().item(), half, len(finite)


# ------------------------------------------------------------------------------------------------ judges from weights

def _weights(file: Path, what: str) -> dict[str, Tensor]:
    """A state dict, of a .safetensors file or a pickle."""
    try:
        found = open_file(file)
        return {k: found[k] for k in found.shapes}
    except CheckpointError as error:
        raise UsageError(f"{what} {file}: cannot be read ({error})") from None


def _filled(module: nn.Module, state: dict[str, Tensor], what: str, file: Path) -> nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{what} {file}: {str(error).splitlines()[0]} {str(error).splitlines()[-1].strip()}") from None
    return module.eval().requires_grad_(False)


def lpips(squeezenet: Path) -> Metric:
    """LPIPS on SqueezeNet, as PIE-Bench uses it; the file: torchvision's squeezenet1_1. The rest comes with torchmetrics."""
    torchmetrics()
    from torchmetrics.functional.image.lpips import _LPIPS
    net = _LPIPS(net="squeeze", pnet_rand=True, spatial=True)
    state = _weights(squeezenet, "--lpips")
    names = {name: "features." + name.split(".", 2)[2] for name in net.net.state_dict()}      # slices.1.3.squeeze.weight
    missing = [n for n in names.values() if n not in state]
    if missing:
        raise UsageError(f"--lpips {squeezenet}: not torchvision's squeezenet1_1 ({missing[0]} is missing)")
    _filled(net.net, {own: state[n] for own, n in names.items()}, "--lpips", squeezenet)

    def distance(a: Tensor, b: Tensor, where: bool) -> Tensor:
        net.spatial = where
        return net(2 * a - 1, 2 * b - 1).squeeze()

    return distance


def clip(file: Path, model: str = "ViT-L-14-quickgelu") -> Embedder:
    """CLIP; the file: open_clip's weights of that model (OpenAI's ViT-L/14)."""
    import open_clip
    state = {k.removeprefix("module."): v for k, v in _weights(file, "--clip").items()}
    net, tokenizer = open_clip.create_model(model), open_clip.get_tokenizer(model)
    net = _filled(net, state, "--clip", file)
    side = net.visual.image_size[0] if isinstance(net.visual.image_size, tuple) else net.visual.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def pictures(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return net.encode_image((x - mean) / std)

    return Embedder(pictures, lambda texts: net.encode_text(tokenizer(list(texts))))


def structure(file: Path, model: str = "vit_base_patch8_224.dino") -> Callable[[Tensor, Tensor], float]:
    """Distance of the self-similarities of DINO's keys (Tumanyan et al. 2022, as PIE-Bench uses it); the file: timm's weights."""
    import timm  # open_clip needs it too

    net = timm.create_model(model, pretrained=False, num_classes=0)
    net = _filled(net, _weights(file, "--dino"), "--dino", file)
    side = net.patch_embed.img_size[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    seen: list[Tensor] = []
    net.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out))

    def similarities(picture: Tensor) -> Tensor:
        seen.clear()
        net((F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True, align_corners=False) - mean) / std)
        keys = F.normalize(seen[0].chunk(3, dim=-1)[1][0], dim=-1)              # (tokens, width)
        return keys @ keys.T

    return lambda a, b: F.mse_loss(similarities(a), similarities(b)).item()
