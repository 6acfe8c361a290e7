"""Configs of diffusers folders: published ones pass, and no field of any is passed over in silence."""
import inspect
import json
import shutil

import families
import numpy as np
import published
import pytest
import torch
from oracles import diffusers, transformers
from safetensors.torch import save_file

import p2p
from p2p import CheckpointError
from p2p.models.text import END, START, tokenizer
from p2p.request.schedules import ddim_schedule
from p2p.weights import fields, scheduler
from p2p.weights.convert import convert
from p2p.weights.detect import scaled_linear
from p2p.weights.load import find


def laid_out(folder, files, **changed):
    """Configs in their places, with weights of which the headers alone are asked. changed: of single files, None: gone."""
    for name, config in (files | changed).items():
        if config is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(config))
    for part in {name.split("/")[0] for name in files if name.endswith("/config.json")}:
        text = {"text_model.encoder.layers.0.layer_norm1.weight": torch.ones(1)}
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(text if part.startswith("text") else {"a": torch.ones(1)}, folder / part / f"{name}.safetensors")
    return folder


def changed(folder, file, **values):
    where = folder / file
    config = json.loads(where.read_text()) | values
    where.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


@pytest.mark.parametrize("name", published.MODELS)
def test_published_configs_are_taken_as_they_are(name, tmp_path):
    p = find(laid_out(tmp_path, published.MODELS[name]))
    s, want = p.sampling, dict(published.MODELS[name]["scheduler/scheduler_config.json"])
    assert p.prediction == ("v" if name == "sd2.1" else "eps")
    assert s.timestep_spacing == want.get("timestep_spacing", "leading") and s.offset == want.get("steps_offset", 0)
    assert s.clip == ((0.95, want["sample_max_value"]) if name.startswith("if") else None)
    assert (s.final_alpha is None) == (not name.startswith("if"))
    assert len(p.notes) == (0 if name in ("sd2.1", "if", "if upscaler") else 1)            # which sampler the folder names
    assert [t.config.pad_id for t in p.text] == {"sd1": [END], "sd2": [0], "sd-": [0], "sdx": [END, 0]}.get(name[:3], [])
    sides = {"sd1": 512, "sd2.1": 768, "sd-turbo": 512, "if": 64, "if upscaler": 256}
    assert p.size == (sides.get(name, 1024),) * 2


CLASSES = {"unet/config.json": [(fields.UNET, "UNet2DConditionModel"), (fields.DEEPFLOYD_UNET, "UNet2DConditionModel")],
           "vae/config.json": [(fields.VAE, "AutoencoderKL")],
           "scheduler": [(fields.SCHEDULER, name) for name in sorted(scheduler.ALIKE) if hasattr(diffusers, name)],
           "model_index.json": [(fields.INDEX, "StableDiffusionPipeline"), (fields.INDEX, "StableDiffusionXLPipeline"),
                                (fields.INDEX, "IFPipeline"), (fields.INDEX, "IFSuperResolutionPipeline")]}


@pytest.mark.parametrize("table, name", [x for each in CLASSES.values() for x in each], ids=lambda x: x if isinstance(x, str) else "")
def test_every_field_of_diffusers_is_in_a_table(table, name):
    """Used, supported with some values, or idle for a reason; and each in one of these alone."""
    kinds = [set(names) - {"_class_name"} for names in (table.used.split(), table.supported, " ".join(table.idle).split())]
    asked = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "args", "kwargs"}
    assert asked <= set().union(*kinds), asked - set().union(*kinds)
    assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])
    assert all(table.idle.values())


def test_every_field_of_transformers_is_in_a_table():
    asked = set(transformers.CLIPTextConfig().to_dict())
    known = {*fields.TEXT.used.split(), *fields.TEXT.supported, *" ".join(fields.TEXT.idle).split()}
    off = {k for k, v in transformers.CLIPTextConfig().to_dict().items() if not v}
    assert asked - off <= known


