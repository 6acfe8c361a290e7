"""Stable Diffusion 3's and FLUX's transformers against diffusers', with small random weights; names and sizes at full size on
the meta device; edits through whole networks.
"""
from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from oracles import diffusers
from safetensors.torch import save_file

from p2p.models.attention import AttentionEdit, SelfAttention
from p2p.models.layers import widened_names
from p2p.models.mmdit import (
    FLUX_DEV,
    FLUX_SCHNELL,
    SD3,
    SD35_LARGE,
    SD35_MEDIUM,
    Flux,
    MMDiTConfig,
    StableDiffusion3,
    build,
)
from p2p.models.mmdit_blocks import rotation
from p2p.models.vae import FLUX as VAE_FLUX
from p2p.models.vae import SD as VAE_SD
from p2p.models.vae import SD3 as VAE_SD3
from p2p.models.vae import AutoencoderKL, VAEConfig
from p2p.weights.convert import _rename
from p2p.weights.detect import Part, vae_config
from p2p.weights.errors import CheckpointError
from p2p.weights.files import open_file
from p2p.weights.fill import read_tensors
from p2p.weights.keys import ldm_sources, vae_prefixes
from p2p.weights.keys_mmdit import diffusers_sources, transformer_config

L = 7
SMALL_SD3 = MMDiTConfig(in_channels=4, out_channels=4, dim=32, heads=4, double=3, context_dim=24, vector_dim=20, table=12)
SMALL_FLUX = MMDiTConfig(in_channels=4, out_channels=4, dim=64, heads=2, double=2, single=2, context_dim=24, vector_dim=20,
                         qk_norm=True, axes=(4, 14, 14))
SMALL = {"3 medium": SMALL_SD3, "3.5 large": replace(SMALL_SD3, qk_norm=True),
         "3.5 medium": replace(SMALL_SD3, qk_norm=True, dual=(0, 1)),
         "schnell": SMALL_FLUX, "dev": replace(SMALL_FLUX, guidance=True)}
FULL = {"3 medium": SD3, "3.5 large": SD35_LARGE, "3.5 medium": SD35_MEDIUM, "schnell": FLUX_SCHNELL, "dev": FLUX_DEV}
SIZES = [(16, 16), (12, 20)]


def randomised(module):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.state_dict().items():
            scale = 0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=g) * scale + name.endswith((".scale", "ln_q.weight", "ln_k.weight")))
    return module.eval().double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def theirs(c):
    """diffusers' model of those sizes."""
    if c.axes is None:
        return diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=c.patch, in_channels=c.in_channels, num_layers=c.double, out_channels=c.out_channels,
            attention_head_dim=c.dim // c.heads, num_attention_heads=c.heads, caption_projection_dim=c.dim,
            joint_attention_dim=c.context_dim, pooled_projection_dim=c.vector_dim, pos_embed_max_size=c.table,
            dual_attention_layers=c.dual, qk_norm="rms_norm" if c.qk_norm else None)
    return diffusers.FluxTransformer2DModel(
        in_channels=c.patch**2 * c.in_channels, num_layers=c.double, num_single_layers=c.single,
        attention_head_dim=c.dim // c.heads, num_attention_heads=c.heads, joint_attention_dim=c.context_dim,
        pooled_projection_dim=c.vector_dim, guidance_embeds=c.guidance, axes_dims_rope=c.axes)


def renamed(module):
    state = module.state_dict()
    return _rename(iter(state.items()), diffusers_sources(state, module.config))


def told(c, batch=2, **more):
    found = {"context": randn(batch, L, c.context_dim, seed=1), "vector": randn(batch, c.vector_dim, seed=2), **more}
    return found | ({"guidance": torch.linspace(2.5, 4, batch)} if c.guidance else {})


@pytest.fixture(params=SMALL)
def small(request):
    with torch.no_grad():
        yield randomised(build(SMALL[request.param]))


# ------------------------------------------------------------------------------------------------------------ networks

