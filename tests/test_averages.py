"""Averaged weights (EMA): wherever they lie they are read when asked for, and never passed over in silence."""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError
from p2p.weights import hub, keys
from p2p.weights.load import find

UNUSED = "plain weights are used, not the averaged ones (EMA)"


def load(path, **kw):
    return p2p.load(path, device="cpu", dtype=torch.float32, **kw)


def averages(state):
    """As LDM names them."""
    return {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in state.items() if k.startswith(keys.UNET)}


@pytest.fixture(scope="module")
def state(sd1_file):
    return load_file(sd1_file)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}", "vae.{}", "model/{}"])
def test_averages_under_unknown_names_are_noted(state, tmp_path, form):
    extra = {"model_ema." + form.format(k): v.clone() for k, v in state.items() if k.endswith("conv_in.bias")}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    save_file(state | extra | counters, tmp_path / "m.safetensors")
    assert any(UNUSED in n for n in find(tmp_path / "m.safetensors").notes)
    with pytest.raises(CheckpointError, match=r"are there for 0 of .*in the file: model_ema\."):
        find(tmp_path / "m.safetensors", ema=True)
    save_file(state | extra | averages(state), tmp_path / "more.safetensors")
    assert any(n.startswith(f"{len(extra)} averaged tensor") for n in find(tmp_path / "more.safetensors", ema=True).notes)
    save_file(state | counters, tmp_path / "none.safetensors")
    assert not any("EMA" in n for n in find(tmp_path / "none.safetensors").notes)


def test_averages_of_an_autoencoder_are_noted(state, sd1_file, tmp_path):
    vae = {k.removeprefix(keys.VAE): v for k, v in state.items() if k.startswith(keys.VAE)}
    save_file(vae | {"model_ema.encoderconv_inbias": torch.ones(9)}, tmp_path / "vae.safetensors")
    assert any(f"vae.safetensors: its {UNUSED}" in n for n in find(sd1_file, vae=tmp_path / "vae.safetensors").notes)


@pytest.mark.slow
@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("vae", [False, True])
def test_a_unet_of_averages_alone_is_named(state, tmp_path, dots, vae):
    ema = {k.replace("model_ema.", "model_ema.model.") if dots else k: v for k, v in averages(state).items()}
    rest = {k: v for k, v in state.items() if not k.startswith((keys.UNET, *(() if vae else (keys.VAE,))))}
    save_file(rest | ema, tmp_path / "m.safetensors")
    for asked in (False, True):
        with pytest.raises(CheckpointError, match=r"whose UNet is there as averaged weights \(EMA\) alone"):
            find(tmp_path / "m.safetensors", ema=asked)


def test_a_file_that_lacks_the_unet_is_no_autoencoder_alone(state, tmp_path):
    save_file({k: v for k, v in state.items() if not k.startswith(keys.UNET)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no UNet found under the names of a Stable Diffusion file"):
        find(tmp_path / "m.safetensors")
    save_file({k: v for k, v in state.items() if k.startswith(keys.VAE)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="an autoencoder alone: give it with --vae"):
        find(tmp_path / "vae.safetensors")


@pytest.mark.slow
def test_averages_in_a_folder(made, tmp_path):
    """As diffusers' training scripts save them: unet_ema beside unet, with the average's own fields in its config."""
    import families  # diffusers and transformers take seconds to import
    from diffusers.training_utils import EMAModel

    family, parts, folder = made
    with pytest.raises(CheckpointError, match="no averaged weights .EMA. in it, which would be the folder unet_ema"):
        find(folder, ema=True)
    other = families.randomised(families.unet(family), 9)
    folder = shutil.copytree(folder, tmp_path / "m")
    EMAModel(other.parameters(), model_cls=type(other), model_config=other.config).save_pretrained(folder / "unet_ema")
    plain, ema = load(folder), load(folder, ema=True)
    assert torch.equal(plain.unet.conv_in.weight, parts["unet"].conv_in.weight) and any(UNUSED in n for n in plain.notes)
    assert torch.equal(ema.unet.conv_in.weight, other.conv_in.weight) and any("(EMA) used" in n for n in ema.notes)
    assert plain.sha256 != ema.sha256 and ema.identity()["ema"]


@pytest.mark.parametrize("ema, wanted", [(False, "unet"), (True, "unet_ema")])
def test_of_the_hub_averages_are_fetched_in_place_of_the_plain_ones(monkeypatch, ema, wanted):
    names = ["model_index.json", *(f"{part}/{name}" for part in ("unet", "unet_ema")
                                   for name in ("config.json", "diffusion_pytorch_model.safetensors"))]
    asked = []
    monkeypatch.setattr(hub, "_get", lambda repo, name: asked.append(name) or Path(name))
    hub._fetch("org/name", names, ema)
    assert [n for n in asked if n.endswith(".safetensors")] == [f"{wanted}/diffusion_pytorch_model.safetensors"]
    assert "unet_ema/config.json" in asked                                       # so that it is noted
