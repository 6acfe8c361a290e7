"""The official figures are the formulas of PnPInversion's `evaluation/matrics_calculator.py` and `evaluate.py`, written out."""
import math

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.regression import MeanSquaredError
from torchvision import transforms
from torchvision.models import squeezenet1_1
from transformers import CLIPImageProcessor

from p2p import UsageError
from p2p.lists import metrics, pie_data

VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small networks with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), folder / "squeezenet.pth")
    torch.save(timm.create_model(VIT, num_classes=0).state_dict(), folder / "vit.pth")
    torch.save(open_clip.create_model("ViT-S-32-alt", pretrained=None).state_dict(), folder / "clip.pt")
    return folder


@pytest.fixture(scope="module")
def judges(files):
    return metrics.Judges(metrics.lpips(files / "squeezenet.pth"), metrics.clip(files / "clip.pt", "ViT-S-32-alt"),
                          metrics.structure(files / "vit.pth", VIT))


@pytest.fixture(scope="module")
def pictures():
    """Two pictures of 8 bits, (H, W, 3), and the runs of a mask."""
    rng = np.random.default_rng(0)
    a = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((96, 96), Image.BICUBIC))
    b = np.clip(a + 40.0 * rng.standard_normal((96, 96, 3)), 0, 255).astype(np.uint8)
    return a, b, [v for row in range(20, 60) for v in (row * 96 + 30, 40)]


def evaluator(files, judges, a, b, mask, source, target):
    """The published calculation, from arrays of 8 bits; the mask (H, W, 3) of 0 and 1, its border 1."""
    def tensors(scale, m):
        return [torch.tensor(x.astype(np.float32) / scale * m).float().permute(2, 0, 1)[None] for x in (b, a)]

    vit = timm.create_model(VIT, num_classes=0).eval()
    vit.load_state_dict(torch.load(files / "vit.pth"))
    prepare = transforms.Compose([transforms.Resize(224, max_size=480),
                                  transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    @torch.no_grad()
    def keys_self_similarity(x):
        found = []
        hook = vit.blocks[11].attn.qkv.register_forward_hook(lambda m, i, out: found.append(out))
        vit(prepare(x))
        hook.remove()
        heads = vit.blocks[11].attn.num_heads
        keys = found[0].reshape(-1, 3, heads, vit.embed_dim // heads).permute(1, 2, 0, 3)[1]      # (h, tokens, d)
        keys = keys.transpose(0, 1).reshape(keys.shape[1], -1)
        norms = keys.norm(dim=1, keepdim=True)
        return keys @ keys.T / torch.clamp(norms @ norms.T, min=1e-8)

    lpips = _LPIPS(net="squeeze", pnet_rand=True).eval()
    names = {name: "features." + name.split(".", 2)[2] for name in lpips.net.state_dict()}
    squeezenet = torch.load(files / "squeezenet.pth", weights_only=True)
    lpips.net.load_state_dict({name: squeezenet[n] for name, n in names.items()})
    net, tokenizer = open_clip.create_model("ViT-S-32-alt", pretrained=str(files / "clip.pt")).eval(), open_clip.get_tokenizer(
        "ViT-S-32-alt")
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})

    @torch.no_grad()
    def clip(x, text):
        seen = net.encode_image(processor(Image.fromarray(x), return_tensors="pt")["pixel_values"])
        return max(100 * F.cosine_similarity(seen, net.encode_text(tokenizer([text]))).item(), 0.0)

    out = {"clip_similarity_source_image": clip(a, source), "clip_similarity_target_image": clip(b, target),
           "clip_similarity_target_image_edit_part": clip(np.uint8(b * mask), target)}
    for suffix, m in (("", np.ones_like(mask)), ("_unedit_part", 1 - mask), ("_edit_part", mask)):
        if m.sum() == 0:
            out |= {name + suffix: math.nan for name in ("psnr", "lpips", "mse", "ssim", "structure_distance")}
            continue
        pred, gt = tensors(255, m)
        out["psnr" + suffix] = PeakSignalNoiseRatio(data_range=1.0)(pred, gt).item()
        out["ssim" + suffix] = StructuralSimilarityIndexMeasure(data_range=1.0)(pred, gt).item()
        out["mse" + suffix] = MeanSquaredError()(pred.contiguous(), gt.contiguous()).item()
        out["lpips" + suffix] = lpips(pred, gt, normalize=True).item()
        pred, gt = tensors(1, m)                                                          # 0..255, not 0..1
        out["structure_distance" + suffix] = F.mse_loss(keys_self_similarity(pred), keys_self_similarity(gt)).item()
    return out


def asked(judges, a, b, masks, source="a cat", target="a dog on grass"):
    picture, made = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255 for x in (a, b))
    return metrics.measure(picture, made, masks, target, judges, source)