@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers_are_those_of_diffusers(small, size):
    """Under diffusers' names, which `diffusers_sources` lists; fractional timesteps."""
    c, model = small.config, theirs(small.config).eval().double()
    model.load_state_dict(renamed(small), strict=True)
    x, t = randn(2, c.in_channels, *size), torch.tensor([3.25, 981.0])
    given = told(c)
    ours = small(x, t, **given)[0]
    if c.axes is None:
        wanted = model(x, given["context"], given["vector"], t).sample
    else:
        pipe = diffusers.FluxPipeline
        h, w = (side // 2 for side in size)
        ids = pipe._prepare_latent_image_ids(1, h, w, "cpu", torch.float32)
        packed = pipe._pack_latents(x, 2, c.in_channels, *size)
        wanted = model(packed, given["context"], given["vector"], t.double() / 1000, ids, torch.zeros(L, 3), given.get("guidance"))
        wanted = pipe._unpack_latents(wanted.sample, 8 * size[0], 8 * size[1], 8)
    assert ours.shape == wanted.shape and (ours - wanted).abs().max() < 1e-6 and wanted.std() > 0.1


@pytest.mark.parametrize("name", ["3 medium", "3.5 large", "3.5 medium"])
def test_names_are_those_of_diffusers_own_converter(name):
    """Tensor by tensor: it takes all that the module has, and nothing else is there."""
    module = randomised(StableDiffusion3(SMALL[name]))
    state = dict(module.state_dict())
    wanted, ours = convert_sd3_transformer_checkpoint_to_diffusers(state), renamed(module)
    assert not state and ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) for k in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", ["own", "diffusers"])
def test_files_of_both_namings_are_read_back(small, naming, prefix, tmp_path):
    """A bijection: written under other names and read again, every tensor is the same."""
    state = small.state_dict()
    named = renamed(small) if naming == "diffusers" else state
    save_file({prefix + k: v.contiguous() for k, v in named.items()}, tmp_path / "file.safetensors")
    part = Part(open_file(tmp_path / "file.safetensors"), prefix, naming, small.config)
    back = dict(read_tensors(part, build))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.slow
@pytest.mark.parametrize("others", [None, torch.zeros(())], ids=["exchanged", "a number"])
def test_parts_of_other_sizes_are_refused(others, tmp_path):
    """Queries, keys, values and feed-forward that fill one tensor, but each another share of it; or that cannot be joined."""
    module = randomised(Flux(SMALL_FLUX))
    named = renamed(module)
    q, mlp = (f"single_transformer_blocks.0.{of}.bias" for of in ("attn.to_q", "proj_mlp"))
    named[q], named[mlp] = (named[mlp], named[q]) if others is None else (named[q], others)
    save_file(named, tmp_path / "file.safetensors")
    part = Part(open_file(tmp_path / "file.safetensors"), "", "diffusers", module.config)
    with pytest.raises(CheckpointError, match=r"single_transformer_blocks\.0\.attn\.to_q\.bias"):
        list(read_tensors(part, build))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_names_shapes_and_counts(name):
    """Those of diffusers' models with the published sizes, by the tables here and by diffusers' converters; and sizes are read
    back from the shapes of either naming."""
    c = FULL[name]
    with torch.device("meta"):
        ours, wanted = build(c), theirs(c)
    state, shapes = ours.state_dict(), {k: tuple(v.shape) for k, v in wanted.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in renamed(ours).items()} == shapes
    left = dict(state)
    convert = convert_sd3_transformer_checkpoint_to_diffusers if c.axes is None else convert_flux_transformer_checkpoint_to_diffusers
    assert {k: tuple(v.shape) for k, v in convert(left).items()} == shapes and not left
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in wanted.parameters())
    own = {k: tuple(v.shape) for k, v in state.items()}
    assert transformer_config("file", own) == c


@pytest.mark.parametrize("name", SMALL)
def test_sizes_are_read_from_shapes(name):
    """Of small models too; the width of a head where no norm tells it is 64."""
    c = SMALL[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build(c).state_dict().items()}
    assert transformer_config("file", shapes) == (c if c.qk_norm else replace(c, heads=1))


