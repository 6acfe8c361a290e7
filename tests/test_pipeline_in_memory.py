"""`p2p.load(pipe)`: a diffusers pipeline in memory is the model of the folder that it would be saved to, and shares its weights."""
import json
import logging
from dataclasses import replace
from functools import cache

import families
import lora_files
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from oracles import diffusers
from peft import LoraConfig, inject_adapter_in_model

import p2p
from p2p import CheckpointError, UsageError
from p2p.cli.parser import main
from p2p.models.unet import UNet
from p2p.show.pictures import read_settings
from p2p.weights.convert import convert
from p2p.weights.fill import read_tensors
from p2p.weights.load import find

pytestmark = pytest.mark.slow

SMALL = dict(steps=2, height=16, width=16, seed=3)
CLASSES = {"sd1": diffusers.StableDiffusionPipeline, "sd2": diffusers.StableDiffusionPipeline,
           "sdxl": diffusers.StableDiffusionXLPipeline}
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """With tokenizers."""
    out = {}
    for family in CLASSES:
        where = tmp_path_factory.mktemp(family)
        convert(find(families.save(families.build(family), where / "made", family)), where / "folder")
        out[family] = where / "folder"
    return out


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def pipeline(folder, kind=None, **more):
    kind = kind or (diffusers.StableDiffusionXLPipeline if (folder / "text_encoder_2").exists() else diffusers.StableDiffusionPipeline)
    return kind.from_pretrained(folder, **more)


@pytest.fixture
def pipe(folders):
    return pipeline(folders["sd1"])


def latents(model, **more):
    return p2p.edit(model, "a cat", "a dog", **SMALL, **more).latents


@cache
def of_folder(folder):
    return latents(p2p.load(folder, device="cpu"))


def storages(pipe):
    parts = [getattr(pipe, part, None) for part in PARTS]
    return {p.untyped_storage().data_ptr() for part in parts if part is not None for p in part.parameters()}


def weights(model):
    return [p for m in (model.unet, *model.text_encoders, model.vae) for p in m.parameters()]


def added(model, pipe):
    """Bytes that are not the pipeline's, and of all."""
    found, there = weights(model), storages(pipe)
    return sum(p.nbytes for p in found if p.untyped_storage().data_ptr() not in there), sum(p.nbytes for p in found)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("family", CLASSES)
def test_it_is_the_model_of_its_folder_and_copies_nothing(folders, tmp_path, family, half):
    pipe = pipeline(folders[family])
    pipe = pipe.to(torch.float16) if half else pipe
    before = {part: [p.requires_grad for p in getattr(pipe, part).parameters()] for part in PARTS if hasattr(pipe, part)}
    pipe.save_pretrained(tmp_path / "saved")
    model, saved = p2p.load(pipe, device="cpu"), p2p.load(tmp_path / "saved", device="cpu")
    assert added(model, pipe)[0] == 0 and model.dtype == saved.dtype == torch.float32
    assert repr(model) == repr(replace(saved, name=str(folders[family]))) and model.notes == saved.notes
    result = p2p.edit(model, "a cat", "a dog", **SMALL)
    same = p2p.edit(saved, "a cat", "a dog", **SMALL)
    assert torch.equal(result.latents, same.latents)
    assert all(np.array_equal(a, b) for a, b in zip(result.images, same.images, strict=True))
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(model.encode(picture), saved.encode(picture))
    assert before == {part: [p.requires_grad for p in getattr(pipe, part).parameters()] for part in before}


def test_half_precision_as_on_a_gpu(folders, tmp_path):
    """SDXL's autoencoder computes in float32, from weights that stay half as wide."""
    pipe = pipeline(folders["sdxl"]).to(torch.float16)
    pipe.save_pretrained(tmp_path / "saved")
    model, saved = (p2p.load(x, device="cpu", dtype=torch.float16) for x in (pipe, tmp_path / "saved"))
    assert (model.dtype, model.vae.dtype) == (saved.dtype, saved.vae.dtype) == (torch.float16, torch.float32)
    assert added(model, pipe)[0] == 0 and torch.equal(latents(model), latents(saved))
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(model.decode(x), saved.decode(x))


def test_other_dtypes_are_copied_and_said(pipe, folders):
    model = p2p.load(pipe, device="cpu", dtype=torch.float16)
    assert any("copies of the pipeline's" in note for note in model.notes)
    assert torch.equal(latents(model), latents(p2p.load(folders["sd1"], device="cpu", dtype=torch.float16)))
    assert pipe.unet.dtype == torch.float32 and not any("copies" in note for note in p2p.load(pipe).notes)


