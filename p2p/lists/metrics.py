"""How an edit is judged on PIE-Bench: all that its authors' evaluator computes, as it does and over
the pixels meant alone.

Official (Ju et al. 2023, `evaluation/matrics_calculator.py`): what a figure is not about is blackened in both
pictures and the figure is that of the whole frame, so a large mask flatters what was kept; a part without
pixels gives no number. Structure is that of pictures in 0..255 under ImageNet's normalisation, which is made
for 0..1. Corrected: the mean over the part's pixels; structure of pictures in 0..1, the made one with the
source's pixels outside the part. Figures are plain: the published table multiplies structure and LPIPS by
10^3, MSE by 10^4 and SSIM by 10^2.
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
    """A figure's name here; the published table shows the structure of the whole and all else
    of what was kept."""
    return metric if part == ("whole" if metric == "structure" else "kept") else f"{metric} {part}"


# All figures, and the names that the authors' evaluator gives them
NAMES = {label(metric, part): name + suffix
         for part, suffix in (("whole", ""), ("kept", "_unedit_part"), ("edited", "_edit_part"))
         for metric, name in (("structure", "structure_distance"), ("PSNR", "psnr"), ("LPIPS", "lpips"),
                              ("MSE", "mse"), ("SSIM", "ssim"))} | {
    "CLIP source": "clip_similarity_source_image", "CLIP whole": "clip_similarity_target_image",
    "CLIP edited": "clip_similarity_target_image_edit_part"}
# Two pictures (1, 3, H, W) in 0..1 -> one number, as the metric averages itself; or, if asked,
# where it lies, (H, W)
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
    sha256: str | None = None                     # of the file that it was read from


@dataclass(frozen=True)
class Judges:
    """What is read from weights; None where they were not given: the column is then absent."""

    lpips: Metric | None = None
    clip: Embedder | None = None
    structure: Callable[[Tensor, Tensor], float] | None = None
    # that all of these were read from; None: unknown, so no figure of theirs is kept
    files: tuple[Path, ...] | None = None

    def identity(self) -> str | None:
        """Of the networks: a hash of their files."""
        if self.files is None:
            return None
        return hashlib.sha256(" ".join(str(digest.sha256(f)) for f in self.files).encode()).hexdigest()[:16]


def measure(picture: Tensor, made: Tensor, masks: Mapping[str, Tensor], text: str, judges: Judges,
            source: str = "") -> dict[str, dict[str, float | None]]:
    """One item: pictures (1, 3, H, W) in 0..1, the source and its edit; what was edited (H, W) bool, by
    convention; the prompts of both, the edited one first.  -> NAMES by convention

    Figures of missing weights are None, those that do not exist (no pixel was kept, none was edited) NaN.
    """
    clip: list[float] = []   # of the source, of the edit, and of what each mask leaves of it
    if judges.clip is not None:
        seen = judges.clip.pictures(torch.cat([picture, made, *(made * edited for edited in masks.values())]))
        said = judges.clip.texts([source, text])
        clip = (100 * F.cosine_similarity(seen, torch.cat([said, said[1:].expand(len(masks), -1)]))).tolist()
    found = {}
    for i, (convention, edited) in enumerate(masks.items(), 2):
        official = convention == "official"
        out: dict[str, float | None] = dict.fromkeys(NAMES)
        for part, pixels in (("whole", torch.ones_like(edited)), ("kept", ~edited), ("edited", edited)):
            for name, f in (("MSE", _mse), ("SSIM", _ssim), ("LPIPS", judges.lpips)):
                if f is not None:
                    out[label(name, part)] = _of_part(f, picture, made, pixels.float(), official)
            # of equal pictures: infinite
            out[label("PSNR", part)] = -10 * torch.tensor(out[label("MSE", part)]).log10().item()
            if judges.structure is not None:
                out[label("structure", part)] = _structure(judges.structure, picture, made, pixels, official)
        if clip:
            figures = (clip[0], clip[1], clip[i] if edited.any() else float("nan"))
            for name, value in zip(("CLIP source", "CLIP whole", "CLIP edited"), figures):
                # torchmetrics shows no negative score
                out[name] = max(value, 0.0) if official and value == value else value
        found[convention] = out
    return found


def _of_part(f: Metric, picture: Tensor, made: Tensor, part: Tensor, official: bool) -> float:
    if not part.any():
        return float("nan")
    if official:
        return f(picture * part, made * part, False).item()
    return ((f(picture, torch.where(part > 0, made, picture), True) * part).sum() / part.sum()).item()


def _structure(f: Callable[[Tensor, Tensor], float], picture: Tensor, made: Tensor, part: Tensor,
               official: bool) -> float:
    if not part.any():
        return float("nan")
    if official:
        return f(255 * picture * part, 255 * made * part)
    return f(picture, torch.where(part, made, picture))


def _mse(a: Tensor, b: Tensor, where: bool) -> Tensor:
    error = (a - b).square()
    return error.mean(1)[0] if where else error.mean()


def _ssim(a: Tensor, b: Tensor, where: bool) -> Tensor:
    whole, full = torchmetrics().structural_similarity_index_measure(a, b, data_range=1.0,
                                                                     return_full_image=True)
    # the whole leaves the frame out, where windows reach beyond the picture
    return full.mean(1)[0] if where else whole


def interval(values: Sequence[float | None]) -> tuple[float, float, int] | None:
    """Mean, half-width of its 95 % confidence interval, and of how many: what is not finite is left out.
    None: nothing is left."""
    finite = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    finite = finite[finite.isfinite()]
    if not len(finite):
        return None
    half = 1.96 * finite.std().item() / len(finite) ** 0.5 if len(finite) > 1 else float("nan")
    return finite.mean().item(), half, len(finite)


# ---------------------------------------------------------------------------------------- judges from weights

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
        said = str(error).splitlines()
        raise UsageError(f"{what} {file}: {said[0]} {said[-1].strip()}") from None
    return module.eval().requires_grad_(False)


def lpips(squeezenet: Path) -> Metric:
    """LPIPS on SqueezeNet, as PIE-Bench uses it; the file: torchvision's squeezenet1_1. The rest comes
    with torchmetrics."""
    torchmetrics()
    from torchmetrics.functional.image.lpips import _LPIPS
    net = _LPIPS(net="squeeze", pnet_rand=True, spatial=True)
    state = _weights(squeezenet, "--lpips")
    # slices.1.3.squeeze.weight
    names = {name: "features." + name.split(".", 2)[2] for name in net.net.state_dict()}
    missing = [n for n in names.values() if n not in state]
    if missing:
        raise UsageError(f"--lpips {squeezenet}: not torchvision's squeezenet1_1 ({missing[0]} is missing)")
    _filled(net.net, {own: state[n] for own, n in names.items()}, "--lpips", squeezenet)

    def distance(a: Tensor, b: Tensor, where: bool) -> Tensor:
        net.spatial = where
        return net(2 * a - 1, 2 * b - 1).squeeze()

    return distance


def shortest(x: Tensor, side: int) -> Tensor:
    """Pictures in 0..1 as CLIP's own processor hands them over: the shorter side scaled (bicubic, 8 bits),
    the middle cropped."""
    h, w = x.shape[2:]
    size = [int(side * n / min(h, w)) for n in (h, w)]
    x = (255 * F.interpolate(x, size=size, mode="bicubic", antialias=True,
                             align_corners=False)).round().clamp(0, 255) / 255
    top, left = ((n - side) // 2 for n in size)
    return x[..., top:top + side, left:left + side]


def squeezed(x: Tensor, side: int) -> Tensor:
    """As InstructPix2Pix's `ClipSimilarity` does: both sides scaled, bicubic without antialiasing."""
    return F.interpolate(x.float(), size=(side, side), mode="bicubic", align_corners=False)


def clip(file: Path, model: str = "ViT-L-14-quickgelu",
         prepare: Callable[[Tensor, int], Tensor] = shortest) -> Embedder:
    """CLIP; the file: open_clip's weights of that model (OpenAI's ViT-L/14). prepare: (B, 3, H, W) in 0..1,
    and the side that the network takes -> its input, before it is normalised."""
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
    qkv.register_forward_hook(lambda module, given, out: seen.append(out))

    def similarities(picture: Tensor) -> Tensor:
        seen.clear()
        net((F.interpolate(picture, size=(side, side), mode="bilinear", antialias=True,
                           align_corners=False) - mean) / std)
        keys = F.normalize(seen[0].chunk(3, dim=-1)[1][0], dim=-1)              # (tokens, width)
        return keys @ keys.T

    return lambda a, b: F.mse_loss(similarities(b), similarities(a)).item()