TELL = {   # the tensors whose shapes tell the sizes; of the others the names alone are asked, when they are filled
    "3.5 medium": {"pos_embed", "x_embedder.proj.weight", "y_embedder.mlp.0.weight", "context_embedder.weight",
                   "joint_blocks.0.x_block.mlp.fc1.weight", "final_layer.linear.weight"},
    "dev": {"img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.query_norm.scale",
            "double_blocks.0.img_mlp.0.weight", "final_layer.linear.weight"}}


@pytest.mark.parametrize("name", TELL)
def test_damaged_sizes_are_named(name):
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build(SMALL[name]).state_dict().items()}
    missed = set()
    for key in list(shapes):
        for damaged in ({k: v for k, v in shapes.items() if k != key}, shapes | {key: ()}, shapes | {key: (0,) * len(shapes[key])}):
            try:
                transformer_config("the file", damaged)
            except CheckpointError as error:
                assert str(error).startswith("the file: ")
                missed |= {key} - damaged.keys()
    assert missed == TELL[name]


# ------------------------------------------------------------------------------------------- what is computed only once

@pytest.mark.slow
def test_text_and_timesteps_are_read_once_for_all_steps(small):
    c, given, t = small.config, told(small.config), torch.tensor([1.5, 400.0, 999.0])
    x, text = randn(2, c.in_channels, 8, 12), small.read(given["context"])
    times = small.times(t, text, torch.float64, **{k: v for k, v in given.items() if k != "context"})
    for i, time in enumerate(times):
        every_row = small(x, t[i].expand(2), **given)[0]
        assert (small(x, time, text)[0] - every_row).abs().max() < 1e-12
        assert (small(x, float(t[i]), **given)[0] - every_row).abs().max() < 1e-12


def test_what_guidance_and_vector_a_model_takes():
    c = SMALL["dev"]
    dev, schnell = randomised(Flux(c)), randomised(Flux(SMALL["schnell"]))
    x, given = randn(2, 4, 8, 8), told(c)
    with torch.no_grad():
        one = dev(x, 500, **given | {"guidance": 3.5})[0]
        assert (one - dev(x, 500, **given | {"guidance": torch.tensor([3.5, 3.5])})[0]).abs().max() < 1e-12
        assert (one - dev(x, 500, **given | {"guidance": 3.0})[0]).abs().max() > 1e-4
    for model, wrong in ((dev, {"guidance": None}), (schnell, {}), (dev, {"vector": None})):
        with pytest.raises(ValueError, match="takes a vector"):
            model(x, 500, **given | wrong)


@pytest.mark.parametrize("size, why", [((8, 26), "4 x 13 tokens"), ((8, 9), "multiples of 2")])
def test_pictures_that_do_not_fit_are_refused(size, why):
    """Beyond the table of positions; and no row or column of latents is left out."""
    with pytest.raises(ValueError, match=why):
        randomised(StableDiffusion3(SMALL_SD3))(randn(1, 4, *size), 500, **told(SMALL_SD3, 1))


@pytest.mark.parametrize("axes, theta", [((16, 56, 56), 10_000), ((4, 6, 8), 100)])
def test_rotary_positions_are_those_of_diffusers(axes, theta):
    h, w = 5, 3
    ids = torch.cat([diffusers.FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32), torch.zeros(L, 3)])
    wanted = diffusers.models.transformers.transformer_flux.FluxPosEmbed(theta, axes)(ids)
    for ours, of_pairs in zip(rotation(h, w, L, axes, theta, torch.device("cpu")), wanted):
        assert torch.equal(ours[:, 0].repeat_interleave(2, dim=1), of_pairs)