@pytest.mark.parametrize("family, name", [
    ("sd1", "unet.conv_out.bias"), ("sd1", "vae.decoder.conv_out.bias"), ("sdxl", "text_encoder_2.text_projection.weight"),
    *(("sd1", f"text_encoder.text_model.encoder.layers.0.self_attn.{p}_proj.weight") for p in "qkv")])
def test_a_change_of_a_weight_changes_the_model(folders, family, name):
    pipe = pipeline(folders[family])
    part, _, path = name.partition(".")
    parameters = dict(getattr(pipe, part).named_parameters())
    parameter = parameters.get(path, parameters.get(path.removeprefix("text_model.")))
    model = p2p.load(pipe)
    before = p2p.edit(model, "a cat", "a dog", **SMALL)
    with torch.no_grad():
        parameter.add_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
    after = p2p.edit(model, "a cat", "a dog", **SMALL)
    changed = np.any([np.any(np.array(a) != np.array(b)) for a, b in zip(before.images, after.images)])
    assert changed if part == "vae" else not torch.equal(before.latents, after.latents)
    assert torch.equal(after.latents, latents(p2p.load(pipe)))
    assert before.settings["sha256"] != after.settings["sha256"]


def test_channels_last_and_compiled(pipe, folders):
    want = of_folder(folders["sd1"])
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    model = p2p.load(pipe)
    assert added(model, pipe)[0] == 0 and torch.equal(latents(model), want)
    pipe.unet = torch.compile(pipe.unet)
    assert torch.equal(latents(p2p.load(pipe)), want)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("variant", ["Img2Img", "Inpaint"])
def test_pipelines_of_the_same_parts(folders, family, variant):
    kind = getattr(diffusers, CLASSES[family].__name__.replace("Pipeline", f"{variant}Pipeline"))
    model = p2p.load(pipeline(folders[family], kind))
    assert torch.equal(latents(model), of_folder(folders[family]))
    assert model.places == {"pipeline": kind.__name__}


SCHEDULERS = [
    lambda c: diffusers.EulerDiscreteScheduler.from_config(c, timestep_spacing="trailing"),
    lambda c: diffusers.DDIMScheduler.from_config(c, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, beta_end=0.02, use_karras_sigmas=True),
    lambda c: diffusers.DDIMScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist(), clip_sample=False),
    lambda c: diffusers.LCMScheduler.from_config(c), lambda c: diffusers.TCDScheduler.from_config(c)]


@pytest.mark.parametrize("made", SCHEDULERS)
def test_it_is_sampled_as_its_scheduler_says(pipe, tmp_path, made):
    pipe.scheduler = made(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "saved")
    model, saved = p2p.load(pipe), p2p.load(tmp_path / "saved", device="cpu")
    assert torch.equal(model.alphas_cumprod, saved.alphas_cumprod)
    for name in ("prediction", "offset", "final_alpha", "timestep_spacing", "sampler", "steps", "guidance_scale", "size"):
        assert getattr(model, name) == getattr(saved, name)
    assert model.notes == tuple(note.replace("the folder's", "the pipeline's") for note in saved.notes)
    assert torch.equal(latents(model), latents(saved))


def test_arguments_of_load(pipe, folders, tmp_path):
    folder = folders["sd1"]
    for more in (dict(clip_skip=1), dict(zero_snr=True, prediction="v"), dict(held=torch.float16), dict(offload=True),
                 dict(vae=folders["sdxl"] / "vae"), dict(family="sd1")):
        assert torch.equal(latents(p2p.load(pipe, **more)), latents(p2p.load(folder, device="cpu", **more)))
    assert torch.equal(latents(pipe), of_folder(folder))   # where a model is wanted
    with pytest.raises(CheckpointError, match="asked to be read as sd2"):
        p2p.load(pipe, family="sd2")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        p2p.load(pipe, ema=True)
    pipe.vae = None
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline in memory: it has no vae; .*set pipe.vae"):
        p2p.load(pipe)
    assert p2p.load(pipe, vae=folder / "vae").vae is not None


def test_add_ons_copy_what_they_change(pipe, folders, tmp_path):
    from lora_files import lora, write

    g = torch.Generator().manual_seed(0)
    layers = {layer: lora(g, torch.empty(64, 64))[0] for layer in ("encoder.layers.0.self_attn.q_proj",)}
    path = write(tmp_path / "l.safetensors", layers, "lora_te_text_model_")
    model, saved = (p2p.load(x, device="cpu", lora=path) for x in (pipe, folders["sd1"]))
    assert torch.equal(latents(model), latents(saved)) and not torch.equal(latents(model), latents(p2p.load(pipe)))
    assert added(model, pipe)[0] == 3 * 64 * 64 * 4