@pytest.mark.slow
@pytest.mark.parametrize("edited", ["part", "everything", "nothing"])
def test_official_figures_are_the_evaluators(files, judges, pictures, edited):
    a, b, runs = pictures
    runs = {"part": runs, "everything": [0, 96 * 96], "nothing": []}[edited]
    mask = pie_data.mask(runs, 96, 96)
    wanted = evaluator(files, judges, a, b, mask.numpy()[..., None].repeat(3, 2).astype(np.float64), "a cat", "a dog on grass")
    found = {metrics.NAMES[k]: v for k, v in asked(judges, a, b, {"official": mask})["official"].items()}
    assert set(found) == set(wanted) and len(found) == 18
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=0.05 if "clip" in name else 1e-7, nan_ok=True), name


@pytest.mark.slow
def test_the_official_structure_has_the_evaluators_slip_and_the_corrected_one_has_not(judges, pictures):
    a, b, runs = pictures
    found = asked(judges, a, b, {"official": pie_data.mask(runs, 96, 96), "corrected": pie_data.mask(runs, 96, 96, border=False)})
    x, y = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 for p in (a, b))
    assert found["official"]["structure"] == pytest.approx(judges.structure(255 * x, 255 * y), rel=1e-5)
    assert found["corrected"]["structure"] == pytest.approx(judges.structure(x, y), rel=1e-5)
    assert abs(found["official"]["structure"] / found["corrected"]["structure"] - 1) > 0.05


@pytest.mark.slow
def test_corrected_parts_do_not_see_what_lies_outside_them(judges, pictures):
    a, b, runs = pictures
    edited = pie_data.mask(runs, 96, 96, border=False)
    other = np.where(edited.numpy()[..., None], 255 - b, b)
    one, two = (asked(judges, a, x, {"corrected": edited})["corrected"] for x in (b, other))
    for name in ("PSNR", "MSE", "SSIM", "LPIPS", "structure kept"):
        assert one[name] == two[name]
    assert one["MSE edited"] != two["MSE edited"] and one["structure edited"] != two["structure edited"]


def test_networks_of_another_shape_are_refused(tmp_path, monkeypatch):
    """Keys are a third of what one layer gives; where they are kept apart that would be some other distance."""
    def apart(*given, real=timm.create_model, **said):
        net = real(*given, **said)
        net.blocks[-1].attn.qkv = torch.nn.Linear(net.embed_dim, net.embed_dim)
        return net

    monkeypatch.setattr(timm, "create_model", apart)
    torch.save(apart(VIT, num_classes=0).state_dict(), tmp_path / "apart.pth")
    with pytest.raises(UsageError, match="queries, keys and values of 192"):
        metrics.structure(tmp_path / "apart.pth", VIT)


def test_clip_similarity_sees_the_whole_picture():
    """Both sides squeezed, as in InstructPix2Pix's `ClipSimilarity`: nothing is cropped."""
    x = torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(metrics.squeezed(x, 8), F.interpolate(x, (8, 8), mode="bicubic", align_corners=False))
    assert metrics.shortest(x, 8).shape == (1, 3, 8, 8) and not torch.allclose(metrics.shortest(x, 8), metrics.squeezed(x, 8), atol=0.1)
