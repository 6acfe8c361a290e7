"""How a checkpoint is read: the layers of its text that count, its precisions, its autoencoder, and what is asked of it."""
import json
import shutil

import families
import pytest
import torch
from oracles import diffusers, transformers
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.show.pictures import read_settings
from p2p.weights import keys
from p2p.weights.convert import single_file
from p2p.weights.detect import scaled_linear, zero_terminal_snr
from p2p.weights.fill import stored
from p2p.weights.load import find
from p2p.weights.load import load as build

CPU = torch.device("cpu")
PROMPTS = ["a cat on grass, riding a bicycle", ""]


def load(path, **kw):
    return p2p.load(path, device="cpu", dtype=torch.float32, **kw)


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


def hidden(tower, model, i, layers):
    """Context as diffusers makes it with so many layers, of hidden states from the end."""
    with torch.no_grad():
        return tower(model.text_encoders[i].tokenize(PROMPTS), output_hidden_states=True).hidden_states[-1 - layers]


# ------------------------------------------------------------------------------------------- Stable Diffusion 2's last layer

@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """A folder whose tower has 23 narrow layers, and the state of a single file made of it, with an idle 24th."""
    parts = families.build("sd2") | {"text_encoder": families.text(128, 23, "gelu")}
    folder = families.save(parts, tmp_path_factory.mktemp("sd2") / "folder", "sd2")
    return parts, folder, single_file(find(folder))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["23", "24, trained", "24, zeros", "2 of 24", "2 and one of zeros"])
def test_the_layers_of_sd2_that_are_used(sd2, tmp_path, layers):
    """The 24th is idle, whatever it holds; any other is used, as in diffusers and ComfyUI, unless it is zero."""
    parts, _, state = sd2
    if layers.startswith("2 "):
        parts = families.build("sd2")
        state = single_file(find(families.save(parts, tmp_path / "short", "sd2")))
    n = int(layers.split()[0].rstrip(","))
    idle = [k for k in state if f".resblocks.{n}." in k or (n == 24 and ".resblocks.23." in k)]
    state = dict(state)
    for k in idle:
        if "zeros" not in layers:
            state.pop(k)
        if "trained" in layers:
            state[k] = torch.randn(sd2[2][k].shape)
    save_file(state, tmp_path / "m.safetensors")
    model = load(tmp_path / "m.safetensors")
    assert model.text_encoders[0].config.layers == min(n, 23)
    with torch.no_grad():
        want = parts["text_encoder"](model.text_encoders[0].tokenize(PROMPTS)).last_hidden_state
    close(model.text(PROMPTS), want)
    assert any("of its text tower are used (a guess" in note for note in model.notes) == (layers == "2 of 24")


# -------------------------------------------------------------------------------------------------------------- precisions

@pytest.mark.slow
@pytest.mark.parametrize("how", ["half UNet, full tower", "some layers full", "full UNet, half tower", "bfloat16 and half"])
def test_parts_of_different_precisions_work_together(single, tmp_path, how):
    """As on a GPU, where the default is the precision that is stored: the UNet's larger part decides for it and the text."""
    state = dict(load_file(single))
    for k, v in state.items():
        unet, attention = k.startswith(keys.UNET), "attn" in k
        half = {"half UNet, full tower": unet, "some layers full": not attention, "full UNet, half tower": not unet,
                "bfloat16 and half": True}[how]
        state[k] = v.to(torch.bfloat16 if how.startswith("bf") and unet and not attention else torch.float16) if half else v
    save_file(state, tmp_path / "mixed.safetensors")
    package = find(tmp_path / "mixed.safetensors")
    counts = {}
    for k, v in state.items():
        if k.startswith(keys.UNET):
            counts[v.dtype] = counts.get(v.dtype, 0) + v.numel()
    wanted = max(counts, key=counts.get)
    assert stored(package.unet) == wanted
    c = build(package, CPU, None)
    assert {p.dtype for m in (c.unet, *c.text) for p in m.parameters()} == {wanted}
    assert len({p.dtype for p in c.vae.parameters()}) == 1
    model = p2p.load(tmp_path / "mixed.safetensors", device="cpu", dtype=wanted)
    r = p2p.edit(model, "a cat", "a dog", steps=1, height=16, width=16)
    assert r.settings["dtype"] == str(wanted).removeprefix("torch.") and r.latents.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- autoencoders

