"""Files of Stable Diffusion 3 and FLUX: every form in which they are found gives the same model; others are refused by name."""
import inspect
import json
import math
import shutil

import flow_models as made
import published
import pytest
import torch
from oracles import diffusers
from safetensors.torch import load_file, save_file
from test_configs import changed, laid_out

import p2p
from p2p import CheckpointError
from p2p.models import mmdit
from p2p.models.vae import FLUX as VAE_FLUX
from p2p.models.vae import SD3 as VAE_SD3
from p2p.weights import fields
from p2p.weights.convert import convert
from p2p.weights.inspect import report
from p2p.weights.load import find, find_vae
from p2p.weights.mmdit import T5
from p2p.weights.scheduler import Flow

pytestmark = pytest.mark.slow

UNET = "model.diffusion_model."
DYNAMIC = ((256.0, 0.5), (4096.0, 1.15))
FULL = {"3 medium": mmdit.SD3, "3.5 large": mmdit.SD35_LARGE, "3.5 medium": mmdit.SD35_MEDIUM, "dev": mmdit.FLUX_DEV,
        "schnell": mmdit.FLUX_SCHNELL}
LEVELS = {"dev": Flow(dynamic=DYNAMIC), "schnell": Flow()}


# ------------------------------------------------------------------------------------------------------- full-size configs

@pytest.mark.parametrize("kind", published.FLOWS)
def test_published_configs_are_taken_as_they_are(kind, tmp_path):
    p = find(laid_out(tmp_path, published.FLOWS[kind]))
    assert (p.family, p.kind, p.prediction, p.size, p.notes) == (made.FAMILY[kind], kind, "flow", (1024, 1024), [])
    assert p.unet.config == FULL[kind] and p.sampling.flow == LEVELS.get(kind, Flow(3.0, twice=True))
    assert p.vae.config == (VAE_SD3 if made.FAMILY[kind] == "sd3" else VAE_FLUX) and not p.alphas_cumprod.numel()
    assert p.latent_scale == (1.5305 if made.FAMILY[kind] == "sd3" else 0.3611)
    assert [(t.config.pad_id, t.config.skip) for t in p.text] == ([(49407, 1), (0, 1)] if made.FAMILY[kind] == "sd3" else [(49407, 0)])


@pytest.mark.parametrize("table, name", [
    (fields.SD3, "SD3Transformer2DModel"), (fields.FLUX, "FluxTransformer2DModel"), (fields.FLOW_INDEX, "StableDiffusion3Pipeline"),
    (fields.FLOW_INDEX, "FluxPipeline"), (fields.FLOW_SCHEDULER, "FlowMatchEulerDiscreteScheduler")])
def test_every_field_of_diffusers_is_in_a_table(table, name):
    kinds = [set(names) - {"_class_name"} for names in (table.used.split(), table.supported, " ".join(table.idle).split())]
    assert set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"} <= set().union(*kinds)
    assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2])


