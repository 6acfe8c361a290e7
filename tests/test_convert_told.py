"""What is converted is the same model: a single file that would be read otherwise than its folder is refused by the setting's name."""
import json
import shutil

import flow_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.weights.convert import convert
from p2p.weights.load import find
from p2p.weights.scheduler import scaled_linear

pytestmark = pytest.mark.slow


def changed(folder, where, **fields):
    file = folder / where / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return made[0], shutil.copytree(made[2], tmp_path / "m")


def test_activations_and_heads(copy, tmp_path):
    family, folder = copy
    other = "gelu" if family == "sd1" else "quick_gelu"
    tower = {"sd1": "text_encoder", "sd2": "text_encoder", "sdxl": "text_encoder_2"}[family]
    # Stable Diffusion 1 and 2 are told apart by it, and have other heads
    cases = [(tower, dict(hidden_act=other), "quick_gelu" if family == "sdxl" else "heads")]
    heads = json.loads((folder / "unet" / "config.json").read_text())["attention_head_dim"]
    twice = [2 * n for n in heads] if isinstance(heads, list) else 2 * heads
    cases += [("unet", dict(attention_head_dim=twice), "heads")]
    for where, fields, said in cases:
        other_model = changed(shutil.copytree(folder, tmp_path / where), where, **fields)
        with pytest.raises(CheckpointError, match=f"would not tell .*{said}.*Convert to a folder"):
            convert(find(other_model), tmp_path / "one.safetensors")
        convert(find(other_model), tmp_path / f"{where} again")
        assert find(tmp_path / f"{where} again").unet.config == find(other_model).unet.config
    convert(find(folder), tmp_path / "one.safetensors")   # as it was, it is told


@pytest.mark.parametrize("change", [lambda abar: abar.float(), lambda abar: (abar * 0.999).float(), lambda abar: abar * (1 + 1e-7)],
                         ids=["as the original files have it", "another one", "one that is nearly the usual"])
def test_files_with_a_schedule_of_their_own(sd1_file, tmp_path, change):
    table = change(scaled_linear())
    save_file(load_file(sd1_file) | {"alphas_cumprod": table}, tmp_path / "m.safetensors")
    found = find(tmp_path / "m.safetensors", family="sd1", prediction="eps")
    for name in ("folder", "one.safetensors"):
        convert(found, tmp_path / name)
        assert torch.allclose(find(tmp_path / name).alphas_cumprod, table.double(), rtol=0, atol=1e-7)


def test_an_sd3_file_as_released_becomes_a_folder(tmp_path):
    """Its first tower has no projection; a folder's has one, which changes nothing."""
    flow_models.pipeline("3 medium", tmp_path).save_pretrained(tmp_path / "m")
    convert(find(tmp_path / "m"), tmp_path / "one.safetensors")
    state = {k: v for k, v in load_file(tmp_path / "one.safetensors").items() if "clip_l.transformer.text_projection" not in k}
    save_file(state, tmp_path / "released.safetensors")   # without the metadata of `convert`
    package = find(tmp_path / "released.safetensors")
    assert not package.text[0].config.projected
    convert(package, tmp_path / "again", text=tmp_path / "m")
    assert torch.equal(find(tmp_path / "again").alphas_cumprod, package.alphas_cumprod)


def test_of_a_tokenizer_its_own_files_are_copied(flux, tmp_path):
    folder = shutil.copytree(flux, tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer_2" / "notes").symlink_to(tmp_path / "secret")
    convert(find(folder), tmp_path / "out")
    copied = {p.name for p in (tmp_path / "out" / "tokenizer_2").iterdir()}
    assert "notes" not in copied and "tokenizer.json" in copied


def test_models_of_other_families_are_refused(tmp_path):
    for name in ("emoji", "emoji-flow", "emoji-upscaler"):
        with pytest.raises(CheckpointError, match="conversion is for Stable Diffusion and FLUX"):
            convert(find(name), tmp_path / "out")


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    flow_models.pipeline("dev", root).save_pretrained(root / "dev")
    return root / "dev"


@pytest.mark.parametrize("fields, said", [
    (dict(layer_norm_epsilon=0.5), "T5: layer_norm_epsilon 0.5"), (dict(relative_attention_max_distance=33), "T5: relative_attention_max_distance 33"),
    (dict(feed_forward_proj="gated-silu", dense_act_fn=None), "T5: dense_act_fn 'silu'")])
def test_settings_of_t5(flux, tmp_path, fields, said):
    folder = changed(shutil.copytree(flux, tmp_path / "m"), "text_encoder_2", **fields)
    with pytest.raises(CheckpointError, match=said):
        convert(find(folder), tmp_path / "one.safetensors")
    convert(find(folder), tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("one")] == []


def test_a_turbo_model_stays_one_and_a_name_makes_none(tmp_path):
    flow_models.pipeline("3.5 large", tmp_path).save_pretrained(tmp_path / "large")
    folder = shutil.copytree(tmp_path / "large", tmp_path / "large-turbo")
    for source, name, wanted in ((folder, "fast.safetensors", (4, 1.0)), (folder, "fast", (4, 1.0)), (tmp_path / "large", "turbo.safetensors", (40, 4.5))):
        convert(find(source), tmp_path / name)
        text = {} if (tmp_path / name).is_dir() else {"text": tmp_path / "large"}
        model = p2p.load(tmp_path / name, device="cpu", **text)
        assert (model.steps, model.guidance_scale) == wanted
    with pytest.raises(CheckpointError, match="would not tell kind '3.5 large'"):
        convert(find(tmp_path / "large"), tmp_path / "turbo folder")


def test_half_has_place_for_every_value(sd1_file, flux, tmp_path, capsys):
    state = {k: v.float() for k, v in load_file(sd1_file).items()}
    name = next(k for k in state if k.endswith("attn1.to_q.weight"))
    state[name][0, 0] = 1e6
    save_file(state, tmp_path / "big.safetensors")
    assert main(["convert", str(tmp_path / "big.safetensors"), str(tmp_path / "half.safetensors"), "--half"]) == 3
    assert "to_q.weight holds values beyond float16; convert without --half" in capsys.readouterr().err
    folder = shutil.copytree(flux, tmp_path / "m")
    weights = folder / "text_encoder_2" / "model.safetensors"
    state = load_file(weights)
    state["encoder.block.0.layer.1.DenseReluDense.wo.weight"] = torch.full_like(
        state["encoder.block.0.layer.1.DenseReluDense.wo.weight"], 1e6)
    save_file(state, weights)
    with pytest.raises(CheckpointError, match="wo.weight holds values beyond float16"):
        convert(find(folder), tmp_path / "out", half=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.safetensors", "m"]


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".GGUF"])
def test_other_formats_are_not_taken_for_folders(sd1_file, tmp_path, capsys, suffix):
    assert main(["convert", str(sd1_file), str(tmp_path / f"x{suffix}")]) == 3
    assert "is not written; give a .safetensors file, or a folder" in capsys.readouterr().err and not any(tmp_path.iterdir())
