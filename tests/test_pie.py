"""PIE-Bench: its masks and prompts, its figures as the authors compute them and over the kept pixels, and the command."""
import json
import math

import open_clip
import pytest
import timm
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.models import squeezenet1_1

from benchmarks.pie_shaped import make
from p2p import UsageError
from p2p.cli.parser import main
from p2p.lists import metrics, pie_data

pytestmark = pytest.mark.usefixtures("once")
NONE = metrics.Judges()


def measured(picture, made, edited, text, judges, official):
    convention = metrics.CONVENTIONS[not official]
    return metrics.measure(picture, made, {convention: edited}, text, judges)[convention]


@pytest.fixture
def pictures():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 24, 32, generator=g)
    return a, (a + 0.2 * torch.randn(a.shape, generator=g)).clamp(0, 1)


def test_masks_are_runs_of_pixels_and_their_border_counts():
    runs = [0, 3, 14, 2, 34, 100]                                                    # the last one is longer than the picture
    plain = pie_data.mask(runs, 6, 6, border=False)
    assert plain.flatten().nonzero()[:, 0].tolist() == [0, 1, 2, 14, 15, 34, 35]
    assert pie_data.runs(plain) == [0, 3, 14, 2, 34, 2] and torch.equal(pie_data.mask(pie_data.runs(plain), 6, 6, border=False), plain)
    official = pie_data.mask(runs, 6, 6)
    assert official.sum() == 20 + 2 and official[0].all() and official[:, -1].all() and not official[3, 1:-1].any()
    assert pie_data.runs(torch.zeros(4, 4, dtype=torch.bool)) == [] and pie_data.runs(torch.ones(4, 4, dtype=torch.bool)) == [0, 16]


def test_official_figures_are_those_of_the_whole_blackened_frame(pictures):
    a, b = pictures
    edited = torch.zeros(24, 32, dtype=torch.bool)
    edited[4:12, 6:20] = True
    m = measured(a, b, edited, "", NONE, official=True)
    x, y = a * ~edited, b * ~edited
    assert m["PSNR"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.0).item(), abs=1e-4)
    assert m["SSIM"] == pytest.approx(structural_similarity_index_measure(y, x, data_range=1.0).item(), abs=1e-6)
    assert m["MSE"] == pytest.approx((x - y).square().mean().item(), rel=1e-5)
    assert m["LPIPS"] is m["structure"] is m["CLIP whole"] is m["CLIP edited"] is None


def test_corrected_figures_do_not_depend_on_the_size_of_the_mask(pictures):
    """The same error in every kept pixel: officially halving the kept area halves MSE, corrected it stays."""
    a = torch.full((1, 3, 16, 16), 0.5)
    b, half, none = a + 0.1, torch.zeros(16, 16, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)
    half[:8] = True
    official, corrected = ([measured(a, b, m, "", NONE, o)["MSE"] for m in (none, half)] for o in (True, False))
    assert official == pytest.approx([0.01, 0.005]) and corrected == pytest.approx([0.01, 0.01])
    b[..., :8, :] = 0                                                                # what was edited does not matter
    assert measured(a, b, half, "", NONE, False)["MSE"] == pytest.approx(0.01)


@pytest.mark.parametrize("official", [True, False])
def test_masks_of_everything_and_of_nothing(pictures, official):
    a, b = pictures
    judges = metrics.Judges(clip=metrics.Embedder(lambda x: x.mean((2, 3)), lambda texts: torch.ones(len(texts), 3)))
    everything, nothing = torch.ones(24, 32, dtype=torch.bool), torch.zeros(24, 32, dtype=torch.bool)
    m = measured(a, b, everything, "", judges, official)
    assert all(math.isnan(m[c]) for c in ("PSNR", "MSE", "SSIM")) and m["CLIP edited"] == m["CLIP whole"]
    m = measured(a, b, nothing, "", judges, official)
    assert m["MSE"] == pytest.approx((a - b).square().mean().item(), rel=1e-5) and math.isnan(m["CLIP edited"])


def test_judges_are_known_by_what_their_files_hold(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "copy")]
    for file, content in zip(files, (b"one", b"two", b"one")):
        file.write_bytes(content)
    one, two, copy = (metrics.Judges(files=(file,)).identity() for file in files)
    assert one == copy != two and len(one) == 16 and metrics.Judges().identity() is None
    assert len({metrics.Judges(files=each).identity() for each in ((), tuple(files[:2]), tuple(files[1::-1]))} | {one}) == 4


def test_intervals_leave_out_what_is_no_number():
    mean, half, n = metrics.interval([1.0, 3.0, float("nan"), None, float("inf")])
    assert (mean, n) == (2.0, 2) and half == pytest.approx(1.96 * 2**0.5 / 2**0.5)
    assert metrics.interval([None, float("nan")]) is None