@pytest.mark.slow
def test_a_checkpoint_without_autoencoder_takes_another(made, single, plain, tmp_path):
    """From a file, a whole file, a folder, a whole folder; of a diffusers folder the file in it."""
    _, _, folder = made
    state = load_file(single)
    without = {k: v for k, v in state.items() if not k.startswith(keys.VAE)}
    save_file(without, tmp_path / "bare.safetensors")
    save_file({k.removeprefix(keys.VAE): v for k, v in state.items() if k.startswith(keys.VAE)}, tmp_path / "vae.safetensors")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    want = plain.vae.state_dict()
    places = [tmp_path / "vae.safetensors", single, folder, folder / "vae", folder / "vae" / "diffusion_pytorch_model.safetensors"]
    for model in (tmp_path / "bare.safetensors", bare):
        found = [load(model, vae=place) for place in places]
        for got in found:
            assert all(torch.equal(v, want[k]) for k, v in got.vae.state_dict().items()) and got.size == found[1].size   # of `single`
        with pytest.raises(CheckpointError, match="no autoencoder found in it; give one with vae"):
            load(model)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "bare.safetensors", vae="./absent/vae")


@pytest.mark.slow
def test_the_scale_of_latents_is_that_of_the_autoencoder_that_says_one(made, single, tmp_path):
    _, _, folder = made
    other = shutil.copytree(folder / "vae", tmp_path / "vae")
    config = json.loads((other / "config.json").read_text()) | {"scaling_factor": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    assert load(single, vae=other).latent_scale == 0.5
    assert load(single, vae=single).latent_scale == load(folder).latent_scale   # as it was written into the file


def test_autoencoders_of_other_kinds_are_refused(made, single, tmp_path):
    save_file({"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "taesd.safetensors")
    with pytest.raises(CheckpointError, match="a tiny autoencoder"):
        load(single, vae=tmp_path / "taesd.safetensors")
    wide = diffusers.AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
                                   up_block_types=("UpDecoderBlock2D",) * 2)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="its latents have 16 channels, those of the UNet 4"):
        load(single, vae=tmp_path / "wide")


# ---------------------------------------------------------------------------------------------------------------- clip skip

@pytest.mark.slow
def test_clip_skip_is_that_of_diffusers(made, single, plain):
    """SD 1 and 2: hidden_states[-(1 + n)] and the last LayerNorm; SDXL: [-(2 + n)] of both towers, the pooled text as before."""
    family, parts, _ = made
    model = load(single, clip_skip=1)
    got = model.condition(PROMPTS)
    if family == "sdxl":
        want = torch.cat([hidden(parts[n], model, i, 2) for i, n in enumerate(("text_encoder", "text_encoder_2"))], dim=-1)
        assert torch.equal(got.vector, plain.condition(PROMPTS).vector)
    else:
        tower = parts["text_encoder"]
        norm = getattr(tower, "text_model", tower).final_layer_norm
        with torch.no_grad():
            want = norm(hidden(tower, model, 0, 1))
    close(got.context, want)
    assert (got.context - plain.text(PROMPTS)).abs().max() > 1e-2 and any("clip skip 1" in n for n in model.notes)
    for wrong in (9, -1, 1.5, True, "2"):
        with pytest.raises(CheckpointError, match="clip_skip .* a whole number from 0 to"):
            load(single, clip_skip=wrong)


@pytest.mark.slow
def test_a_config_that_leaves_out_layers_of_its_file(made, tmp_path):
    """num_hidden_layers one less than the layers of the file: as transformers reads it, the pooled text too."""
    family, _, folder = made
    xl, other = family == "sdxl", shutil.copytree(folder, tmp_path / "m")
    where = other / ("text_encoder_2" if xl else "text_encoder")
    config = json.loads((where / "config.json").read_text())
    n = config["num_hidden_layers"]
    (where / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n - 1}))
    model = load(other)
    theirs = (transformers.CLIPTextModelWithProjection if xl else transformers.CLIPTextModel).from_pretrained(where)
    with torch.no_grad():
        out = theirs(model.text_encoders[-1].tokenize(PROMPTS), output_hidden_states=True)
    want, got = out.hidden_states[-2] if xl else out.last_hidden_state, model.condition(PROMPTS)
    close(got.context[..., -want.shape[-1]:], want)
    if xl:
        close(got.vector[:, :families.POOLED], out.text_embeds)
    assert any(f"uses {n - 1} of the {n} layers" in note for note in model.notes)


def test_models_without_clip_have_nothing_to_skip(sd1_file):
    for asked, said in ((dict(clip_skip=1), "from 0 to 0"), (dict(ema=True), "leave out ema"), (dict(vae=sd1_file), "leave out vae")):
        with pytest.raises(CheckpointError, match=said):
            p2p.load("emoji", device="cpu", **asked)


# -------------------------------------------------------------------------------------------------- what is asked, and notes

