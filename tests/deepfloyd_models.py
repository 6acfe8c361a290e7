"""Small models of DeepFloyd IF as diffusers writes them: a stage I, its upscaler, and T5."""
import json

import tokenizers
import torch
from oracles import diffusers, transformers

THEIRS = dict(
    sample_size=32, layers_per_block=1, block_out_channels=(32, 64, 128), in_channels=3, out_channels=6, cross_attention_dim=64,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    encoder_hid_dim=32, attention_head_dim=8, addition_embed_type="text", addition_embed_type_num_heads=2,
    cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", act_fn="gelu")
THEIR_UPSCALER = THEIRS | dict(
    in_channels=6, layers_per_block=(1, 2, 1), class_embed_type="timestep", mid_block_scale_factor=1.414,
    time_embedding_act_fn="gelu", time_embedding_dim=48, resnet_skip_time_act=True, resnet_out_scale_factor=2**0.5)


def randomised(module):
    """No weight at a zero or one of initialisation, which would hide what it multiplies."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g) + (p.ndim == 1))
    return module.eval()


def t5(folder, suffix="", width=32):
    """A small T5 and a tokenizer of the same kind: pieces, spaces written as "▁", </s> at the end, padding 0."""
    words = "a cat dog big red on grass hip po pot am us , !".split()
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0), *(("▁" + w, -1.0) for w in words), *((w, -2.0) for w in words)]
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    found.decoder = tokenizers.decoders.Metaspace()
    found.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / f"tokenizer{suffix}")
    tower = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    randomised(tower).save_pretrained(folder / f"text_encoder{suffix}")
    return tower, fast


def scheduler(most):
    return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
                                   dynamic_thresholding_ratio=0.95, sample_max_value=most)


def saved(root):
    """Writes both into a folder.  -> (stage I, its upscaler)"""
    for name, config, kind in (("one", THEIRS, "IFPipeline"), ("two", THEIR_UPSCALER, "IFSuperResolutionPipeline")):
        folder = root / name
        randomised(diffusers.UNet2DConditionModel(**config)).save_pretrained(folder / "unet")
        scheduler(1.5 if name == "one" else 1.0).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        t5(folder)
    return root / "one", root / "two"
