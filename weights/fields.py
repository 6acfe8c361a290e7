"""Every field of every config in a diffusers folder: used, supported with some values alone, or known to
change nothing here.

Fields in none of these tables are refused by name, since they may change pixels; unless they are off (null,
false, 0, empty). Sources: the signatures and docstrings of diffusers 0.42 and transformers 5.24, and configs
as they were published.
"""
from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from p2p.weights.errors import CheckpointError


class Fields(NamedTuple):
    """The fields of one kind of config."""

    used: str                                     # names, read where the part is recognised
    supported: Mapping[str, tuple[Any, ...]]   # values that are computed as they ask (absent: the first one)
    idle: Mapping[str, str]                       # names -> why they change nothing here


ANY = {"_class_name _diffusers_version _name_or_path name_or_path transformers_version torch_dtype dtype "
       "_use_default_values": "say where the config comes from"}

UNET = Fields(
    "sample_size in_channels out_channels block_out_channels down_block_types up_block_types "
    "layers_per_block transformer_layers_per_block cross_attention_dim attention_head_dim "
    "num_attention_heads use_linear_projection upcast_attention addition_time_embed_dim "
    "projection_class_embeddings_input_dim time_cond_proj_dim",
    {
        "act_fn": ("silu",), "addition_embed_type": (None, "text_time"),
        "addition_embed_type_num_heads": (64,), "attention_type": ("default",),
        "center_input_sample": (False,), "class_embed_type": (None,), "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,), "conv_out_kernel": (3,), "cross_attention_norm": (None,),
        "downsample_padding": (1,), "dual_cross_attention": (False,), "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "mid_block_only_cross_attention": (None, False), "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",), "norm_eps": (1e-5,), "norm_num_groups": (32,),
        "num_class_embeds": (None,), "only_cross_attention": (False,), "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,), "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,), "time_embedding_type": ("positional",), "timestep_post_act": (None,),
        "_class_name": ("UNet2DConditionModel",),
    },
    {**ANY, "dropout": "acts in training alone"})

DEEPFLOYD_UNET = Fields(
    "sample_size in_channels out_channels block_out_channels down_block_types up_block_types "
    "layers_per_block cross_attention_dim attention_head_dim only_cross_attention "
    "mid_block_only_cross_attention encoder_hid_dim resnet_skip_time_act resnet_out_scale_factor "
    "mid_block_scale_factor time_embedding_dim addition_embed_type_num_heads",
    {
        "act_fn": ("gelu", "silu"), "addition_embed_type": ("text",), "attention_type": ("default",),
        "center_input_sample": (False,), "class_embed_type": (None, "timestep"),
        "class_embeddings_concat": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
        "cross_attention_norm": ("group_norm", None), "dual_cross_attention": (False,),
        "encoder_hid_dim_type": (None, "text_proj"), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",), "norm_eps": (1e-5,), "norm_num_groups": (32,),
        "num_attention_heads": (None,), "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("scale_shift", "default"), "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None, "gelu", "silu"), "time_embedding_type": ("positional",),
        "timestep_post_act": (None,), "upcast_attention": (False, None),
        "_class_name": ("UNet2DConditionModel",),
    },
    {**ANY, "dropout": "acts in training alone",
     "downsample_padding": "of convolutions between levels, which these blocks do not have",
     "use_linear_projection transformer_layers_per_block reverse_transformer_layers_per_block":
     "of transformer blocks, which these blocks do not have",
     "addition_time_embed_dim projection_class_embeddings_input_dim":
     "of embeddings that these types do not have"})

SD3 = Fields(
    "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads "
    "joint_attention_dim caption_projection_dim pooled_projection_dim out_channels pos_embed_max_size "
    "dual_attention_layers",
    {"qk_norm": (None, "rms_norm"), "_class_name": ("SD3Transformer2DModel",)}, ANY)