def test_lpips_reads_the_networks_file(pictures, tmp_path):
    torch.manual_seed(0)
    net = squeezenet1_1()
    torch.save(net.state_dict(), tmp_path / "squeezenet.pth")
    f = metrics.lpips(tmp_path / "squeezenet.pth")
    big = [torch.nn.functional.interpolate(x, scale_factor=4.0) for x in pictures]
    near, far = f(big[0], big[0] + 0.01, False), f(*big, False)
    assert f(*big, True).shape == (96, 128) and f(big[0], big[0], True).abs().max() < 1e-6 and far > near > 0
    assert far == pytest.approx(f(*big, True).mean().item(), rel=0.2)
    torch.save({k: v for k, v in net.state_dict().items() if "features.3" not in k}, tmp_path / "part.pth")
    with pytest.raises(UsageError, match="features.3"):
        metrics.lpips(tmp_path / "part.pth")
    (tmp_path / "not.pth").write_text("no weights")
    with pytest.raises(UsageError, match="cannot be read"):
        metrics.lpips(tmp_path / "not.pth")


@pytest.mark.slow
def test_structure_is_the_distance_of_dinos_keys(pictures, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.pth")
    f = metrics.structure(tmp_path / "vit.pth", "vit_tiny_patch16_224")
    assert f(pictures[0], pictures[0]) == 0 < f(*pictures) and f(*pictures) == pytest.approx(f(*pictures[::-1]))


@pytest.mark.slow
def test_clip_is_a_hundred_times_the_cosine(pictures, tmp_path):
    torch.manual_seed(0)
    net = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    clip, edited = metrics.clip(tmp_path / "clip.pt", "ViT-S-32-alt"), torch.zeros(24, 32, dtype=torch.bool)
    edited[:10] = True
    cat, dog = (measured(*pictures, edited, text, metrics.Judges(clip=clip), False) for text in ("a cat", "a dog"))
    a, b = clip.pictures(pictures[1]), clip.texts(["a cat"])
    assert cat["CLIP whole"] == pytest.approx(100 * ((a / a.norm()) @ (b / b.norm()).T).item(), abs=1e-3)
    assert len({cat["CLIP whole"], cat["CLIP edited"], dog["CLIP whole"]}) == 3
    with pytest.raises(UsageError, match="--clip"):
        metrics.clip(tmp_path / "nofile.pt", "ViT-S-32-alt")


@pytest.mark.slow
def test_the_command_runs_methods_over_a_folder(tmp_path, capsys):
    make(tmp_path / "pie", 4)
    mapping = json.loads((tmp_path / "pie" / "mapping_file.json").read_text())
    first = next(iter(mapping.values()))
    first["original_prompt"] = first["original_prompt"].replace("a ", "a [", 1) + "]"   # as the benchmark marks its words
    (tmp_path / "pie" / "annotation_images" / list(mapping.values())[-1]["image_path"]).unlink()
    (tmp_path / "pie" / "mapping_file.json").write_text(json.dumps(mapping))
    command = ["eval", "pie", "--data", str(tmp_path / "pie"), "--out", str(tmp_path / "out"), "--methods", "direct,noise",
               "--editors", "p2p,masactrl", "--steps", "2", "-q"]
    assert main(command) == 1                                                        # a picture is missing
    out, err = capsys.readouterr()
    assert out.count("| direct |") == out.count("| noise, masactrl |") == 2 and "Absent, for want of weights: structure" in out
    assert "| 3 | 1 |" in out and "no such file" in err
    report = json.loads((tmp_path / "out" / "pie.json").read_text())
    assert len(report["direct"]["official"]["PSNR"]) == 3 and "LPIPS" not in report["direct"]["official"]
    again = (tmp_path / "out" / "pie.md").read_text()
    assert main(command) == 1 and (tmp_path / "out" / "pie.md").read_text() == again


ENTRY = '{"%s": {"image_path": "%s", "original_prompt": "a", "editing_prompt": "b", "mask": []}}'


@pytest.mark.parametrize("content, said", [(None, "no such file"), ("{}", "names no picture"), ('{"1": {"mask": []}}', "mapping"),
                                           ("[1]", "mapping"), ("nonsense", "mapping"), (ENTRY % ("a\\rb", "a.png"), "cannot be printed"),
                                           *((ENTRY % ("a", path), "is no path") for path in ("", "a\\u0000.png"))])
def test_other_folders_are_refused(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "mapping_file.json").write_text(content)
    assert main(["eval", "pie", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
