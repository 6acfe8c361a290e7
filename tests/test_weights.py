"""Loading: what fits is loaded as stored; what does not says what was found and what to do."""
import json
import struct
from copy import deepcopy
from functools import partial
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError
from p2p.model import tiled
from p2p.models import cpu
from p2p.weights import files
from p2p.weights.files import open_file


def saved(tensors, path, **metadata):
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path, metadata or None)
    return path


def test_sizes_come_from_shapes(sd1, sd1_tensors):
    """A narrow model of the Stable Diffusion 1 structure: every size read off the file, every tensor in its place."""
    assert sd1.family == "sd1" and sd1.prediction == "eps" and sd1.guidance_scale == 7.5
    assert sd1.unet.config.channels == (32, 64, 128, 128) and sd1.unet.config.heads == (8,) * 4
    assert sd1.text(["a cat"]).shape == (1, 77, 128)
    t = sd1_tensors
    assert torch.equal(sd1.unet.state_dict()["up_blocks.0.upsamplers.0.conv.weight"],
                       t["model.diffusion_model.output_blocks.2.1.conv.weight"].float())
    assert torch.equal(sd1.vae.state_dict()["decoder.up_blocks.0.resnets.0.conv1.weight"],
                       t["first_stage_model.decoder.up.3.block.0.conv1.weight"].float())
    p = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn."
    assert torch.equal(sd1.text_encoders[0].state_dict()["transformer.resblocks.1.attn.in_proj_weight"],
                       torch.cat([t[p + f"{x}_proj.weight"] for x in "qkv"]).float())


def test_no_parameter_stays_on_the_meta_device(sd1, emoji):
    for model in (sd1, emoji):
        parts = [model.unet, *model.text_encoders] + ([model.vae] if model.vae else [])
        for tensor in (t for p in parts for t in p.state_dict().values()):
            assert tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64)


def test_kernels_and_what_comes_out_are_contiguous(sd1):
    x, context, picture = torch.randn(2, 4, 8, 8), sd1.text(["a cat", "a dog"]), torch.rand(2, 3, 64, 64)
    for module, call in ((sd1.unet, lambda m: m(x, 500, context)[0]), (sd1.vae, lambda m: m.decode(x)),
                         (sd1.vae, lambda m: m.encode(picture)[0])):
        assert all(p.is_contiguous() for p in module.parameters())
        got = call(module)
        assert got.is_contiguous() or got[:1].is_contiguous()                          # the mean is half of the channels


@pytest.mark.slow
@torch.no_grad()
def test_a_call_is_as_exact_as_contiguous_convolutions_of_aten(sd1, emoji, monkeypatch):
    """Rounding against double precision, beside ATen's own layers as diffusers calls them; kernels with their channels last, which
    stood here before, were nearly twice as far off."""
    for model, side in ((sd1, 16), (emoji, 64)):
        g = torch.Generator().manual_seed(0)
        x, context = torch.randn(2, model.unet.config.in_channels, side, side, generator=g), model.text(["a cat", "a dog"])
        exact = deepcopy(model.unet).double()(x.double(), 500, context.double())[0]

        def error(net, x=x, context=context, exact=exact):
            return (net(x, 500, context)[0] - exact).square().mean().sqrt().item()

        ours = error(model.unet)
        with monkeypatch.context() as m:
            m.setattr(cpu, "ONEDNN", False)
            aten = error(model.unet)
        assert ours <= 1.5 * aten


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_was_read_of_a_file_is_let_go(suffix, sd1_tensors, tmp_path, monkeypatch):
    """Its pages would count as memory beside the copies; a file that is read again gives the same tensors."""
    path = tmp_path / f"m{suffix}"
    torch.save(dict(sd1_tensors), path) if suffix == ".ckpt" else saved(sd1_tensors, path)
    file = open_file(path)
    opened, module, name = [], *((files.mmap, "mmap") if suffix == ".ckpt" else (files, "safe_open"))
    of = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: opened.append(1) or of(*a, **k))
    monkeypatch.setattr(files._MappedFile, "RESIDENT", 2**20)
    for key, tensor in sd1_tensors.items():
        assert torch.equal(file[key], tensor)
    size = sum(t.nbytes for t in sd1_tensors.values())
    assert 1 < len(opened) <= size / 2**20


@pytest.mark.slow
def test_weights_wait_in_half_precision(sd1_file, sd1):
    """The file holds halves, so widening them layer by layer gives the very same pictures."""
    held = p2p.load(sd1_file, device="cpu", dtype=torch.float32, held=torch.float16)
    sizes = [sum(p.numel() * p.element_size() for p in m.unet.parameters()) for m in (sd1, held)]
    assert held.dtype == torch.float32 and sizes[1] < 0.52 * sizes[0]
    runs = [p2p.edit(m, "a cat", "a dog", steps=2, height=64, width=64).latents for m in (sd1, held)]
    assert torch.equal(*runs)
    with pytest.raises(p2p.UsageError, match="shorter"):
        p2p.load(sd1_file, device="cpu", dtype=torch.float16, held=torch.float16)


@pytest.mark.slow
def test_idle_parts_wait_on_the_cpu(sd1_file, sd1, monkeypatch):
    """Each comes to the device, works, and goes back; the pictures are the same."""
    model, moves, to = p2p.load(sd1_file, device="cpu", dtype=torch.float32, offload=True), [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moves.append((type(self).__name__, str(where))) or to(self, where))
    r = p2p.generate(model, "a cat", steps=1, height=64, width=64)
    assert moves[:2] == [("TextEncoder", str(model.device)), ("TextEncoder", "cpu")]
    assert moves[-2:] == [("AutoencoderKL", str(model.device)), ("AutoencoderKL", "cpu")]
    assert torch.equal(r.latents, p2p.generate(sd1, "a cat", steps=1, height=64, width=64).latents)