FLUX = Fields(
    "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
    "joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope",
    {"patch_size": (1,), "_class_name": ("FluxTransformer2DModel",)}, ANY)

VAE = Fields(
    "in_channels out_channels block_out_channels latent_channels layers_per_block scaling_factor "
    "down_block_types up_block_types shift_factor use_quant_conv use_post_quant_conv",
    {
        "act_fn": ("silu",), "norm_num_groups": (32,), "mid_block_add_attention": (True,),
        "latents_mean": (None,), "latents_std": (None,), "_class_name": ("AutoencoderKL",),
    },
    {**ANY, "sample_size": "of diffusers' tiles",
     "force_upcast": "SDXL's autoencoder runs in float32 here whatever it says"})

_TRANSFORMERS = {   # in any config of a text tower
    "architectures": "of the same tower; its projection is read where the family has one",
    "bos_token_id pad_token_id sep_token_id decoder_start_token_id": "belong to the tokenizer",
    "return_dict output_hidden_states output_attentions torchscript use_cache tie_word_embeddings "
    "problem_type id2label label2id finetuning_task task_specific_params":
    "of the form in which transformers gives its output",
    "max_length min_length num_beams num_beam_groups temperature top_k top_p typical_p repetition_penalty "
    "length_penalty num_return_sequences diversity_penalty": "of the generation of text"}

TEXT = Fields(
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
    "max_position_embeddings hidden_act vocab_size",
    {"layer_norm_eps": (1e-5,), "model_type": ("clip_text_model", "clip"), "eos_token_id": (49407, 2)},
    {**ANY, **_TRANSFORMERS, "attn_implementation": "of transformers' network, which is not used",
     "attention_dropout dropout initializer_factor initializer_range": "act in training alone"})

T5 = Fields(   # transformers' own network, which computes as the fields that are used here ask
    "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets "
    "relative_attention_max_distance layer_norm_epsilon feed_forward_proj is_gated_act dense_act_fn",
    {"model_type": ("t5",), "is_decoder": (False,)},
    {**ANY, **_TRANSFORMERS,
     "dropout_rate dropout classifier_dropout initializer_factor": "act in training alone",
     "num_decoder_layers is_encoder_decoder scale_decoder_outputs output_past":
     "of a decoder, which is not read",
     "eos_token_id": "belongs to the tokenizer",
     "n_positions": "of positions that are relative, so of any number"})

# Of a tokenizer the tokens are compared (its vocabulary), so that all other fields are of no concern.
TOKENIZER = Fields(
    "pad_token model_max_length added_tokens_decoder",
    {"tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast", None), "do_lower_case": (True,),
     "padding_side": ("right",), "truncation_side": ("right",), "bos_token": ("<|startoftext|>",),
     "eos_token": ("<|endoftext|>",), "add_bos_token": (True,), "add_eos_token": (True,),
     "additional_special_tokens": ([], None), "extra_special_tokens": ({}, [], None)}, {})

SCHEDULER = Fields(
    "_class_name beta_start beta_end beta_schedule trained_betas prediction_type timestep_spacing "
    "original_inference_steps timestep_scaling steps_offset set_alpha_to_one rescale_betas_zero_snr "
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value variance_type "
    "_few_steps",   # ours: diffusers ignores fields that begin with an underscore
    {"num_train_timesteps": (1000,), "timestep_type": ("discrete",), "use_flow_sigmas": (False,),
     "use_dynamic_shifting": (False,)},
    {**ANY, "tensor_format": "of diffusers before 0.3",
     "skip_prk_steps interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
     "use_lu_lambdas sigma_min sigma_max final_sigmas_type solver_order algorithm_type solver_type "
     "lower_order_final euler_at_final lambda_min_clipped predict_x0 disable_corrector solver_p "
     "noise_sampler_seed flow_shift shift_terminal time_shift_type "
     "corrector_order predictor_order tau_func":
     "of samplers in whose place DDIM samples, which a note says"})