def test_half_precision_stays_finite():
    """Tokens that leave the range of half precision are bounded, as in diffusers."""
    model = randomised(Flux(SMALL_FLUX))
    with torch.no_grad():
        for block in model.double_blocks:
            block.txt_mlp[2].bias[::2] = 6e4
            block.txt_mod.lin.bias.unflatten(0, (6, -1))[5] = 3e4   # the gate
        out = model.half()(randn(1, 4, 8, 8).half(), 500, **{k: v.half() for k, v in told(SMALL_FLUX, 1).items()})[0]
    assert out.dtype == torch.float16 and out.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- edits

def an_edit(source=(0, 0), mix=None, keep=None, pixels=True):
    mix = randn(2, L, L) if mix is None else mix
    keep = randn(2, L) if keep is None else keep
    return AttentionEdit(torch.tensor(source), mix, keep, pixels=torch.tensor([source, source, (1, 2)]) if pixels else None)


@pytest.mark.slow
def test_sites_are_named_and_watched(small):
    c, x, given = small.config, randn(2, 4, 8, 12), told(small.config)
    blocks = ["joint_blocks"] * c.double if c.axes is None else ["double_blocks"] * c.double
    wanted = [f"{name}.{i}.joint" for i, name in enumerate(blocks)] + [f"single_blocks.{i}.joint" for i in range(c.single)]
    dual = [f"joint_blocks.{i}.between_pixels" for i in c.dual]
    assert small.text_sites() == wanted and {*small.pixel_sites()} == {*wanted, *dual}
    assert [m.site for m in small.layers(SelfAttention)] == dual
    out, seen = small(x, 500, watch=small.pixel_sites(), **given)
    plain, nothing = small(x, 500, **given)
    assert torch.equal(out, plain) and not nothing
    assert {site: q.shape[1] for site, (q, _) in seen.items()} == small.site_pixels(8, 12) == dict.fromkeys(wanted + dual, 24)
    assert all(k.shape[1] == (24 if site in dual else 24 + L) for site, (_, k) in seen.items())


@pytest.mark.slow
def test_equal_prompts_give_equal_pictures(small):
    """The whole map of a source that is told the same, and shares of it with the own one."""
    given = told(small.config, 3)
    given = {k: v[:1].expand(3, *v.shape[1:]) for k, v in given.items()}
    x = randn(1, 4, 8, 12).expand(3, -1, -1, -1)
    share = torch.rand(2, L, generator=torch.Generator().manual_seed(0)).double()
    out = small(x, 500, edit=an_edit(mix=torch.diag_embed(share), keep=1 - share), **given)[0]
    assert (out - small(x, 500, **given)[0]).abs().max() < 1e-12 and (out[1:] - out[0]).abs().max() < 1e-12


