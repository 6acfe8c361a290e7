"""Whole runs of Stable Diffusion 3 and FLUX, from the prompt to the last latents, beside diffusers' pipelines on small random models."""
import flow_models as made
import pytest
import torch
from oracles import diffusers
from PIL import Image

import p2p

pytestmark = pytest.mark.slow
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
           "max_image_seq_len": 4096}
SCHEDULERS = {"dev": DYNAMIC, "schnell": {"shift": 1.0}}
PROMPT, NEGATIVE = "a cat on grass", "a blurry dog"


def test_pictures_beyond_the_table_of_positions_are_refused(tmp_path):
    """Of Stable Diffusion 3 (here 12 x 12 tokens of 4 x 4 pixels); a picture's own size stays within it."""
    made.pipeline("3 medium", tmp_path / "towers").save_pretrained(tmp_path / "model")
    model = p2p.load(tmp_path / "model", device="cpu")
    with pytest.raises(p2p.UsageError, match="height must be a positive multiple of 4, not 52, and at most 48"):
        p2p.generate(model, PROMPT, steps=1, height=52, width=16)
    assert p2p.generate(model, PROMPT, steps=1, height=48, width=16).latents.shape[2:] == (24, 8)
    wide = p2p.invert(model, Image.new("RGB", (400, 40)), PROMPT, fit="own", steps=2)
    assert wide.picture.size[0] == 48


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("kind", ["3 medium", "3.5 medium", "3.5 large", "dev", "schnell"])
def test_a_run_is_that_of_diffusers(tmp_path, kind, height, width):
    pipe = made.pipeline(kind, tmp_path / "towers", SCHEDULERS.get(kind))
    pipe.save_pretrained(tmp_path / "model")
    model = p2p.load(tmp_path / "model", device="cpu")
    x = torch.randn(1, 16, height // 2, width // 2, generator=torch.Generator().manual_seed(0))
    said = dict(prompt=PROMPT, height=height, width=width, num_inference_steps=4, output_type="latent")
    if made.FAMILY[kind] == "sd3":
        scale, negative = 5.0, NEGATIVE
        wanted = pipe(**said, negative_prompt=negative, guidance_scale=scale, latents=x).images
    else:
        scale, negative = (3.5 if kind == "dev" else 1.0), None
        packed = diffusers.FluxPipeline._pack_latents(x, 1, 16, height // 2, width // 2)
        wanted = pipe(**said, guidance_scale=scale, latents=packed, max_sequence_length=512 if kind == "dev" else 256).images
        wanted = diffusers.FluxPipeline._unpack_latents(wanted, height, width, pipe.vae_scale_factor)
    r = p2p.generate(model, PROMPT, steps=4, guidance_scale=scale, negative_prompt=negative, x_T=x)
    assert (r.latents - wanted).abs().max() <= 1e-4 * wanted.std()