T, S, V = "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"
ODD = {   # a field away from what is supported, and what is said of it
    "3.5 medium": [
        (T, {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm'"), (T, {"dual_attention_layers": [24]}, "dual_attention_layers"),
        (T, {"caption_projection_dim": 1024}, "caption_projection_dim = 1024, but its heads have 1536"),
        (T, {"num_layers": None}, "num_layers: null"), (T, {"num_attention_heads": [24]}, "one number is expected"),
        (T, {"in_channels": 33}, "no text-to-image model: it takes 33 channels of latents and gives 16"),
        (T, {"attention_mode": "new"}, "attention_mode = 'new' .not known"), (T, {"joint_attention_dim": 2048}, "It mixes two models"),
        (T, {"pooled_projection_dim": 768}, "It mixes two models"), (T, {"sample_size": -1}, "sample_size = -1"),
        (T, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .'bitsandbytes', by its quantization_config"),
        ("text_encoder_3/config.json", {"quantization_config": {"quant_method": "quanto"}}, "quantised .'quanto'"),
        (S, {"use_karras_sigmas": True}, "use_karras_sigmas = True"), (S, {"stochastic_sampling": True}, "stochastic_sampling = True"),
        (S, {"invert_sigmas": True}, "invert_sigmas = True"), (S, {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        (S, {"use_beta_sigmas": True}, "use_beta_sigmas"), (S, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (S, {"num_train_timesteps": 500}, "num_train_timesteps"), (S, {"shift": 0}, "a shift above 0"), (S, {"shift": None}, "a shift above 0"),
        (S, {"shift": "3"}, "shift = '3'"), (S, {"_class_name": "DDIMScheduler"}, "_class_name = 'DDIMScheduler' .supported: 'FlowMatchEuler"),
        (S, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeun"),
        (V, {"use_quant_conv": True}, "both or neither"), (V, {"latents_mean": [0.0]}, "latents_mean"), (V, {"shift_factor": "x"}, "shift_factor"),
        (V, {"latent_channels": 4}, "its latents have 4 channels, those of the transformer 16"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "its text_encoder is"),
        ("model_index.json", {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "UniPCMultistepScheduler"),
        ("model_index.json", {"controlnet": ["diffusers", "SD3ControlNetModel"]}, "controlnet")],
    "dev": [
        (T, {"in_channels": 384, "out_channels": 64}, "FLUX.1 Fill: it takes 96 channels"), (T, {"patch_size": 2}, "patch_size = 2"),
        (T, {"in_channels": 128, "out_channels": 64}, "FLUX.1 Canny or Depth"), (T, {"in_channels": 63}, "patches of 2 x 2"),
        (T, {"axes_dims_rope": [16, 56, 58]}, "whose sum is 128"), (T, {"axes_dims_rope": [15, 57, 56]}, "three even numbers"),
        (T, {"axes_dims_rope": [64, 64]}, "three even numbers"), (T, {"guidance_embeds": "yes"}, "guidance_embeds"),
        (S, {"time_shift_type": "linear"}, "time_shift_type = 'linear'"), (S, {"max_image_seq_len": 256}, "more tokens at the maximum"),
        (S, {"base_shift": None}, "base_shift = None"), (S, {"use_flow_sigmas": True}, "use_flow_sigmas")]}


@pytest.mark.parametrize("kind, file, values, said", [(kind, *odd) for kind, each in ODD.items() for odd in each],
                         ids=lambda x: None if isinstance(x, str) else ",".join(x))
def test_fields_that_would_change_pixels_are_refused(kind, file, values, said, tmp_path):
    with pytest.raises(CheckpointError, match=said) as error:
        find(changed(laid_out(tmp_path, published.FLOWS[kind]), file, **values))
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("family, c, wanted", [
    ("sd3", {"shift": 1.5}, Flow(1.5, twice=True)), ("sd3", {}, Flow(1.0, twice=True)), ("flux", {"shift": 3.0}, Flow(3.0)),
    ("flux", {"use_dynamic_shifting": True, "base_shift": 0.4, "max_image_seq_len": 1024}, Flow(dynamic=((256.0, 0.4), (1024.0, 1.15)))),
    ("sd3", {"use_dynamic_shifting": True}, Flow(twice=True, dynamic=DYNAMIC))])
def test_levels_by_the_scheduler(family, c, wanted, tmp_path):
    files = published.SD3_MEDIUM if family == "sd3" else published.FLUX_DEV
    files = files | {S: {"_class_name": "FlowMatchEulerDiscreteScheduler"} | c}
    assert find(laid_out(tmp_path, files)).sampling.flow == wanted


def test_a_dev_without_a_guidance_embedding_is_told_by_its_levels(tmp_path):
    """As dev is when its guidance was trained out of it; schnell's levels are not shifted."""
    shifted = {T: published.FLUX_SCHNELL[T], S: published.FLUX_DEV[S]}
    unguided = find(laid_out(tmp_path / "dev", published.FLUX_DEV | shifted))
    assert (unguided.kind, unguided.notes, unguided.unet.config.guidance) == ("dev", [], False)
    bare = laid_out(tmp_path / "bare", published.FLUX_SCHNELL)
    (bare / S).unlink()
    assert find(bare).kind == "schnell" and "taken for FLUX.1 schnell" in find(bare).notes[0]


@pytest.mark.parametrize("kind, what", [
    ("FluxFillPipeline", "FLUX.1 Fill, a FluxFillPipeline; supported"), ("FluxKontextPipeline", "FLUX.1 Kontext"),
    ("FluxControlPipeline", "FLUX.1 Canny or Depth"), ("FluxPriorReduxPipeline", "FLUX.1 Redux"), ("Flux2Pipeline", "FLUX.2"),
    ("SanaPipeline", "a SanaPipeline; supported: .*FluxPipeline")])
def test_folders_of_other_models_are_named(kind, what, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(CheckpointError, match=what):
        find(tmp_path)


# -------------------------------------------------------------------------------------------------------------- small models

@pytest.fixture(scope="module", params=made.KINDS)
def saved(request, tmp_path_factory):
    """(kind, diffusers' pipeline, its folder, the same in a single file)"""
    root = tmp_path_factory.mktemp("flow")
    pipe = made.pipeline(request.param, root, {"shift": 2.5})
    pipe.save_pretrained(root / "folder")
    for words in {"tokenizer", "tokenizer_2"} - {f"tokenizer{T5[made.FAMILY[request.param]]}"}:   # long files, which are CLIP's
        (root / "folder" / words / "tokenizer.json").unlink(missing_ok=True)
    convert(find(root / "folder"), root / "one.safetensors")
    return request.param, pipe, root / "folder", root / "one.safetensors"


def network(package):
    """The transformer alone."""
    from p2p.weights.fill import fill

    return fill("transformer", package.unet, mmdit.build, torch.device("cpu"), torch.float32)


def test_the_transformer_is_that_of_diffusers(saved):
    """What shapes do not tell is in the config: heads, the shares of rotary positions, where attention is dual."""
    kind, pipe, folder, one = saved
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 16, 8, 12, generator=g), torch.randn(2, 9, made.WIDTH, generator=g)
    t, pooled = torch.tensor([250.0, 900.0]), torch.randn(2, pipe.transformer.config.pooled_projection_dim, generator=g)
    guidance = torch.tensor([3.5, 2.0]) if kind == "dev" else None
    with torch.no_grad():
        if made.FAMILY[kind] == "sd3":
            wanted = pipe.transformer(x, context, pooled, t).sample
        else:
            ids = pipe._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
            wanted = pipe.transformer(pipe._pack_latents(x, 2, 16, 8, 12), context, pooled, t / 1000, ids, torch.zeros(9, 3), guidance)
            wanted = pipe._unpack_latents(wanted.sample, 64, 96, 8)
        for source in (folder, one):
            ours = network(find(source))(x, t, context, vector=pooled, guidance=guidance)[0]
            assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max() and wanted.std() > 0.1


def bare(one, to, prefix):
    """The transformer alone, as its authors publish it."""
    state = {prefix + k.removeprefix(UNET): v for k, v in load_file(one).items() if k.startswith(UNET)}
    with_header = {k: v for k, v in header(one).items() if k == "p2p.transformer_config"}
    save_file(state, to, with_header)
    return to


def header(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def forms(kind, pipe, folder, one, root):
    """(name, path, more arguments of `find`) of every form in which the model may be found."""
    yield "folder", folder, {}
    yield "single file", one, {}
    ae = {k.removeprefix("first_stage_model."): v for k, v in load_file(one).items() if k.startswith("first_stage_model.")}
    save_file(ae, root / "ae.safetensors")
    for name, prefix in (("bare", ""), ("with prefix", UNET)):
        yield name, bare(one, root / f"{name}.safetensors", prefix), {"vae": root / "ae.safetensors"}
    state = load_file(one)
    save_file({k.replace("first_stage_model.", "vae."): v for k, v in state.items()}, root / "comfy.safetensors", header(one))
    yield "ComfyUI's", root / "comfy.safetensors", {}
    if kind.startswith("3.5"):   # the others' miniatures are told by their metadata, which a pickle has not
        torch.save({"state_dict": {k: v for k, v in state.items() if k.startswith(UNET)}}, root / "pickled.ckpt")
        yield "pickled", root / "pickled.ckpt", {"vae": root / "ae.safetensors"}
    shards = root / "shards"
    shutil.copytree(folder, shards)
    shutil.rmtree(shards / "transformer")
    pipe.transformer.save_pretrained(shards / "transformer", max_shard_size="200KB")
    assert len(list((shards / "transformer").glob("*-of-*.safetensors"))) > 1
    yield "shards", shards, {}
    variant = root / "variant"
    shutil.copytree(folder, variant)
    weights = variant / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    yield "variant", variant, {}


def test_every_form_gives_the_same_transformer(saved, tmp_path):
    kind, pipe, folder, one = saved
    wanted = None
    for name, path, more in forms(kind, pipe, folder, one, tmp_path):
        p = find(path, family=made.FAMILY[kind], **more)
        found = network(p)
        wanted = wanted or (p, found)
        assert p.unet.config == wanted[0].unet.config and made.same(found, wanted[1]), name
        assert (p.kind, p.prediction, p.vae.config.quant_conv) == (kind, "flow", False)
        assert len(p.text) == (0 if more else 2 if p.family == "sd3" else 1) and (p.t5 is None) == bool(more), name


# of 3.5: CONFIGS of Stability's sd3_infer.py; the others: the examples of diffusers' pipelines
USUAL = {"3 medium": (28, 7.0), "3.5 medium": (50, 5.0), "3.5 large": (40, 4.5), "dev": (50, 3.5), "schnell": (4, 1.0)}


def test_latents_are_those_of_diffusers(saved):
    kind, pipe, folder, one = saved
    g = torch.Generator().manual_seed(0)
    x, z = torch.rand(1, 3, 32, 48, generator=g) * 2 - 1, torch.randn(1, 16, 8, 8, generator=g)
    c = pipe.vae.config
    with torch.no_grad():
        encoded = (pipe.vae.encode(x).latent_dist.mean - c.shift_factor) * c.scaling_factor
        decoded = pipe.vae.decode(z / c.scaling_factor + c.shift_factor).sample
    for source, more in ((folder, {}), (one, {"text": folder})):
        model = p2p.load(source, device="cpu", **more)
        assert (model.encode(x) - encoded).abs().max() <= 1e-5 * encoded.abs().max()
        assert (model.decode(z) - decoded).abs().max() <= 1e-5 * decoded.abs().max()
        assert model.unit == 4 and model.latent_shape(32, 48) == (16, 16, 24)
        assert (model.steps, model.guidance_scale) == USUAL[kind]


def test_converted_both_ways_it_is_the_same(saved, tmp_path):
    """Folder to file to folder, tensor by tensor; the levels and what shapes do not tell with it."""
    kind, pipe, folder, one = saved
    convert(find(folder), tmp_path / "again")
    assert find(folder).why == "scheduler_config.json" and find(one).why == "its metadata"
    for path in (tmp_path / "again", one):
        p, q = find(folder), find(path)
        assert q.size == p.size
        assert (q.family, q.kind, q.sampling.flow, q.unet.config) == (p.family, kind, Flow(2.5, twice=p.family == "sd3"), p.unet.config)
        assert q.vae.config == p.vae.config and q.latent_scale == p.latent_scale == 1.5
        assert [t.config for t in q.text] == [t.config for t in p.text]
    again = {"3": diffusers.StableDiffusion3Pipeline, "d": diffusers.FluxPipeline, "s": diffusers.FluxPipeline}[kind[0]]
    theirs = again.from_pretrained(tmp_path / "again")
    for name, part in pipe.components.items():
        if hasattr(part, "state_dict"):
            assert made.same(part, getattr(theirs, name)), name
    assert theirs.scheduler.config.shift == 2.5
    for name, value in pipe.transformer.config.items():
        if not name.startswith("_"):
            assert json.dumps(theirs.transformer.config[name]) == json.dumps(value), name
    if made.FAMILY[kind] == "sd3":
        with pytest.raises(CheckpointError, match="its T5 has no tokenizer, which a folder needs"):
            convert(find(one), tmp_path / "no tokenizer")
        assert not (tmp_path / "no tokenizer").exists()
    if find(one).t5 is not None:
        convert(find(one), tmp_path / "back", text=folder)
        theirs = again.from_pretrained(tmp_path / "back")
        assert all(made.same(part, getattr(theirs, name)) for name, part in pipe.components.items() if hasattr(part, "state_dict"))
        tokenizer = f"tokenizer{T5[made.FAMILY[kind]]}"
        assert {p.name: p.read_bytes() for p in (folder / tokenizer).iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "back" / tokenizer).iterdir()}
        with pytest.raises(CheckpointError, match="no T5's tokenizer there"):
            convert(find(one), tmp_path / "none", text=tmp_path)
        with pytest.raises(CheckpointError, match="goes into a single file.*leave out text"):
            convert(find(one), tmp_path / "one.safetensors", text=folder)


@pytest.mark.parametrize("damage, said", [
    (lambda s: s.pop("encoder.block.0.layer.0.SelfAttention.v.weight"), "1 missing: .*SelfAttention.v.weight"),
    (lambda s: s.update({"encoder.final_layer_norm.weight": torch.ones(5)}), r"final_layer_norm.weight is \[5\]"),
    (lambda s: s["shared.weight"].fill_(math.nan), "embed_tokens.weight holds values that are not finite"),
    (lambda s: s.update({"shared.weight": s["shared.weight"].to(torch.float8_e4m3fn)}), "embed_tokens.weight is fp8"),
    (lambda s: s.update({"encoder.more.weight": torch.ones(5)}), "1 unexpected: encoder.more.weight")])
def test_a_damaged_t5_is_not_copied(saved, tmp_path, damage, said):
    """The words' embedding is named as in the encoder."""
    kind, folder = saved[0], saved[2]
    where = tmp_path / "m" / f"text_encoder{T5[made.FAMILY[kind]]}" / "model.safetensors"
    shutil.copytree(folder, tmp_path / "m")
    state = load_file(where)
    damage(state)
    save_file(state, where)
    for out in ("folder", "one.safetensors"):
        with pytest.raises(CheckpointError, match=said):
            convert(find(tmp_path / "m"), tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_inspect_says(saved):
    kind, pipe, folder, one = saved
    for path in (folder, one):
        lines = report(path)
        assert f"family      {made.FAMILY[kind]} {kind}" in lines and any(line.startswith("prediction  flow (") for line in lines)
        kinds = [line[:12].strip() for line in lines[4:]]
        assert kinds[:1] == ["transformer"] and kinds.count("T5") == 1 and kinds.count("text tower") == (2 if kind[0] == "3" else 1)
        count = sum(p.numel() for p in pipe.transformer.parameters()) + (9216 if made.FAMILY[kind] == "sd3" else 0)
        assert any(f" {count:,} parameters" in line for line in lines if line.startswith("transformer"))


def test_turbo_and_kontext_are_told_by_their_names(saved, tmp_path):
    kind, _, _, one = saved
    ae = tmp_path / "ae.safetensors"
    save_file({k.removeprefix("first_stage_model."): v for k, v in load_file(one).items() if k.startswith("first_stage_model.")}, ae)
    named = bare(one, tmp_path / "sd3.5_large_TURBO.safetensors", "")
    p = find(named, vae=ae)
    assert p.kind == (f"{kind} turbo" if made.FAMILY[kind] == "sd3" else kind)
    assert any("by its name a turbo model" in note for note in p.notes) == (made.FAMILY[kind] == "sd3")
    assert any("if it is FLUX.1 Kontext" in note for note in p.notes) == (kind == "dev")
    named.rename(tmp_path / "flux1-kontext-dev.safetensors")
    if made.FAMILY[kind] == "flux":
        with pytest.raises(CheckpointError, match="by its name FLUX.1 Kontext"):
            find(tmp_path / "flux1-kontext-dev.safetensors", vae=ae)


def test_what_is_asked_of_a_flow_in_vain(saved, tmp_path):
    kind, _, folder, one = saved
    family = made.FAMILY[kind]
    for asked, said in ((dict(prediction="eps"), "are flows; leave out prediction"), (dict(zero_snr=True), "leave out zero_snr"),
                        (dict(ema=True), "leave out ema"), (dict(family="sdxl"), f"a model of the family {family}")):
        with pytest.raises(CheckpointError, match=said):
            find(one, **asked)
    assert find(folder, prediction="flow").why == "as asked"
    ae = tmp_path / "ae.safetensors"
    save_file({k.removeprefix("first_stage_model."): v for k, v in load_file(one).items() if k.startswith("first_stage_model.")}, ae)
    with pytest.raises(CheckpointError, match="no autoencoder found in it; give one with vae"):
        find(bare(one, tmp_path / "bare.safetensors", ""))
    with pytest.raises(CheckpointError, match="no CLIP towers in it .*give the folder of a model that has it, as text"):
        p2p.load(tmp_path / "bare.safetensors", device="cpu", vae=ae)
    model = p2p.load(tmp_path / "bare.safetensors", device="cpu", vae=ae, text=folder)
    assert len(model.text_encoders) == (3 if family == "sd3" else 2) and model.identity()["text"] and model.identity()["vae"]
    assert find_vae(ae)[0].config.shift == 0 and model.vae.config.shift == (VAE_SD3 if family == "sd3" else VAE_FLUX).shift