REFUSED = [   # file, field, value, what the message names
    ("unet/config.json", "colour", 3, "colour = 3 .not known"),
    ("unet/config.json", "mid_block_type", None, "a distilled network"), ("unet/config.json", "class_embed_type", "projection", "class_embed"),
    ("unet/config.json", "transformer_layers_per_block", [[0], [2, 2], [4, 4]], "a distilled network .SSD-1B"),
    ("unet/config.json", "addition_embed_type", "text_time", "addition_embed_type 'text_time' in a model of the family sd1"),
    ("unet/config.json", "_class_name", "UNet3DConditionModel", "UNet3D"), ("unet/config.json", "out_channels", 8, "out_channels"),
    ("vae/config.json", "_class_name", "AutoencoderTiny", "a tiny autoencoder"), ("vae/config.json", "shift_factor", 0.1, "shift_factor"),
    ("vae/config.json", "latents_mean", list(range(1000)), "latents_mean"), ("vae/config.json", "latent_channels", 16, "16 channels"),
    ("vae/config.json", "down_block_types", ["AttnDownEncoderBlock2D"], "AttnDown"), ("vae/config.json", "out_channels", 1, "gives 1"),
    ("text_encoder/config.json", "model_type", "bert", "model_type = 'bert'"),
    ("text_encoder/config.json", "layer_norm_eps", 1e-3, "layer_norm_eps"), ("text_encoder/config.json", "pruned_heads", {"0": [1]}, "pruned"),
    ("text_encoder/config.json", "vocab_size", 49409, "knows 49409 tokens"), ("text_encoder/config.json", "hidden_act", "relu", "'relu'"),
    ("tokenizer/tokenizer_config.json", "tokenizer_class", "BertTokenizer", "BertTokenizer"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 60, "model_max_length 60"),
    ("tokenizer/special_tokens_map.json", "pad_token", "[PAD]", "pads with .*PAD"),
    ("scheduler/scheduler_config.json", "_class_name", "EDMEulerScheduler", "EDM model"),
    ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler", "flow model"),
    ("scheduler/scheduler_config.json", "_class_name", "MyScheduler", "MyScheduler', which this project does not know"),
    ("scheduler/scheduler_config.json", "_class_name", 3, "3, which is no name"),
    ("scheduler/scheduler_config.json", "timestep_spacing", "uneven", "'uneven'; supported: leading, trailing, linspace"),
    ("scheduler/scheduler_config.json", "timestep_type", "continuous", "timestep_type"),
    ("scheduler/scheduler_config.json", "use_flow_sigmas", True, "use_flow_sigmas"),
    ("scheduler/scheduler_config.json", "trained_betas", [2.0] * 1000, "trained_betas"),
    ("scheduler/scheduler_config.json", "steps_offset", -1, "steps_offset"),
    ("scheduler/scheduler_config.json", "thresholding", True, "thresholding"),
    ("scheduler/scheduler_config.json", "beta_end", 0.0001, "no noise schedule"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 500, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", "warp", 9, "warp = 9"),
    ("model_index.json", "scheduler", ["diffusers", "EDMEulerScheduler"], "model_index.json: 'EDMEulerScheduler'.*EDM model"),
    ("model_index.json", "scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"], "model_index.json.*flow model"),
    ("model_index.json", "scheduler", ["my_module", ["X"]], "which is no name"),
    ("scheduler/scheduler_config.json", "set_alpha_to_one", "no", "set_alpha_to_one = 'no'; expected true or false"),
    ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", "yes", "rescale_betas_zero_snr = 'yes'"),
    ("scheduler/scheduler_config.json", "clip_sample", 1, "clip_sample = 1; expected true or false"),
    ("model_index.json", "force_zeros_for_empty_prompt", "no", "force_zeros_for_empty_prompt = 'no'"),
    ("unet/config.json", "use_linear_projection", "no", "use_linear_projection = 'no'"),
    ("unet/config.json", "upcast_attention", 0, "upcast_attention = 0"),
    ("unet/config.json", "cross_attention_dim", None, "unet/config.json: cross_attention_dim: null, where a size"),
    ("unet/config.json", "attention_head_dim", None, "attention_head_dim: null, where a size"),
    ("unet/config.json", "attention_head_dim", 3, "attention_head_dim = .3, .*: 3 heads of 320 channels"),
    ("vae/config.json", "latent_channels", None, "latent_channels: null"),
    ("vae/config.json", "scaling_factor", None, "scaling_factor: null"), ("vae/config.json", "scaling_factor", 0, "above 0"),
    ("text_encoder/config.json", "num_attention_heads", 7, "num_attention_heads = 7 does not divide hidden_size = 768"),
    ("text_encoder/config.json", "hidden_size", None, "text_encoder/config.json: hidden_size: null, where a size"),
    ("model_index.json", "unet", ["my_module", "MyUNet"], "MyUNet"), ("model_index.json", "controlnet", ["diffusers", "X"], "controlnet"),
    ("model_index.json", "text_encoder", ["transformers", "BertModel"], "BertModel"),
    ("model_index.json", "unet", ["my_module", "UNet2DConditionModel"], "'my_module'.*supported, of diffusers: UNet2D"),
    ("model_index.json", "vae", ["diffusers_modules.local", "AutoencoderKL"], "its vae is .*of diffusers: AutoencoderKL"),
    ("model_index.json", "vae", ["x", "diffusers", "AutoencoderKL"], "its vae is"), ("model_index.json", "vae", "AutoencoderKL", "its vae is"),
    ("model_index.json", "text_encoder", ["diffusers", "CLIPTextModel"], "of transformers: CLIPTextModel"),
    ("model_index.json", "text_encoder", [None, "CLIPTextModel"], "its text_encoder is .None"),
    ("model_index.json", "tokenizer", ["my_module", "CLIPTokenizer"], "of transformers: CLIPTokenizer"), ("model_index.json", "unet", 3, "is 3"),
    ("model_index.json", "scheduler", ["my_module", "DDIMScheduler"], "its scheduler is .'my_module'.*of diffusers"),
    ("model_index.json", "scheduler", "DDIMScheduler", "its scheduler is 'DDIM"), ("model_index.json", "scheduler", 3, "3, which is no name"),
    ("unet/config.json", "attention_head_dim", [8] * 5, "one for each of 4 levels"),
    ("unet/config.json", "transformer_layers_per_block", [1, 1], "transformer_layers_per_block = .1, 1.; one for each of 4"),
    ("unet/config.json", "layers_per_block", [2] * 3, "layers_per_block = .2, 2, 2.; one for each"),
    ("unet/config.json", "down_block_types", ["CrossAttnDownBlock2D"] * 3, "down_block_types = .*one for each of 4 levels"),
    ("unet/config.json", "up_block_types", ["CrossAttnUpBlock2D"] * 3, "up_block_types do not mirror"),
    ("unet/config.json", "down_block_types", 3, "down_block_types holds 3"),
]


