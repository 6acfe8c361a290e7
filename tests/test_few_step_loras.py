"""LoRAs and files of few steps: what their names and metadata say is done, said, recorded, and overridden by what is asked for."""
import json
import shutil

import families
import pytest
import torch
from lora_files import LAYERS, lora, write
from oracles import diffusers
from safetensors.torch import load_file, save_file

import p2p
from p2p.cli.parser import main
from p2p.weights.convert import convert
from p2p.weights.fill import read_tensors
from p2p.weights.load import find

pytestmark = pytest.mark.slow

SIZE = ["--height", "16", "--width", "16", "--seed", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder and a single file of a small random model, and a LoRA of it without any name."""
    where = tmp_path_factory.mktemp("base")
    folder = families.save(families.build("sd1"), where / "folder", "sd1")
    convert(find(folder), where / "base.safetensors")
    g = torch.Generator().manual_seed(0)
    weights = dict(read_tensors(find(folder).unet, p2p.models.unet.UNet))
    add_on = write(where / "plain.safetensors", {layer: lora(g, weights[f"{layer}.weight"])[0] for layer in LAYERS["sd1"]})
    return folder, where / "base.safetensors", load_file(add_on)


def saved(state, path, metadata=None):
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file(state, path, metadata)
    return path


LORAS = {   # names of files (or of folders) -> sampler, steps, guidance scale, first two timesteps
    "lcm-lora-sdv1-5/pytorch_lora_weights": ("lcm", 4, 1.0, [999, 759]),
    "SD15_LCM_LoRA_8steps": ("lcm", 8, 1.0, [999, 879]),
    "tcd_sd15_lora": ("tcd", 4, 1.0, [999, 759]),
    "sdxl_lightning_4step_lora": ("ddim", 4, 1.0, [999, 749]),
    "Hyper-SD15-8steps-lora": ("ddim", 8, 1.0, [999, 874]),
    "Hyper-SD15-12steps-CFG-lora": ("ddim", 12, 7.5, [999, 916]),
    "Hyper-SD15-1step-lora": ("tcd", 1, 1.0, [999]),
    "sd_turbo_lora": ("ddim", 4, 1.0, [999, 749]), "sdxlTurboLora": ("ddim", 4, 1.0, [999, 749]),
    "dmd2_sdxl_4step_lora_fp16": ("lcm", 4, 1.0, [999, 759]),
    "models--latent-consistency--lcm-lora-sdv1-5/snapshots/0/pytorch_lora_weights": ("lcm", 4, 1.0, [999, 759]),
    "models--ByteDance--SDXL-Lightning/snapshots/0/sdxl_lightning_4step_lora": ("ddim", 4, 1.0, [999, 749]),
    "lightning_style_v2-step00001000": ("ddim", 50, 7.5, [981, 961]),   # kohya's name of a checkpoint on the way
    "porsche_911_turbo": ("ddim", 50, 7.5, [981, 961]),
    "hyperrealistic_4step": ("ddim", 50, 7.5, [981, 961]), "lightning_bolts": ("ddim", 50, 7.5, [981, 961]),
    "turbocharger": ("ddim", 50, 7.5, [981, 961]), "my_0steps_hyper": ("ddim", 50, 7.5, [981, 961]),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_sampled_as_its_name_says(base, tmp_path, name):
    folder, _, state = base
    path, (sampler, steps, scale, first) = saved(state, tmp_path / f"{name}.safetensors"), LORAS[name]
    model = p2p.load(folder, lora=path, device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale) == (sampler, steps, scale)
    schedule = model.schedule(steps, sampler)
    assert list(schedule.timesteps[:2]) == first and (schedule.levels[-1].sigma == 0) == (steps < 50 and sampler != "tcd")
    assert any("of few steps by its name" in note and sampler in note for note in model.notes) == (steps < 50)
    assert p2p.load(folder, lora=(path, 0), device="cpu").steps == 50   # it does nothing


@pytest.mark.parametrize("key", ["ss_output_name", "modelspec.title", "modelspec.tags"])
def test_metadata_say_it_too(base, tmp_path, key):
    folder, _, state = base
    path = saved(state, tmp_path / "renamed.safetensors", {key: "style, LCM-LoRA 6 steps"})
    model = p2p.load(folder, lora=[(path, 1.0)], device="cpu")
    assert (model.sampler, model.steps) == ("lcm", 6)
    prose = saved(state, tmp_path / "prose.safetensors", {"modelspec.description": "works with turbo and lcm"})
    assert p2p.load(folder, lora=prose, device="cpu").sampler == "ddim"


FILES = {"sd_turbo": ("ddim", 4, 1.0, "eps"), "sdxl_lightning_8step": ("ddim", 8, 1.0, "eps"),
         "sdxl_lightning_1step_x0": ("ddim", 1, 1.0, "x0"), "dreamshaper_LCM": ("lcm", 4, 1.0, "eps"),
         "dreamshaperXL_v21TurboDPMSDE": ("ddim", 4, 1.0, "eps"), "realvisV50_v50Lightning8steps": ("ddim", 8, 1.0, "eps"),
         "v1-5-pruned": ("ddim", 50, 7.5, "eps")}


@pytest.mark.parametrize("name", FILES)
def test_so_is_a_single_file(base, tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    state = load_file(base[1])
    save_file(state, path)   # without the metadata of `convert`, which know
    model = p2p.load(path, device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale, model.prediction) == FILES[name]
    assert p2p.load(path, device="cpu", prediction="v").prediction == "v"


@pytest.mark.parametrize("name, steps", [("models--stabilityai--sd-turbo/snapshots/0", 4), ("sd-turbo", 50)])
def test_so_is_a_folder(base, tmp_path, name, steps):
    """In the Hub's cache; elsewhere its scheduler config alone tells."""
    model = p2p.load(shutil.copytree(base[0], tmp_path / name), device="cpu")
    assert (model.steps, model.guidance_scale) == (steps, 1.0 if steps == 4 else 7.5)


def test_a_file_with_a_guidance_embedding_is_a_latent_consistency_model(base, tmp_path):
    state = load_file(base[1])
    width = state["model.diffusion_model.time_embed.0.weight"].shape[1]
    state["model.diffusion_model.time_embed.cond_proj.weight"] = torch.randn(width, 32)
    save_file(state, tmp_path / "m.safetensors")
    model = p2p.load(tmp_path / "m.safetensors", device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale) == ("lcm", 4, 7.5) and "lcm samples" in " ".join(model.notes)


def test_what_is_merged_and_converted_is_sampled_the_same(base, tmp_path):
    """In steps and guidance too, and whatever it is named then."""
    folder, _, state = base
    for name in ("lcm_lora", "lightning_2step", "Hyper-SD15-12steps-CFG-lora", "Hyper-SD15-1step-lora"):
        path = saved(state, tmp_path / f"{name}.safetensors")
        a = p2p.load(folder, lora=path, device="cpu")
        for out in (tmp_path / f"{len(name)}.safetensors", tmp_path / f"{len(name)}"):
            convert(find(folder, lora=[(path, 1.0)]), out)
            b = p2p.load(out, device="cpu")
            for said in ("sampler", "steps", "guidance_scale", "timestep_spacing", "final_alpha"):
                assert getattr(a, said) == getattr(b, said), (name, said)
            assert a.schedule(a.steps, a.sampler) == b.schedule(b.steps, b.sampler)
        assert diffusers.DDIMScheduler.from_pretrained(out, subfolder="scheduler").config.prediction_type == "epsilon"


@pytest.mark.parametrize("told", [3, {}, {"few_steps": "lcm"}, {"few_steps": "lcm", "steps": 0, "guided": False},
                                  {"few_steps": "lcm", "steps": 4, "guided": 1}, {"few_steps": ["lcm"], "steps": 4, "guided": True},
                                  {"few_steps": "lcm\x1b[31m", "steps": 4, "guided": False}, {"few_steps": "fast", "steps": 4, "guided": False}])
def test_what_a_config_tells_of_few_steps_is_checked(base, tmp_path, told):
    shutil.copytree(base[0], tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_few_steps": told}))
    with pytest.raises(p2p.CheckpointError, match="_few_steps .*are expected"):
        find(tmp_path / "m")


def test_what_a_config_tells_of_few_steps_is_said(base, tmp_path):
    path = saved(base[2], tmp_path / "Hyper-SD15-4steps-lora.safetensors")
    for out in (tmp_path / "m.safetensors", tmp_path / "m"):
        convert(find(base[0], lora=[(path, 1.0)]), out)
        assert sum("of few steps (hyper, by its scheduler config): sampled in 4, without guidance" in n for n in find(out).notes) == 1


@pytest.mark.parametrize("name", ["small_lcm_2step.safetensors", "sdxl_lightning_4step.safetensors", "turbo"])
def test_a_name_makes_no_other_model_of_what_is_converted(base, tmp_path, name):
    convert(find(base[1]), tmp_path / name)
    model = p2p.load(tmp_path / name, device="cpu")
    assert (model.sampler, model.steps, model.guidance_scale) == ("ddim", 50, 7.5)


@pytest.mark.parametrize("name, sampler", [("lcm-lora", "lcm"), ("tcd-lora", "tcd"), ("Hyper-SD15-4steps-lora", "ddim")])
def test_a_word_swap_from_the_command_line(base, tmp_path, capsys, name, sampler):
    """The source's row is the source alone; all is recorded, done again, and overridden."""
    folder, _, state = base
    path = saved(state, tmp_path / f"{name}.safetensors")
    model = ["--model", str(folder), "--lora", str(path), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(["edit", "a cat", "a dog", *SIZE, *model]) == 0
    made = capsys.readouterr()
    source, edit = made.out.split()[:2]
    assert f"{path.name} is of few steps by its name or metadata" in made.err and "in 4 steps, without guidance" in made.err
    assert main(["generate", "a cat", *SIZE, *model]) == 0

    def pixels(file):
        return p2p.image.open_picture(file).tobytes()

    assert pixels(source) == pixels(capsys.readouterr().out.split()[0]) != pixels(edit)
    settings = json.loads(p2p.image.open_picture(edit).info["prompt_to_prompt"])
    assert (settings["sampler"], settings["steps"], settings["guidance_scale"]) == (sampler, 4, 1.0)
    assert main(["edit", "--from", edit, "--device", "cpu", "-o", str(tmp_path / "again")]) == 0
    assert pixels(capsys.readouterr().out.split()[1]) == pixels(edit)
    plain = saved(state, tmp_path / "renamed.safetensors")
    assert main(["edit", "--from", edit, "--lora", str(plain), "--device", "cpu", "-o", str(tmp_path / "no")]) == 3
    assert "few_steps" in capsys.readouterr().err
    other = ["--sampler", "ddim", "--steps", "3", "--cfg", "2", "--timestep-spacing", "leading"]
    assert main(["edit", "a cat", "a dog", *other, *SIZE, *model]) == 0
    settings = json.loads(p2p.image.open_picture(capsys.readouterr().out.split()[1]).info["prompt_to_prompt"])
    assert (settings["sampler"], settings["steps"], settings["guidance_scale"], settings["timestep_spacing"]) == ("ddim", 3, 2.0, "leading")