FLOW_SCHEDULER = Fields(
    "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len _few_steps",
    {"_class_name": ("FlowMatchEulerDiscreteScheduler",), "num_train_timesteps": (1000,),
     "invert_sigmas": (False, None), "shift_terminal": (None,), "use_karras_sigmas": (False, None),
     "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None),
     "time_shift_type": ("exponential",), "stochastic_sampling": (False, None),
     "use_flow_sigmas": (False, None)}, ANY)

INDEX = Fields(
    "_class_name unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler "
    "force_zeros_for_empty_prompt",
    {},
    {**ANY,
     "safety_checker feature_extractor requires_safety_checker": "would blacken pictures; there is none here",
     "image_encoder": "is read for IP-Adapters alone",
     "watermarker add_watermarker": "marks finished pictures; not here",
     "image_noising_scheduler": "of super-resolution in IF: its betas are those of the scheduler"})

FLOW_INDEX = Fields(
    "_class_name transformer vae text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 "
    "tokenizer_3 scheduler",
    {}, {**ANY, "image_encoder feature_extractor": "are read for IP-Adapters alone"})

# Libraries and classes that the components of a model may be of, where model_index.json names them.
Classes = Mapping[str, tuple[str, tuple[str, ...]]]
_CLIP = ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
CLASSES = {
    "unet": ("diffusers", ("UNet2DConditionModel",)), "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel", "T5EncoderModel")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer": ("transformers", (*_CLIP[1], "T5Tokenizer", "T5TokenizerFast")), "tokenizer_2": _CLIP,
}

_T5 = {"encoder": ("transformers", ("T5EncoderModel",)),
       "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast",
                                      "TokenizersBackend"))}
_PROJECTED = CLASSES["text_encoder_2"]
FLOW_CLASSES: Mapping[str, Classes] = {
    "sd3": {"transformer": ("diffusers", ("SD3Transformer2DModel",)), "vae": CLASSES["vae"],
            "text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED, "text_encoder_3": _T5["encoder"],
            "tokenizer": _CLIP, "tokenizer_2": _CLIP, "tokenizer_3": _T5["tokenizer"]},
    "flux": {"transformer": ("diffusers", ("FluxTransformer2DModel",)), "vae": CLASSES["vae"],
             "text_encoder": ("transformers", ("CLIPTextModel",)), "text_encoder_2": _T5["encoder"],
             "tokenizer": _CLIP, "tokenizer_2": _T5["tokenizer"]},
}


def check(path: Path, config: Mapping[str, Any], fields: Fields, strangers: bool = False) -> None:
    """Raises CheckpointError for fields whose values or names are not known. strangers: ignores unknown
    names."""
    if (how := config.get("quantization_config")) is not None:
        method = how.get("quant_method") if isinstance(how, Mapping) else how
        raise CheckpointError(f"{path}: quantised ({short(method)}, by its quantization_config); use the "
                              "weights in 16 or 32 bits of the same model.")
    unknown = [f"{k} = {short(config[k])} (supported: {', '.join(map(short, v))})"
               for k, v in fields.supported.items()
               if k in config and not any(_same(config[k], x) for x in v)]
    known = {*fields.used.split(), *fields.supported, *" ".join(fields.idle).split()}
    unknown += [f"{k[:60]} = {short(v)} (not known)" for k, v in config.items() if not strangers and v
                and k not in known]
    if unknown:
        more = f"; and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(f"{path}: settings that this project does not know: {'; '.join(unknown[:5])}"
                              f"{more}. They may change the pictures.")


def _same(value: Any, known: Any) -> bool:
    return value == known and isinstance(value, bool) == isinstance(known, bool)


def short(value: Any) -> str:
    """An untrusted value in a message, cut to a few words."""
    form = reprlib.Repr()
    form.maxlist = form.maxtuple = form.maxdict = 6
    form.maxstring = form.maxother = 60
    return form.repr(value)


def listed(what: str, names: list[str], most: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}"