@pytest.mark.parametrize("field, value, said", [
    ("only_cross_attention", "no", "only_cross_attention = 'no'"), ("only_cross_attention", [True, "no"], "true or false"),
    ("mid_block_only_cross_attention", "no", "true or false"), ("resnet_skip_time_act", "no", "true or false"),
    ("block_out_channels", None, "block_out_channels: null"), ("attention_head_dim", None, "attention_head_dim: null"),
    ("attention_head_dim", [64, 64], "one for each of 4 levels"), ("only_cross_attention", [True], "one for each of 4 levels"),
    ("down_block_types", ["ResnetDownsampleBlock2D"], "one for each of 4 levels"), ("up_block_types", ["X"] * 4, "block types X")])
def test_fields_of_if_have_their_types(tmp_path, field, value, said):
    with pytest.raises(CheckpointError, match=f"unet/config.json: .*{said}"):
        find(changed(laid_out(tmp_path, published.IF), "unet/config.json", **{field: value}))


@pytest.mark.slow
@pytest.mark.parametrize("file, field, value, said", REFUSED)
def test_what_changes_pixels_and_is_not_done_is_refused_by_name(tmp_path, file, field, value, said):
    folder = changed(laid_out(tmp_path, published.SD1), file, **{field: value})
    with pytest.raises(CheckpointError, match=said) as error:
        find(folder)
    assert len(str(error.value)) < 500                                           # never a thousand numbers


@pytest.mark.slow
def test_a_refiner_and_another_vocabulary_are_named(tmp_path):
    refiner = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
    with pytest.raises(CheckpointError, match="an SDXL refiner"):
        find(changed(laid_out(tmp_path / "r", published.SDXL), "unet/config.json", **refiner))
    folder = laid_out(tmp_path / "v", published.SD1)
    words = {{START: "<|startoftext|>", END: "<|endoftext|>"}.get(i, w): i for w, i in tokenizer().encoder.items()}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(dict(reversed(words.items()))))
    assert find(folder).family == "sd1"
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words | {"cat</w>": 1, "a": 2368}))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        find(folder)


