"""`p2p.load(pipe)` of Stable Diffusion 3 and FLUX: the model of the folder that it would be saved to, T5 and its tokenizer with it."""
import json
import logging

import flow_models as made
import pytest
import tokenizers
import torch
from oracles import diffusers, transformers
from test_pipeline_in_memory import added

import p2p
from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.weights.convert import convert
from p2p.weights.load import find

pytestmark = pytest.mark.slow

SMALL = dict(steps=2, height=32, width=32, seed=3)


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """As diffusers saves them."""
    out = {}
    for kind in made.KINDS:
        where = tmp_path_factory.mktemp("flow")
        made.pipeline(kind, where / "towers").save_pretrained(where / "model")
        out[kind] = where / "model"
    return out


def pipeline(folder, kind=None):
    return (kind or diffusers.DiffusionPipeline).from_pretrained(folder)


def latents(model, **more):
    return p2p.edit(model, "a cat on grass", "a dog on grass", **SMALL, **more).latents


@pytest.mark.parametrize("kind", made.KINDS)
def test_it_is_the_model_of_its_folder_and_copies_nothing(folders, kind):
    pipe = pipeline(folders[kind])
    model, saved = p2p.load(pipe, device="cpu"), p2p.load(folders[kind], device="cpu")
    assert added(model, pipe)[0] == 0 and model.notes == saved.notes
    assert (model.steps, model.guidance_scale, model.flow, model.size) == (saved.steps, saved.guidance_scale, saved.flow, saved.size)
    result, same = (p2p.edit(m, "a cat on grass", "a dog on grass", **SMALL) for m in (model, saved))
    assert torch.equal(result.latents, same.latents) and result.images[1].tobytes() == same.images[1].tobytes()


def test_a_picture_is_made_again_from_its_folder(folders, tmp_path):
    result = p2p.edit(p2p.load(pipeline(folders["dev"])), "a cat on grass", "a dog on grass", **SMALL)
    result.save(tmp_path / "made")
    png = next((tmp_path / "made").rglob("edit.png"))
    assert main(["edit", "--from", str(png), "--model", str(folders["dev"]), "--device", "cpu", "-o", str(tmp_path / "again"), "-q"]) == 0
    again = p2p.image.open_picture(next((tmp_path / "again").rglob("edit.png")))
    assert again.tobytes() == result.images[1].tobytes()


def test_it_is_written_with_its_tokenizer(folders, tmp_path):
    convert(find(pipeline(folders["3 medium"])), tmp_path / "written")
    assert torch.equal(latents(p2p.load(tmp_path / "written", device="cpu")), latents(p2p.load(folders["3 medium"], device="cpu")))


@pytest.mark.parametrize("kind, name", [
    ("3.5 medium", "transformer_blocks.0.attn.to_k.weight"), ("3.5 medium", "transformer_blocks.0.attn2.to_q.bias"),
    ("dev", "single_transformer_blocks.1.attn.to_v.weight"), ("dev", "norm_out.linear.weight"),
    ("dev", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight")])
def test_a_change_of_a_weight_changes_the_model(folders, kind, name):
    pipe = pipeline(folders[kind])
    part = pipe.text_encoder_2 if name.startswith("text_encoder_2") else pipe.transformer
    model = p2p.load(pipe)
    before = p2p.edit(model, "a cat on grass", "a dog on grass", **SMALL)
    with torch.no_grad():
        weight = dict(part.named_parameters())[name.removeprefix("text_encoder_2.")]
        weight.add_(torch.linspace(0, 1, weight.numel()).view_as(weight))
    after = p2p.edit(model, "a cat on grass", "a dog on grass", **SMALL)
    assert not torch.equal(before.latents, after.latents) and before.settings["sha256"] != after.settings["sha256"]
    assert torch.equal(after.latents, latents(p2p.load(pipe)))


def test_levels_and_words_are_part_of_its_identity(folders):
    pipe = pipeline(folders["3 medium"])
    plain = p2p.load(pipe).sha256
    assert plain == p2p.load(pipe).sha256
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5)
    shifted = p2p.load(pipe)
    assert shifted.flow.shift == 1.5 and shifted.sha256 != plain
    pipe = pipeline(folders["3 medium"])
    said = json.loads(pipe.tokenizer_3.backend_tokenizer.to_str())
    said["normalizer"] = {"type": "Lowercase"}   # the same words, found in another way
    pipe.tokenizer_3 = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(said)),
                                                            pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert p2p.load(pipe).sha256 != plain


@pytest.mark.parametrize("kind, variant", [("3 medium", "Img2Img"), ("3 medium", "Inpaint"), ("schnell", "Img2Img"), ("schnell", "Inpaint")])
def test_pipelines_of_the_same_parts(folders, kind, variant):
    name = f"{'StableDiffusion3' if kind == '3 medium' else 'Flux'}{variant}Pipeline"
    model = p2p.load(pipeline(folders[kind], getattr(diffusers, name)))
    assert torch.equal(latents(model), latents(p2p.load(folders[kind], device="cpu"))) and model.places == {"pipeline": name}


def test_text_may_come_from_elsewhere(folders):
    want = latents(p2p.load(folders["3 medium"], device="cpu"))
    pipe = pipeline(folders["3 medium"])
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    without = p2p.load(pipe)
    assert any("it has no T5, so that T5's text is left out" in note for note in without.notes)
    assert not torch.equal(latents(without), want)
    assert torch.equal(latents(p2p.load(pipe, text=folders["3 medium"])), want)
    pipe.text_encoder = pipe.tokenizer = pipe.text_encoder_2 = pipe.tokenizer_2 = None
    assert torch.equal(latents(p2p.load(pipe, text=folders["3 medium"])), want)
    with pytest.raises(CheckpointError, match="StableDiffusion3Pipeline in memory: no CLIP towers in it"):
        p2p.load(pipe)


def test_a_shorter_dtype_is_copied_and_said(folders):
    pipe = pipeline(folders["dev"])
    model = p2p.load(pipe, dtype=torch.bfloat16)
    assert any("copies of the pipeline's" in note for note in model.notes) and pipe.transformer.dtype == torch.float32
    half = pipe.to(torch.bfloat16)
    assert added(p2p.load(half, dtype=torch.bfloat16), half)[0] == 0


@pytest.mark.parametrize("kind", ["3 medium", "dev"])
def test_a_wider_one_is_read_from_the_same_memory(folders, tmp_path, kind):
    pipe = pipeline(folders[kind]).to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "saved")
    model, saved = p2p.load(pipe, device="cpu"), p2p.load(tmp_path / "saved", device="cpu")
    before = latents(model)
    assert added(model, pipe)[0] == 0 and model.notes == saved.notes and torch.equal(before, latents(saved))
    digest, t5 = model.sha256, pipe.text_encoder_3 if kind == "3 medium" else pipe.text_encoder_2
    with torch.no_grad():
        t5.encoder.block[0].layer[0].SelfAttention.q.weight.mul_(1.5)
    assert not torch.equal(latents(model), before) and model.sha256 != digest