def test_fewer_text_layers(folders, tmp_path):
    """`num_hidden_layers`, as clip skip is often done."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel.from_pretrained(folders["sd1"] / "text_encoder", num_hidden_layers=1)
    pipe = pipeline(folders["sd1"], text_encoder=tower)
    pipe.save_pretrained(tmp_path / "saved")
    want = latents(p2p.load(folders["sd1"], device="cpu", clip_skip=1))
    assert torch.equal(latents(p2p.load(pipe)), want) and torch.equal(latents(p2p.load(tmp_path / "saved", device="cpu")), want)


def adapted(pipe, *parts):
    torch.manual_seed(0)
    for part in parts:
        names = ["to_q", "to_v"] if part == "unet" else ["q_proj", "fc1"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), getattr(pipe, part))
        getattr(pipe, part)._hf_peft_config_loaded = True


def test_a_lora_that_is_fused_stays(pipe, folders, tmp_path):
    adapted(pipe, "unet", "text_encoder")
    advice = r"in memory/unet: holds a LoRA that is not fused .*pipe.fuse_lora\(\), or pipe.unload_lora_weights\(\)"
    with pytest.raises(CheckpointError, match=advice):
        p2p.load(pipe)
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(CheckpointError, match="in memory/text_encoder: holds a LoRA that is not fused"):
        p2p.load(pipe)
    pipe.fuse_lora(components=["text_encoder"])
    model = p2p.load(pipe)
    fused = latents(model)
    assert added(model, pipe)[0] == 0 and not torch.equal(fused, latents(folders["sd1"]))
    pipe.unload_lora_weights()   # the fused weights stay
    assert torch.equal(latents(p2p.load(pipe)), fused)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(p2p.load(tmp_path / "saved", device="cpu")), fused)


def test_a_lora_that_is_disabled_does_nothing(pipe, folders):
    adapted(pipe, "unet")
    pipe.disable_lora()
    assert torch.equal(latents(p2p.load(pipe)), latents(folders["sd1"]))


def nine_channels(pipe):
    pipe.unet = families.randomised(diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9), 1)
    return pipe


def changed(pipe, name, value):
    setattr(pipe, name, value)
    return pipe


def own_attention(pipe):
    class Sharpened(diffusers.models.attention_processor.AttnProcessor2_0):
        pass

    pipe.unet.set_attn_processor(Sharpened())
    return pipe


def frozen_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


def fused_projections(pipe):
    pipe.fuse_qkv_projections()
    return pipe


def integers(pipe):
    pipe.unet.to(torch.float8_e4m3fn)
    return pipe


def as_a(name):
    def made(pipe):
        parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "requires_safety_checker")}
        if name == "StableDiffusionControlNetPipeline":
            parts["controlnet"] = diffusers.ControlNetModel.from_unet(pipe.unet)
        if name == "StableDiffusionInstructPix2PixPipeline":
            nine_channels(pipe)
            parts["unet"] = pipe.unet
        return getattr(diffusers, name)(**parts, requires_safety_checker=False)
    return made


def flux(pipe):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxFillPipeline(scheduler=scheduler, vae=pipe.vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
                                      tokenizer_2=None, transformer=None)


def without_memory(pipe):
    pipe.unet.conv_in.to("meta")
    return pipe


REFUSED = {
    "Flux": (flux, "FluxFillPipeline in memory: not supported; supported: StableDiffusionPipeline"),
    "ControlNet": (as_a("StableDiffusionControlNetPipeline"), "StableDiffusionControlNetPipeline in memory: not supported"),
    "InstructPix2Pix": (as_a("StableDiffusionInstructPix2PixPipeline"), "InstructPix2PixPipeline in memory: not supported"),
    "latent consistency": (as_a("LatentConsistencyModelPipeline"), "LatentConsistencyModelPipeline in memory: not supported"),
    "inpainting": (nine_channels, "in memory: its UNet takes 9 channels"),
    "no autoencoder": (lambda p: changed(p, "vae", None), "has no vae"),
    "no tokenizer": (lambda p: changed(p, "tokenizer", None), "has no tokenizer"),
    "no text": (lambda p: changed(changed(p, "text_encoder", None), "tokenizer", None), "has no text_encoder, no tokenizer"),
    "no scheduler": (lambda p: changed(p, "scheduler", None), "has no scheduler"),
    "no UNet": (lambda p: changed(p, "unet", None), "has no unet"),
    "a flow": (lambda p: changed(p, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler"),
    "other levels": (lambda p: changed(p, "scheduler", diffusers.EDMEulerScheduler()), "EDMEulerScheduler.*noise levels"),
    "a bound": (lambda p: changed(p, "scheduler", diffusers.DDIMScheduler.from_config(p.scheduler.config, thresholding=True)),
                "in memory/scheduler/scheduler_config.json: thresholding"),
    "attention": (own_attention, r"in memory/unet: its attention is computed by 'Sharpened'.*set_default_attn_processor"),
    "FreeU": (frozen_u, r"FreeU is on.*pipe.disable_freeu\(\)"),
    "joined projections": (fused_projections, r"FusedAttnProcessor2_0.*call pipe.unfuse_qkv_projections"),
    "eight bits": (integers, "is stored as float8_e4m3fn; supported: float16"),
    "not there": (without_memory, r"conv_in.weight is not in memory.*pipe.remove_all_hooks\(\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(pipe, kind):
    make, message = REFUSED[kind]
    made = make(pipe)
    with pytest.raises(CheckpointError, match=message) as error:
        p2p.load(made)
    assert "/tmp" not in str(error.value) and "in memory" in str(error.value) and len(str(error.value)) < 700


def test_joined_projections_that_are_parted_again_are_as_before(pipe, folders):
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert torch.equal(latents(p2p.load(pipe)), of_folder(folders["sd1"]))


def test_another_vocabulary_is_refused(pipe):
    pipe.tokenizer.add_tokens(["<cat>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.raises(CheckpointError, match="in memory.*49409 tokens"):
        p2p.load(pipe)
    with pytest.raises(UsageError, match="named by a string or a path, or is a diffusers pipeline, not"):
        p2p.load(pipe.unet)


def test_offload_hooks_are_not_used(pipe, folders):
    add_hook_to_module(pipe.unet, AlignDevicesHook("cpu"))
    model = p2p.load(pipe)
    assert any("offload hooks are not used: its weights are read where they lie, on cpu" in note for note in model.notes)
    assert torch.equal(latents(model), latents(folders["sd1"]))
    pipe.vae.enable_tiling()
    assert any("tiling of the autoencoder is not taken over" in note for note in p2p.load(pipe).notes)


def test_a_picture_records_it_and_is_made_again_from_its_folder(pipe, tmp_path, capsys, folders):
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.5
    result = p2p.edit(p2p.load(pipe), "a cat", "a dog", **SMALL)
    settings = result.settings
    assert settings["model"] == str(folders["sd1"]) and settings["places"] == {"pipeline": "StableDiffusionPipeline"}
    assert len(settings["sha256"]) == 64 and json.dumps(settings)
    result.save(tmp_path / "made")
    png = next(p for p in (tmp_path / "made").rglob("*.png") if (read_settings(p) or {}).get("command") == "edit")
    replay = ["edit", "--from", str(png), "-o", str(tmp_path / "again"), "--device", "cpu"]
    assert main(replay) == 3
    assert "StableDiffusionPipeline in memory" in (said := capsys.readouterr().err) and "say --model FOLDER" in said
    assert main([*replay, "--model", str(folders["sd1"])]) == 3
    assert "not the weights that made" in capsys.readouterr().err
    pipe.save_pretrained(tmp_path / "saved")
    assert main([*replay, "--model", str(tmp_path / "saved")]) == 0
    again = p2p.image.open_picture(next((tmp_path / "again").rglob("edit.png")))
    assert again.tobytes() == result.images[1].tobytes()


def test_an_inversion_is_of_the_weights_as_they_were(pipe):
    model = p2p.load(pipe)
    inversion = p2p.invert(model, torch.zeros(1, 4, 8, 8), "a cat", steps=2, method="ddim")
    p2p.edit(model, inversion, "a dog")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.5
    with pytest.raises(UsageError, match="sha256"):
        p2p.edit(model, inversion, "a dog")


def test_a_merged_lora_leaves_the_pipelines_own_weights_alone(pipe, tmp_path, folders):
    weight = dict(read_tensors(find(folders["sd1"]).unet, UNet))
    g, kind = torch.Generator().manual_seed(1), next(iter(lora_files.KINDS))
    layers = {name: lora_files.KINDS[kind](g, weight[f"{name}.weight"])[0] for name in lora_files.LAYERS["sd1"]}
    lora_files.write(tmp_path / "a.safetensors", layers)
    before, plain = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, latents(p2p.load(pipe, device="cpu"))
    merged = latents(p2p.load(pipe, device="cpu", lora=tmp_path / "a.safetensors"))
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items()) and (merged - plain).abs().max() > 1e-3
    assert torch.equal(latents(p2p.load(pipe, device="cpu")), plain)