@pytest.mark.slow
def test_the_source_is_as_it_is_alone(small):
    x, given = randn(3, 4, 8, 12), told(small.config, 3)
    edited = small(x, 500, edit=an_edit(), **given)[0]
    alone = small(x[:1], 500, **{k: v[:1] for k, v in given.items()})[0]
    plain = small(x, 500, **given)[0]
    assert (edited[:1] - alone).abs().max() < 1e-12 and (edited[1:] - plain[1:]).abs().amin(dim=(1, 2, 3)).max() > 0
    assert (edited[1:] - plain[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.slow
def test_edits_act_at_the_sites_that_they_name(small):
    x, given, edit = randn(3, 4, 8, 12), told(small.config, 3), an_edit()
    plain = small(x, 500, **given)[0]
    for site in small.pixel_sites():
        moved = (small(x, 500, edit={site: edit}, **given)[0] - plain).abs().amax(dim=(1, 2, 3))
        assert moved[0] < 1e-12 and moved[1:].min() > 1e-6, site
    everywhere = small(x, 500, edit=dict.fromkeys(small.pixel_sites(), edit), **given)[0]
    assert torch.equal(everywhere, small(x, 500, edit=edit, **given)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3.5 medium", "dev"])
@torch.no_grad()
def test_edit_is_one_graph_for_all_steps(name):
    import torch._dynamo as dynamo

    small = randomised(build(replace(SMALL[name], double=2, single=bool(SMALL[name].single), dual=SMALL[name].dual[:1])))
    graphs, x, given = [], randn(3, 4, 8, 12), told(small.config, 3)
    text, told_once = small.read(given["context"]), {k: v for k, v in given.items() if k != "context"}
    times = small.times(torch.tensor([900.0, 500.0, 100.0]), text, torch.float64, **told_once)
    dynamo.reset()
    compiled = torch.compile(small, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True, dynamic=False)
    for i, time in enumerate(times):
        edit = an_edit(mix=randn(2, L, L, seed=i), keep=randn(2, L, seed=i))
        assert (compiled(x, time, text, edit)[0] - small(x, time, text, edit)[0]).abs().max() < 1e-12
    assert len(graphs) == 1


def test_pixels_injected_everywhere_leave_the_text_its_columns(small):
    """Queries and keys of the source between pixels, values and text the row's own: the picture changes with the prompt."""
    x, given = randn(1, 4, 8, 12).expand(3, -1, -1, -1), told(small.config, 3)
    edit = an_edit()._replace(mix=None, keep=None)
    out, plain = small(x, 500, edit=edit, **given)[0], small(x, 500, **given)[0]
    assert (out[1] - out[2]).abs().max() > 1e-3 and (out[1:] - plain[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-5


# --------------------------------------------------------------------------------------------- the 16-channel autoencoder

def their_vae(c):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(c.channels), up_block_types=("UpDecoderBlock2D",) * len(c.channels),
        block_out_channels=c.channels, layers_per_block=c.layers_per_block, latent_channels=c.latent_channels,
        use_quant_conv=c.quant_conv, use_post_quant_conv=c.quant_conv)


@pytest.mark.parametrize("size", [(16, 16), (24, 8)], ids=str)
def test_autoencoders_without_quant_convolutions_are_diffusers_less_the_shift(size):
    c = VAEConfig(latent_channels=16, quant_conv=False, shift=0.25, channels=(32, 64), layers_per_block=1)
    ours, theirs = randomised(AutoencoderKL(c)), their_vae(c).eval().double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, z = randn(2, 3, *size), randn(2, 16, size[0] // 2, size[1] // 2)
    with torch.no_grad():
        assert (ours.encode(x)[0] + 0.25 - theirs.encode(x).latent_dist.mean).abs().max() < 1e-12
        assert (ours.decode(z - 0.25) - theirs.decode(z).sample).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("config", [VAE_SD, VAE_SD3, VAE_FLUX], ids=["SD 1", "SD 3", "FLUX"])
def test_full_size_autoencoders(config, prefix):
    """Names and shapes of diffusers' model; through the names of single files, which tell the sizes."""
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), their_vae(config)
    state, shapes = ours.state_dict(), {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes
    single = _rename(iter(state.items()), ldm_sources(state, vae_prefixes(config)), prefix)
    assert len(single) == len(state)
    back = convert_ldm_vae_checkpoint(dict(single), dict(theirs.config))
    assert {k: tuple(v.shape)[:2] if ".attentions." in k else tuple(v.shape) for k, v in back.items()} == shapes
    assert vae_config({k: tuple(v.shape) for k, v in single.items()}, prefix) == replace(config, shift=0.0)


@pytest.mark.parametrize("name", ["3.5 large", "dev"])
def test_weights_may_be_held_in_half_of_what_is_computed_in(name):
    """As `fill` holds them: linear layers and convolutions widen their own; the precision is that of all else."""
    model = randomised(build(SMALL[name])).float()
    large = widened_names(model)
    state = {k: v.bfloat16() if k in large else v for k, v in model.state_dict().items()}
    x, given = randn(1, 4, 8, 8).float(), {k: v.float() for k, v in told(SMALL[name], 1).items()}
    with torch.no_grad():
        model.load_state_dict({k: v.float() for k, v in state.items()})
        wanted = model(x, 500, **given)[0]
        model.load_state_dict(state, assign=True)
        assert model.dtype == torch.float32 and torch.equal(model(x, 500, **given)[0], wanted)
    assert len(large) < len(state) and model.final_layer.linear.weight.dtype == torch.bfloat16
