"""Small random models of Stable Diffusion 3 and FLUX as diffusers saves them, text towers and tokenizers with them."""
import torch
from deepfloyd_models import t5
from families import POOLED, randomised, text
from oracles import diffusers, transformers

from p2p.weights.tokenizer import merges, vocabulary

WIDTH = 224   # of the text: more than both CLIP towers side by side
KINDS = {"3 medium": {}, "3.5 large": {"qk_norm": "rms_norm"}, "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
         "schnell": {"guidance_embeds": False}, "dev": {"guidance_embeds": True}}
FAMILY = {kind: "sd3" if kind[0] == "3" else "flux" for kind in KINDS}


def transformer(kind, **more):
    if FAMILY[kind] == "sd3":
        c = dict(sample_size=16, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH,
                 caption_projection_dim=64, pooled_projection_dim=64 + POOLED, out_channels=16, pos_embed_max_size=12)
        return randomised(diffusers.SD3Transformer2DModel(**c | KINDS[kind] | more), 5)
    c = dict(in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH,
             pooled_projection_dim=64, axes_dims_rope=(4, 4, 8))
    return randomised(diffusers.FluxTransformer2DModel(**c | KINDS[kind] | more), 6)


def vae(**more):
    c = dict(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
             layers_per_block=1, latent_channels=16, sample_size=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False,
             use_post_quant_conv=False)
    return randomised(diffusers.AutoencoderKL(**c | more), 2)


def clip_tokenizer(pad):
    return transformers.CLIPTokenizer(vocab=vocabulary(), merges=[tuple(m.split(" ")) for m in merges()], pad_token=pad,
                                      model_max_length=77)


def pipeline(kind, folder, scheduler=None, with_t5=True, **more):
    """diffusers' pipeline; T5 and its tokenizer lie in the folder already, under the names of Stable Diffusion 3."""
    tower, words = t5(folder / "t5", width=WIDTH) if with_t5 else (None, None)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**scheduler or {"shift": 3.0})
    common = dict(transformer=transformer(kind, **more), scheduler=scheduler, vae=vae(), tokenizer=clip_tokenizer("<|endoftext|>"))
    if FAMILY[kind] == "flux":
        return diffusers.FluxPipeline(text_encoder=text(64, 2, "quick_gelu"), text_encoder_2=tower, tokenizer_2=words, **common)
    return diffusers.StableDiffusion3Pipeline(
        text_encoder=text(64, 2, "quick_gelu", 64), text_encoder_2=text(128, 3, "gelu", POOLED), tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=tower, tokenizer_3=words, **common)


def same(a, b):
    """Whether two modules have the same tensors."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