@pytest.mark.slow
def test_zero_terminal_snr_can_be_asked_for(single):
    plain, model = load(single, prediction="v"), load(single, prediction="v", zero_snr=True)
    assert torch.equal(model.alphas_cumprod, zero_terminal_snr(plain.alphas_cumprod)) and model.alphas_cumprod[-1] == 0
    assert model.schedule(7).timesteps == plain.schedule(7).timesteps and model.schedule(7).levels != plain.schedule(7).levels
    assert all(torch.equal(a, b) for a, b in zip(model.unet.state_dict().values(), plain.unet.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda abar: abar, zero_terminal_snr], ids=["usual", "zero SNR"])
def test_a_usual_schedule_in_less_precision_is_the_usual_one(sd1_file, tmp_path, dtype, change):
    """In single as the original files have it, in half as files whose every tensor was cast."""
    tensors, usual = load_file(sd1_file), change(scaled_linear())
    save_file(tensors | {"alphas_cumprod": usual.to(dtype)}, tmp_path / "half.safetensors")
    found = find(tmp_path / "half.safetensors", family="sd1", prediction="eps")
    assert torch.equal(found.alphas_cumprod, usual) and bool(found.notes) == (change is zero_terminal_snr)


@pytest.mark.slow
def test_a_guessed_prediction_is_said_in_every_run(made, single, tmp_path, capsys):
    """Of a file that does not say it; ours do, in their metadata."""
    family, _, folder = made
    silent = tmp_path / "m.safetensors"
    save_file(load_file(single), silent)
    argv = ["generate", "a cat", "--steps", "1", "--height", "16", "--width", "16", "-q", "-o", str(tmp_path)]
    for path, options, said in ((silent, [], 1), (silent, ["--prediction", "v"], 0), (single, [], 0), (folder, [], 0)):
        assert main([*argv, "--model", str(path), *options]) == 0
        notes = [n for n in capsys.readouterr().err.splitlines() if n.startswith(f"note: {family}, predicting")]
        assert len(notes) == said and all("give prediction if it is wrong" in n for n in notes)


@pytest.mark.slow
def test_the_size_of_sd2_follows_the_prediction_that_was_asked_for(sd2, tmp_path):
    save_file(sd2[2], tmp_path / "m.safetensors")
    assert [find(tmp_path / "m.safetensors", prediction=p).size[0] for p in ("eps", "v")] == [512, 768]


@pytest.mark.slow
def test_guidance_0_is_the_prompt_alone(single, plain, tmp_path, capsys):
    """As 1 is, and as elsewhere: other prompts give other pictures, and no other row of the network is run."""
    model = plain
    common = dict(steps=2, height=16, width=16)
    for a, b in ((0, 1), (0.0, 1.0)):
        zero, one = (p2p.generate(model, ["a cat", "a dog"], guidance_scale=g, **common) for g in (a, b))
        assert torch.equal(zero.latents, one.latents) and zero.rows == one.rows == 4 and zero.settings["guidance_scale"] == 1
        assert (zero.latents[0] - zero.latents[1]).abs().max() > 1e-3
    edits = [p2p.edit(model, "a cat", "a dog", guidance_scale=g, **common).latents for g in (0, 1)]
    assert torch.equal(*edits)
    inverted = [p2p.invert(model, zero.images[0], "a cat", method="null-text", guidance_scale=g, inner_steps=1, **common)
                for g in (0, 1)]
    assert [i.guidance_scale for i in inverted] == [1, 1] and torch.equal(inverted[0].null_context, inverted[1].null_context)
    assert main(["generate", "a cat", "--cfg", "0", "--steps", "1", "--height", "16", "--width", "16", "--model", str(single), "-o",
                 str(tmp_path)]) == 0
    assert read_settings(capsys.readouterr().out.split()[0])["guidance_scale"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("told", ['{"height": 0, "width": 64}', '{"height": 64}', '{"height": "64", "width": 64}', '{"height": 1e9, "width": 64}',
                                  '{"height": true, "width": 64}', "[64, 64]", "{"])
def test_a_files_own_size_is_checked(told, sd1_file, tmp_path):
    """Height and width, in pixels, as `convert` notes them where they are not the family's."""
    save_file(load_file(sd1_file), tmp_path / "m.safetensors", {"p2p.size": told})
    with pytest.raises(CheckpointError, match="p2p.size"):
        find(tmp_path / "m.safetensors")
    save_file(load_file(sd1_file), tmp_path / "n.safetensors", {"p2p.size": '{"height": 96, "width": 64}'})
    assert find(tmp_path / "n.safetensors").size == (96, 64)