@pytest.mark.slow
def test_pictures_are_decoded_in_tiles(sd1_file, sd1):
    z = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    small, large = (p2p.load(sd1_file, device="cpu", dtype=torch.float32, tile=tile) for tile in (8, 64))
    torch.testing.assert_close(large.decode(z), sd1.decode(z))
    assert small.decode(z).shape == sd1.decode(z).shape
    enlarge = partial(torch.nn.functional.interpolate, scale_factor=8.0)
    torch.testing.assert_close(tiled(enlarge, z, tile=8, scale=8), enlarge(z))       # nothing but the autoencoder makes a seam
    calls = count()
    numbered = tiled(lambda x: torch.full((1, 1, 8 * x.shape[2], 8 * x.shape[3]), float(next(calls))), torch.zeros(1, 4, 8, 14), tile=8, scale=8)
    row = numbered[0, 0, 0]   # of two tiles: each alone, and from one to the other without a step where they overlap
    assert (row[:48] == 0).all() and (row[64:] == 1).all() and 0 < row.diff().max() < 0.1 and (row.diff() >= 0).all()
    with pytest.raises(p2p.UsageError, match="tile"):
        p2p.load(sd1_file, tile=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_as_asked(sd1_file, dtype):
    model = p2p.load(sd1_file, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.unet.parameters()} == {dtype} and model.text(["a cat"]).dtype == dtype


@pytest.mark.slow
def test_ignored_extras_and_the_files_own_schedule(sd1_tensors, tmp_path):
    """Schedule tables, averaged twins and position_ids do not disturb; alphas_cumprod is taken from the file."""
    abar = torch.linspace(0.99, 0.01, 1000)
    extra = {"alphas_cumprod": abar, "betas": abar, "model_ema.decay": torch.tensor(0.5), "logvar": abar,
             "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    model = p2p.load(saved(sd1_tensors | extra, tmp_path / "m.safetensors"), device="cpu")
    assert torch.equal(model.alphas_cumprod, abar.double())


def changed(tensors, **changes):
    return {k: v for k, v in (tensors | changes).items() if v is not None}


UNET_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
BREAKS = {
    "1 missing.*middle_block.1.norm.weight": {"model.diffusion_model.middle_block.1.norm.weight": None},
    "1 missing.*encoder.down.0.block.0.conv2.weight": {"first_stage_model.encoder.down.0.block.0.conv2.weight": None},
    "1 unexpected.*input_blocks.1.0.bogus": {"model.diffusion_model.input_blocks.1.0.bogus": torch.zeros(1)},
    "1 unexpected.*lora_a": {"lora_a": torch.zeros(1)},
    "time_embed.0.weight is .128, 31., expected .128, 32.": {"model.diffusion_model.time_embed.0.weight": torch.zeros(128, 31)},
    "time_embed.0.weight holds values that are not finite": {
        "model.diffusion_model.time_embed.0.weight": torch.full((128, 32), float("nan"))},
    "an inpainting model": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
    "knows 100 tokens": {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(100, 128)},
    "no autoencoder found": {"first_stage_model.encoder.conv_in.weight": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("message", BREAKS)
def test_a_file_that_does_not_fit_says_why(sd1_tensors, tmp_path, message):
    path = saved(changed(sd1_tensors, **BREAKS[message]), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        p2p.load(path, family="sd1", device="cpu")
    assert str(path) in str(error.value)


def test_wrong_text_width(sd1_tensors, tmp_path):
    p = "cond_stage_model.transformer.text_model."
    narrow = {k: v[..., :64] if k.startswith(p) and v.shape[-1] == 128 else v for k, v in sd1_tensors.items()}
    with pytest.raises(CheckpointError, match="width 128.*gives 64|does not fit"):
        p2p.load(saved(narrow, tmp_path / "m.safetensors"), device="cpu")


FILES = {
    "a web page": b"<!DOCTYPE html><html>", "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "but a PyTorch pickle": b"PK\x03\x04" + bytes(100),
    "rename it to m.ckpt": b"\x80\x02}q\x00.", "neither a safetensors file nor": b"hello",
    "0 bytes": b"", "no UNet, no autoencoder": struct.pack("<Q", 2) + b"{}",
    "damaged or cut short": struct.pack("<Q", 10**6) + b"{",
}


@pytest.mark.parametrize("message", FILES)
def test_foreign_files_are_named(tmp_path, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(FILES[message])
    with pytest.raises(CheckpointError, match=message):
        p2p.load(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.9999])
def test_truncated_file(sd1_file, tmp_path, keep):
    data = sd1_file.read_bytes()
    path = tmp_path / "m.safetensors"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="damaged or cut short.*bytes were found"):
        p2p.load(path)


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        p2p.load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="a folder"):
        p2p.load(tmp_path)


def test_wrong_family_is_refused(emoji, sd1_file):
    with pytest.raises(CheckpointError, match="asked to be read as sd1, but it is a model of the family emoji"):
        p2p.load(emoji.file, family="sd1")
    with pytest.raises(CheckpointError, match="family 'sd9'"):
        p2p.load(sd1_file, family="sd9")


def test_bundled_file_is_strict_too(emoji, tmp_path):
    tensors = load_file(emoji.file)
    with open(emoji.file, "rb") as f:
        metadata = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))["__metadata__"]
    tensors.pop("unet.conv_in.bias")
    with pytest.raises(CheckpointError, match=r"1 missing: unet.conv_in.bias"):
        p2p.load(saved(tensors, tmp_path / "e.safetensors", **metadata))
