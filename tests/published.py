"""Configs as the published models have them: those fields that they have, leftovers of old versions among them."""

LATENT_SCHEDULE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
                   "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}
UNET = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4}
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
       "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512}
CLIP_L = {"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
          "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
          "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
          "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
          "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
          "vocab_size": 49408}
CLIP_H = CLIP_L | {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                   "num_hidden_layers": 23, "projection_dim": 512}
CLIP_G = CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
                   "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
                   "torch_dtype": "float16", "transformers_version": "4.32.0.dev0"}
TOKENIZER = {"add_prefix_space": False, "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False,
                                                      "normalized": True, "rstrip": False, "single_word": False},
             "do_lower_case": True, "errors": "replace", "model_max_length": 77, "name_or_path": "openai/clip-vit-large-patch14",
             "pad_token": "<|endoftext|>", "special_tokens_map_file": "./special_tokens_map.json", "tokenizer_class":
             "CLIPTokenizer", "clean_up_tokenization_spaces": True}
INDEX = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "scheduler": ["diffusers", "PNDMScheduler"],
         "feature_extractor": ["transformers", "CLIPImageProcessor"], "text_encoder": ["transformers", "CLIPTextModel"],
         "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "tokenizer": ["transformers", "CLIPTokenizer"],
         "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
SD1 = {
    "model_index.json": INDEX,
    "unet/config.json": UNET | {
        "_diffusers_version": "0.6.0", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae/config.json": VAE | {"_diffusers_version": "0.6.0"},
    "text_encoder/config.json": CLIP_L,
    "tokenizer/tokenizer_config.json": TOKENIZER,
    "tokenizer/special_tokens_map.json": {"pad_token": "<|endoftext|>"},
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0"} | LATENT_SCHEDULE,
}
SD21 = SD1 | {
    "model_index.json": INDEX | {"_diffusers_version": "0.8.0", "scheduler": ["diffusers", "DDIMScheduler"],
                                 "safety_checker": [None, None], "requires_safety_checker": False},
    "unet/config.json": SD1["unet/config.json"] | {
        "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
        "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96,
        "upcast_attention": True, "use_linear_projection": True},
    "vae/config.json": VAE | {"_diffusers_version": "0.10.0.dev0", "sample_size": 768},
    "text_encoder/config.json": CLIP_H,
    "tokenizer/special_tokens_map.json": {"pad_token": "!"},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0",
                                        "prediction_type": "v_prediction"} | LATENT_SCHEDULE,
}
EULER = {"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "use_karras_sigmas": False}
SD_TURBO = SD21 | {
    "model_index.json": SD21["model_index.json"] | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]},
    "unet/config.json": SD21["unet/config.json"] | {
        "_diffusers_version": "0.24.0.dev0", "_name_or_path": "unet", "addition_embed_type": None,
        "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None, "attention_type": "default",
        "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "cross_attention_norm": None, "dropout": 0.0, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
        "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default", "reverse_transformer_layers_per_block": None, "sample_size": 64,
        "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type":
        "positional", "timestep_post_act": None, "transformer_layers_per_block": 1, "upcast_attention": None},
    "vae/config.json": VAE | {"_diffusers_version": "0.24.0.dev0", "force_upcast": True, "scaling_factor": 0.18215},
    "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0",
                                        "sigma_max": None, "sigma_min": None, "timestep_spacing": "trailing",
                                        "timestep_type": "discrete", "use_karras_sigmas": False} | EULER | LATENT_SCHEDULE,
}
SDXL = {
    "model_index.json": INDEX | {
        "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0.dev0", "force_zeros_for_empty_prompt": True,
        "add_watermarker": None, "scheduler": ["diffusers", "EulerDiscreteScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None], "text_encoder_2":
        ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"]},
    "unet/config.json": SD_TURBO["unet/config.json"] | {
        "_diffusers_version": "0.19.0.dev0", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
    "vae/config.json": VAE | {"_diffusers_version": "0.20.0.dev0", "_name_or_path": "../sdxl-vae/", "force_upcast": True,
                              "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder/config.json": CLIP_L | {"torch_dtype": "float16"},
    "text_encoder_2/config.json": CLIP_G,
    "tokenizer/tokenizer_config.json": TOKENIZER, "tokenizer/special_tokens_map.json": {"pad_token": "<|endoftext|>"},
    "tokenizer_2/tokenizer_config.json": TOKENIZER | {"pad_token": "!"}, "tokenizer_2/special_tokens_map.json":
    {"pad_token": {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}},
    "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0",
                                        "timestep_spacing": "leading"} | EULER | LATENT_SCHEDULE,
}
SDXL_TURBO = SDXL | {
    "model_index.json": SDXL["model_index.json"] | {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]},
    "scheduler/scheduler_config.json": SDXL["scheduler/scheduler_config.json"] | {
        "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}}
IF_SCHEDULE = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.16.0.dev0", "beta_end": 0.02, "beta_schedule":
               "squaredcos_cap_v2", "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0,
               "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000, "prediction_type": "epsilon",
               "sample_max_value": 1.5, "thresholding": True, "trained_betas": None, "variance_type": "learned_range"}
IF = {
    "model_index.json": {
        "_class_name": "IFPipeline", "_diffusers_version": "0.16.0.dev0", "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True, "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "scheduler": ["diffusers", "DDPMScheduler"], "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"]},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.16.0.dev0", "act_fn": "gelu", "addition_embed_type": "text",
        "addition_embed_type_num_heads": 64, "attention_head_dim": 64, "block_out_channels": [192, 384, 576, 768],
        "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
        "conv_out_kernel": 3, "cross_attention_dim": 768, "cross_attention_norm": "group_norm", "down_block_types":
        ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3, "downsample_padding": 1, "dual_cross_attention": False,
        "encoder_hid_dim": 4096, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 3, "layers_per_block": 3,
        "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": None, "only_cross_attention": False, "out_channels": 6,
        "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "scale_shift", "sample_size": 64, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
        "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None, "up_block_types":
        ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"], "upcast_attention": False, "use_linear_projection": False},
    "scheduler/scheduler_config.json": IF_SCHEDULE,
}
IF_UPSCALER = IF | {
    "model_index.json": IF["model_index.json"] | {"_class_name": "IFSuperResolutionPipeline",
                                                  "image_noising_scheduler": ["diffusers", "DDPMScheduler"]},
    "unet/config.json": IF["unet/config.json"] | {
        "block_out_channels": [128, 256, 512, 1024], "class_embed_type": "timestep", "cross_attention_dim": 1024, "in_channels": 6,
        "layers_per_block": [2, 4, 6, 6], "mid_block_scale_factor": 1.414213562373095, "only_cross_attention": [True] * 4,
        "resnet_out_scale_factor": 1.414213562373095, "resnet_skip_time_act": True, "sample_size": 256,
        "time_embedding_act_fn": "gelu", "time_embedding_dim": 1024},
    "image_noising_scheduler/scheduler_config.json": IF_SCHEDULE | {"thresholding": False, "variance_type": "fixed_small"},
    "scheduler/scheduler_config.json": IF_SCHEDULE | {"sample_max_value": 1.0},
}
MODELS = {"sd1": SD1, "sd2.1": SD21, "sd-turbo": SD_TURBO, "sdxl": SDXL, "sdxl-turbo": SDXL_TURBO, "if": IF, "if upscaler": IF_UPSCALER}
T5XXL = {"architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
         "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
         "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
         "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24, "output_past": True, "pad_token_id": 0,
         "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
         "torch_dtype": "float16", "transformers_version": "4.41.2", "use_cache": True, "vocab_size": 32128}
VAE_16 = VAE | {"_diffusers_version": "0.29.0.dev0", "force_upcast": True, "latent_channels": 16, "latents_mean": None, "latents_std": None,
                "mid_block_add_attention": True, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
                "use_post_quant_conv": False, "use_quant_conv": False}
CLIP_L_PROJECTED = CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float16"}
SD3_MEDIUM = {
    "model_index.json": {
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.29.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
    "transformer/config.json": {
        "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0", "attention_head_dim": 64,
        "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24,
        "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128},
    "vae/config.json": VAE_16, "text_encoder/config.json": CLIP_L_PROJECTED, "text_encoder_2/config.json": CLIP_G,
    "text_encoder_3/config.json": T5XXL, "tokenizer/tokenizer_config.json": TOKENIZER,
    "tokenizer_2/tokenizer_config.json": TOKENIZER | {"pad_token": "!"},
    "tokenizer_3/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "model_max_length": 512},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0",
                                        "num_train_timesteps": 1000, "shift": 3.0}}
SD35_LARGE = SD3_MEDIUM | {"transformer/config.json": SD3_MEDIUM["transformer/config.json"] | {
    "caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm"}}
SD35_MEDIUM = SD3_MEDIUM | {
    "transformer/config.json": SD3_MEDIUM["transformer/config.json"] | {
        "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"},
    "scheduler/scheduler_config.json": SD3_MEDIUM["scheduler/scheduler_config.json"] | {
        "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 4096, "max_shift": 1.15,
        "shift_terminal": None, "use_beta_sigmas": False, "use_dynamic_shifting": False, "use_exponential_sigmas": False,
        "use_karras_sigmas": False}}
FLUX_DEV = {
    "model_index.json": {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]},
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev/transformer",
        "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
        "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768},
    "vae/config.json": VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder/config.json": CLIP_L, "text_encoder_2/config.json": T5XXL, "tokenizer/tokenizer_config.json": TOKENIZER,
    "tokenizer_2/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "model_max_length": 512},
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "base_image_seq_len": 256,
        "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": True}}
FLUX_SCHNELL = FLUX_DEV | {
    "transformer/config.json": FLUX_DEV["transformer/config.json"] | {"guidance_embeds": False},
    "scheduler/scheduler_config.json": FLUX_DEV["scheduler/scheduler_config.json"] | {"shift": 1.0, "use_dynamic_shifting": False}}
FLOWS = {"3 medium": SD3_MEDIUM, "3.5 large": SD35_LARGE, "3.5 medium": SD35_MEDIUM, "dev": FLUX_DEV, "schnell": FLUX_SCHNELL}