# ---------------------------------------------------------------------------------------------------------------- scheduler

@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing):
    abar = scaled_linear()
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for steps in [*range(1, 101), 150, 200, 250, 333, 500, 999]:
        theirs.set_timesteps(steps)
        assert list(ddim_schedule(abar, steps, spacing=spacing).timesteps) == theirs.timesteps.tolist()[:steps], steps


def test_an_unknown_spacing_is_refused():
    with pytest.raises(p2p.UsageError, match="'uneven' is not known; known: leading, trailing, linspace"):
        ddim_schedule(scaled_linear(), 5, spacing="uneven")


SAID = [dict(timestep_spacing="trailing"), dict(timestep_spacing="linspace", set_alpha_to_one=True), dict(steps_offset=0),
        dict(set_alpha_to_one=...), dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        dict(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()), dict(beta_start=0.0005, beta_end=0.02)]


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    parts = families.build("sd1")
    return families.save(parts, tmp_path_factory.mktemp("sd1") / "folder", "sd1")


@pytest.mark.slow
@pytest.mark.parametrize("said", SAID)
def test_a_folder_is_sampled_as_its_scheduler_config_says(sd1_folder, tmp_path, said):
    """Read by diffusers' DDIMScheduler: timesteps, levels and predictions at every step count; and once more when converted."""
    folder = changed(shutil.copytree(sd1_folder, tmp_path / "m"), "scheduler/scheduler_config.json", **said)
    theirs, model = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler"), p2p.load(folder, device="cpu")
    theirs = diffusers.DDIMScheduler.from_config(theirs.config, steps_offset=1)   # as StableDiffusionPipeline does
    assert {"eps": "epsilon", "v": "v_prediction"}[model.prediction] == theirs.config.prediction_type
    for name in ("out", "out.safetensors"):
        convert(find(folder), tmp_path / name)
        again = p2p.load(tmp_path / name, device="cpu", prediction=model.prediction)
        one, other = again.schedule(7), model.schedule(7)
        assert one.timesteps == other.timesteps and np.allclose(one.levels, other.levels, rtol=0, atol=1e-9)
    for steps in (1, 4, 10, 50):
        theirs.set_timesteps(steps)
        ours = model.schedule(steps)
        assert list(ours.timesteps) == theirs.timesteps.tolist()
        levels = [theirs.alphas_cumprod[t].item() for t in ours.timesteps] + [float(theirs.final_alpha_cumprod)]
        assert [level.alpha**2 for level in ours.levels] == pytest.approx(levels, rel=2e-4, abs=1e-6)


@pytest.mark.slow
def test_a_run_of_a_trailing_folder_is_that_of_diffusers(sd1_folder, tmp_path):
    """Few steps from pure noise, as Turbo models are sampled: the pictures of a whole DDIM run are theirs."""
    folder = changed(shutil.copytree(sd1_folder, tmp_path / "m"), "scheduler/scheduler_config.json", timestep_spacing="trailing")
    model, theirs = p2p.load(folder, device="cpu"), diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    x = x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs.set_timesteps(4)
    context = model.text(["a cat"])
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(model.unet(x, int(t), context)[0], t, x).prev_sample
    got = p2p.generate(model, "a cat", steps=4, guidance_scale=0, x_T=x_T, height=16, width=16).latents
    assert (got - x).abs().max() < 1e-4 * x.std()


def test_empty_prompts_of_sdxl_are_zeros_only_where_its_index_says_so(tmp_path):
    for said in (True, False):
        folder = laid_out(tmp_path / str(said), published.SDXL)
        assert find(changed(folder, "model_index.json", force_zeros_for_empty_prompt=said)).zero_negative is said


@pytest.mark.slow
def test_an_empty_prompt_that_is_encoded_stays_so_when_converted(made, tmp_path):
    family, _, folder = made
    folder = changed(shutil.copytree(folder, tmp_path / "m"), "model_index.json", force_zeros_for_empty_prompt=False)
    for said in (False, True):
        changed(folder, "model_index.json", force_zeros_for_empty_prompt=said)
        for name in (f"{said}", f"{said}.safetensors"):
            convert(find(folder), tmp_path / name)
            assert find(tmp_path / name).zero_negative is (said and family == "sdxl")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("said", [..., 0.18215, 0.13025])
