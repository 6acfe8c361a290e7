"""DeepFloyd IF, the paper's kind of backbone: both stages against diffusers, sizes, and edits through its hybrid attention."""
from dataclasses import replace

import pytest
import torch
from oracles import attention_processor, diffusers

from models.attention import Record
from models.blocks import AddedAttention
from models.unet import UNet, UNetConfig, deepfloyd

TINY = UNetConfig(
    in_channels=3, out_channels=6, channels=(32, 64, 128), layers_per_block=1, down_attention=(None, "added", "added"),
    mid_attention="added", up_attention=(None, "added", "added"), depth=(1, 1, 1), heads=(4, 8, 16), context_dim=64, act="gelu",
    scale_shift=True, resample="residual", text_dim=32, pool_heads=2)
UPSCALER = replace(
    TINY, layers_per_block=(1, 2, 1), low_channels=3, out_scale=2**0.5, mid_scale=1.414, skip_time_act=True, time_act="gelu",
    temb_dim=48)
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


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.std()


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("norm_text", [False, True])
def test_attention_is_theirs(text_only, norm_text):
    """Theirs puts the text's columns first, ours last: the same softmax."""
    theirs = randomised(attention_processor.Attention(
        query_dim=64, cross_attention_dim=64, heads=4, dim_head=16, added_kv_proj_dim=96, norm_num_groups=32, bias=True,
        only_cross_attention=text_only, cross_attention_norm="group_norm" if norm_text else None, cross_attention_norm_num_groups=32,
        processor=attention_processor.AttnAddedKVProcessor()))
    ours = AddedAttention(64, 96, 4, text_only, norm_text)
    ours.load_state_dict(theirs.state_dict())
    x, text = torch.randn(2, 64, 3, 5), torch.randn(2, 7, 96)
    with torch.no_grad():
        got, maps = ours(x, text, record=Record(text=15))
        close(got, theirs(x, encoder_hidden_states=text))
    assert maps["attn1"].shape == (2, 4, 15, 7)
    sums = maps["attn1"].sum(-1)
    assert (sums - 1).abs().max() < 1e-6 if text_only else sums.max() < 1   # the rest lies on the pixels


@pytest.mark.parametrize("ours, theirs", [
    (TINY, THEIRS), (UPSCALER, THEIR_UPSCALER),
    (replace(UPSCALER, down_attention=(None, "added text", "added text"), mid_attention="added text",
             up_attention=(None, "added text", "added text"), norm_text=False),
     THEIR_UPSCALER | dict(only_cross_attention=True, cross_attention_norm=None))],
    ids=["stage one", "upscaler", "upscaler, text alone"])
def test_unet_is_theirs(ours, theirs):
    theirs = randomised(diffusers.UNet2DConditionModel(**theirs))
    unet = UNet(ours).eval()
    unet.load_state_dict(theirs.state_dict())
    g = torch.Generator().manual_seed(1)
    x, low, text = (torch.randn(3, *s, generator=g) for s in ((3, 16, 24), (3, 16, 24), (7, 32)))
    t, level = torch.tensor([0, 500, 999]), torch.tensor([250, 0, 3])
    with torch.no_grad():
        if ours.low_channels:
            close(unet(x, t, text, low=low, level=level)[0], theirs(torch.cat([x, low], 1), t, text, class_labels=level).sample)
        else:
            close(unet(x, t, text)[0], theirs(x, t, text).sample)


@pytest.mark.parametrize("width, parameters", [(192, 371_605_830), (320, 935_365_830), (704, 4_304_695_110)], ids=["M", "L", "XL"])
def test_stage_one_at_full_size(width, parameters):
    with torch.device("meta"):
        state = UNet(deepfloyd(width)).state_dict()
        theirs = diffusers.UNet2DConditionModel(**THEIRS | dict(
            layers_per_block=3, block_out_channels=[width * m for m in (1, 2, 3, 4)], cross_attention_dim=4 * width,
            down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3), encoder_hid_dim=4096,
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"), attention_head_dim=64,
            addition_embed_type_num_heads=64))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert len(state) == 775 and sum(v.numel() for v in state.values()) == parameters