def test_its_own_name_alone_tells_a_turbo_model(folders, tmp_path):
    (tmp_path / "turbo-tests").mkdir()
    for name, steps in (("turbo-tests/mine", 40), ("stable-diffusion-3.5-large-turbo", 4)):
        (tmp_path / name).symlink_to(folders["3.5 large"])
        pipe = pipeline(tmp_path / name)
        assert p2p.load(pipe).steps == p2p.load(tmp_path / name, device="cpu").steps == steps
    pipe.transformer.register_to_config(_name_or_path="")
    assert p2p.load(pipe).steps == 4


def test_offload_is_said_once(folders):
    pipe = pipeline(folders["dev"])
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    assert sum("offload hooks are not used" in note for note in p2p.load(pipe).notes) == 1


@pytest.mark.parametrize("kind", ["3.5 medium", "dev"])
def test_joined_projections_are_refused_until_they_are_parted(folders, kind):
    pipe = pipeline(folders[kind])
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(CheckpointError, match=r"in memory/transformer: .*Fused.*call pipe.transformer.unfuse_qkv_projections\(\)"):
        p2p.load(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(latents(p2p.load(pipe)), latents(p2p.load(folders[kind], device="cpu")))


def changed(name, value=None):
    return lambda pipe: setattr(pipe, name, value)


def own_attention(pipe):
    class Sharpened(diffusers.models.attention_processor.JointAttnProcessor2_0):
        pass

    pipe.transformer.set_attn_processor(Sharpened())


def cached(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


REFUSED = {
    "no transformer": ("dev", changed("transformer"), "FluxPipeline in memory: it has no transformer"),
    "no autoencoder": ("3 medium", changed("vae"), "StableDiffusion3Pipeline in memory: it has no vae"),
    "no scheduler": ("3 medium", changed("scheduler"), "it has no scheduler"),
    "a tower without a tokenizer": ("dev", changed("tokenizer_2"), "it has no tokenizer_2"),
    "one tower of two": ("3 medium", changed("text_encoder_2"), "has the text tower text_encoder alone"),
    "no flow": ("dev", changed("scheduler", diffusers.DDIMScheduler()), "in memory/model_index.json: .*DDIMScheduler"),
    "a cache": ("dev", cached, r"in memory/transformer: a hook, 'fbc_block_hook', .*call pipe.transformer.disable_cache\(\)"),
    "layers left out": ("dev", lambda pipe: diffusers.hooks.apply_layer_skip(pipe.transformer, diffusers.hooks.LayerSkipConfig(
        indices=[0], fqn="transformer_blocks")), "in memory/transformer: a hook, .*load the pipeline anew"),
    "another attention": ("3 medium", own_attention, r"in memory/transformer: its attention is computed by 'Sharpened'.*anew, without it"),
    "eight bits": ("dev", lambda pipe: pipe.transformer.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
    "words of T5 that its network lacks": ("dev", lambda pipe: pipe.tokenizer_2.add_tokens([f"<{i}>" for i in range(9)]),
                                           "in memory: T5's tokenizer cannot be read"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(folders, why):
    kind, change, message = REFUSED[why]
    pipe = pipeline(folders[kind])
    change(pipe)
    with pytest.raises(CheckpointError, match=message) as error:
        p2p.load(pipe)
    assert "/tmp" not in str(error.value) and len(str(error.value)) < 700
