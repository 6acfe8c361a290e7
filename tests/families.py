"""Small random models of every family, built by diffusers and transformers, and saved by them."""
import torch
from oracles import diffusers, transformers

WIDTH = {"sd1": 64, "sd2": 128, "sdxl": 64}
POOLED = 96


def randomised(module, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=g) * (1.0 if "token_embedding" in name else scale)
                    + (1 if p.ndim == 1 and name.endswith("weight") else 0))
    return module.eval()


def unet(family):
    common = dict(sample_size=8, layers_per_block=1, norm_num_groups=32)
    if family == "sd1":
        c = dict(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64)
    elif family == "sd2":
        c = dict(block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(1, 2), cross_attention_dim=128,
                 use_linear_projection=True)
    else:
        c = dict(block_out_channels=(64, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2), cross_attention_dim=64 + 128,
                 use_linear_projection=True, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                 addition_time_embed_dim=32, projection_class_embeddings_input_dim=POOLED + 6 * 32)
    return randomised(diffusers.UNet2DConditionModel(**common, **c), 1)


def vae():
    return randomised(diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, sample_size=16), 2)


def text(width, layers, act, projection=None):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64, hidden_act=act,
        projection_dim=projection or width, bos_token_id=49406, eos_token_id=49407)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return randomised(kind(config), 3 + layers)


def build(family):
    """Parts by the names of a diffusers folder."""
    parts = {"unet": unet(family), "vae": vae()}
    if family == "sd1":
        parts["text_encoder"] = text(64, 2, "quick_gelu")
    elif family == "sd2":
        parts["text_encoder"] = text(128, 2, "gelu")      # a single file would hold a third layer, unused
    else:
        parts["text_encoder"] = text(64, 2, "quick_gelu")
        parts["text_encoder_2"] = text(128, 3, "gelu", POOLED)
    return parts


def save(parts, folder, family, prediction="epsilon", **kw):
    """As `DiffusionPipeline.save_pretrained` lays it out, tokenizers apart."""
    import json

    for name, part in parts.items():
        part.save_pretrained(folder / name, **kw)
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                            set_alpha_to_one=False, prediction_type=prediction).save_pretrained(folder / "scheduler")
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, "unet": ["diffusers", "UNet2DConditionModel"]}))
    return folder