@pytest.mark.parametrize("where", ["own", "beside"])
def test_a_scale_of_latents_that_is_not_said_is_that_of_diffusers(tmp_path, name, said, where):
    """Also of an autoencoder given beside the model; and where it is not SDXL's usual one, that is noted."""
    folder = changed(laid_out(tmp_path / "m", published.MODELS[name]), "vae/config.json", scaling_factor=said)
    vae = folder / "vae" if where == "beside" else None
    theirs = diffusers.AutoencoderKL.from_config({k: v for k, v in json.loads((folder / "vae/config.json").read_text()).items()
                                                  if k == "scaling_factor"}).config.scaling_factor
    found = find(folder, vae=vae)
    assert found.latent_scale == theirs == (0.18215 if said is ... else said)
    assert any("0.13025 is usual" in n for n in found.notes) == (name == "sdxl" and theirs == 0.18215)


@pytest.mark.parametrize("own", [None, "DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("index", [None, "DDIMScheduler", "UniPCMultistepScheduler"])
def test_the_sampler_is_the_one_of_the_index(tmp_path, own, index):
    """As in diffusers, whatever class wrote the config. Where neither says, DDIM is nobody's guess."""
    folder = changed(laid_out(tmp_path, published.SD1), "scheduler/scheduler_config.json", _class_name=own or ...)
    changed(folder, "model_index.json", scheduler=["diffusers", index] if index else ...)
    used = index or own or "DDIMScheduler"
    assert find(folder).notes == ([] if used == "DDIMScheduler" else [f"the folder's sampler is {used}; DDIM samples here"])


def test_a_solver_without_a_bound_says_so_in_no_json(tmp_path):
    """diffusers writes -Infinity, the default of a field that changes nothing here; no other is read."""
    folder = laid_out(tmp_path, published.SD1)
    config = folder / "scheduler" / "scheduler_config.json"
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler):
        kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(config.parent)
        assert "-Infinity" in config.read_text() and find(folder).sampling.prediction == "eps"
    config.write_text(config.read_text().replace("0.012", "-Infinity"))
    with pytest.raises(CheckpointError, match="-Infinity is no finite number"):
        find(folder)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_what_the_index_denies_and_the_folder_holds_is_noted(tmp_path, name):
    folder = laid_out(tmp_path, published.SD1 | {"model_index.json": published.SD21["model_index.json"]})
    changed(folder, "scheduler/scheduler_config.json", _class_name="DDIMScheduler")
    assert not find(folder).notes
    for null in ([None, None], None):
        found = find(changed(folder, "model_index.json", **{name: null}))
        assert found.notes == [f"model_index.json names no {name} (null), but there is a folder of that name, which is used"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_offset_is_that_of_the_pipeline(tmp_path, family, offset):
    """Stable Diffusion 1 and 2 start at 1 whatever is said, as their pipeline has it; SDXL where its config says."""
    kinds = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
    theirs = diffusers.DDIMScheduler(steps_offset=offset)
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
    more = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False) if family == "sd1" else dict(
        text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    theirs = kinds[family](scheduler=theirs, **empty, **more).scheduler.config.steps_offset
    files = published.SD21 if family == "sd1" else published.SDXL
    found = find(changed(laid_out(tmp_path, files), "scheduler/scheduler_config.json", steps_offset=offset))
    assert found.sampling.offset == theirs
    assert any(f"not the scheduler config's {offset}" in n for n in found.notes) == (theirs != offset)


@pytest.mark.parametrize("version, side, used", [("0.6.0", 32, 64), ("0.8.1", [32, 32], 32), ("0.9.0", 32, 32), ("0.10.2", 32, 32)])
def test_the_size_is_that_of_the_pipeline(tmp_path, version, side, used):
    """StableDiffusionPipeline takes 64 for less, of UNets that diffusers before 0.9 saved."""
    folder = changed(laid_out(tmp_path, published.SD21), "unet/config.json", _diffusers_version=version, sample_size=side)
    assert find(folder).size == (8 * used,) * 2 and bool(find(folder).notes) == (used != 32)


@pytest.mark.slow
def test_a_size_that_is_not_square_is_kept_by_converting(sd1_folder, tmp_path):
    folder = changed(shutil.copytree(sd1_folder, tmp_path / "wide"), "unet/config.json", sample_size=[8, 12])
    convert(find(folder), tmp_path / "one.safetensors")
    convert(find(tmp_path / "one.safetensors"), tmp_path / "again")
    sizes = {find(place).size for place in (folder, tmp_path / "one.safetensors", tmp_path / "again")}
    assert len(sizes) == 1 and sizes.pop() == tuple(side * find(folder).vae.config.shrink for side in (8, 12))


@pytest.mark.slow
def test_sizes_that_do_not_fit_are_a_models_fault(tmp_path, made):
    """Whatever stumbles over them as the network is built."""
    from p2p.weights import fill

    def built(config):
        assert not config, "embed_dim must be divisible by num_heads"

    part = find(made[2]).text[0]
    with pytest.raises(CheckpointError, match="no network has the sizes.*embed_dim must be"):
        fill.fill("text tower", part, built, torch.device("cpu"), None)


def test_zero_terminal_snr_with_a_prediction_of_noise_says_so(sd1_folder, tmp_path):
    folder = changed(shutil.copytree(sd1_folder, tmp_path / "m"), "scheduler/scheduler_config.json", timestep_spacing="trailing")
    asked = p2p.load(folder, device="cpu", zero_snr=True)
    with pytest.raises(p2p.UsageError, match="t = 999 there is nothing but noise"):
        p2p.generate(asked, "a cat", steps=2, height=16, width=16)


@pytest.mark.parametrize("bound", [dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0),
                                   dict(thresholding=False, clip_sample_range=0.7), dict(thresholding=False, clip_sample=False)])
def test_pixels_are_bounded_as_the_config_says(tmp_path, bound):
    folder = changed(laid_out(tmp_path, published.IF), "scheduler/scheduler_config.json", **bound, variance_type="fixed_small")
    s = find(folder).sampling
    assert s.clip == ((0.9, 2.0) if bound["thresholding"] else bound.get("clip_sample_range")) and not s.learned_variance


@pytest.mark.parametrize("kind", ["fixed_large", "fixed_small_log", "learned"])
def test_a_variance_that_is_not_known_is_refused_of_pixels_alone(tmp_path, kind):
    """DeepFloyd IF is sampled by DDPM, which adds it; DDIM reads none."""
    s, said = "scheduler/scheduler_config.json", f"variance_type '{kind}'; supported: learned_range, fixed_small"
    with pytest.raises(CheckpointError, match=said):
        find(changed(laid_out(tmp_path / "if", published.IF), s, variance_type=kind))
    find(changed(laid_out(tmp_path / "sd", published.SD21), s, variance_type=kind))


def test_the_middle_inherits_from_a_bool_alone(tmp_path):
    """As in diffusers: where a list says which blocks attend to text only, the middle is not one of them."""
    n = len(published.IF["unet/config.json"]["block_out_channels"])
    for value, middle in (([True] * n, "added"), (True, "added text"), (None, "added")):
        folder = changed(laid_out(tmp_path / str(value is True), published.IF), "unet/config.json", only_cross_attention=value,
                         mid_block_only_cross_attention=None)
        assert find(folder).unet.config.mid_attention == middle


@pytest.mark.parametrize("channels, said", [(9, "takes 9 channels, not the 4 .*: an inpainting model; use the text-to-image model"),
                                            (16, "takes 16 channels, not the 4 of Stable Diffusion's latents; use another")])
def test_other_inputs_are_named(tmp_path, channels, said):
    with pytest.raises(CheckpointError, match=said):
        find(changed(laid_out(tmp_path, published.SD21), "unet/config.json", in_channels=channels))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_latents_are_not_bounded_whatever_the_config_says(tmp_path, asked):
    """StableDiffusionPipeline sets clip_sample to false: a bound of 1 would spoil latents."""
    theirs = diffusers.StableDiffusionPipeline(scheduler=diffusers.DDIMScheduler(clip_sample=asked), **dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")), requires_safety_checker=False)
    assert theirs.scheduler.config.clip_sample is False
    found = find(changed(laid_out(tmp_path, published.SD21), "scheduler/scheduler_config.json", clip_sample=asked))
    assert found.sampling.clip is None and any("clip_sample false taken" in n for n in found.notes) == asked
