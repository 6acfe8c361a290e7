"""LoRA and its kin: what is merged is what PEFT merges, or what the formulas say, written out densely."""
import copy
import json

import peft
import pytest
import torch
from families import save
from lora_files import KINDS, LAYERS, RANK, dora, draw, lora, write
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import p2p
from p2p.models.unet import UNet
from p2p.weights.convert import convert
from p2p.weights.deltas import Change
from p2p.weights.files import open_file
from p2p.weights.fill import read_tensors
from p2p.weights.load import find

TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv_shortcut", "ff.net.0.proj", "time_emb_proj"],
           "text": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}


def load(path, **kw):
    return p2p.load(path, device="cpu", **kw)


@pytest.fixture(scope="module")
def plain(made):
    """The UNet's weights, by their names."""
    return load(made[2]).unet.state_dict()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def off(found, want):
    """The largest difference of two modules' tensors, relative to the largest number of each."""
    found, want = ({k: v for k, v in m.state_dict().items() if v.is_floating_point()} for m in (found, want))
    return max(((found[k] - v).abs().max() / v.abs().max()).item() for k, v in want.items())


def same(found, want, most=1e-6):
    assert off(found.unet, want.unet) <= most
    assert [off(a, b) <= most for a, b in zip(found.text_encoders, want.text_encoders)] == [True] * len(want.text_encoders)


# --------------------------------------------------------------------------------------------------------- against PEFT

def with_adapters(made, folder, **how):
    """Copies of a model's parts with random LoRAs by PEFT: their state, by diffusers' names; and a folder with them merged."""
    family, parts, _ = made
    parts, state = {name: copy.deepcopy(part) for name, part in parts.items()}, {}
    for n, (name, part) in enumerate(parts.items()):
        if name == "vae":
            continue
        config = peft.LoraConfig(r=RANK, lora_alpha=how.get("alpha", RANK), use_dora=how.get("dora", False),
                                 use_rslora=how.get("rslora", False), alpha_pattern=how.get("alphas", {}).get(name, {}),
                                 target_modules=TARGETS["unet" if name == "unet" else "text"])
        peft.inject_adapter_in_model(config, part)
        g = generator(n)
        for key, p in part.named_parameters():
            if "magnitude" in key:
                p.data *= 1 + 0.3 * torch.rand(p.shape, generator=g)
            elif "lora_" in key:
                p.data = draw(g, *p.shape)
        state |= {f"{name}.{k}": v.clone() for k, v in peft.get_peft_model_state_dict(part).items()}
        merge(part, how.get("weight", 1.0))
    return state, save(parts, folder, family)


def merge(module, weight):
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.scale_layer(weight)
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer.get_base_layer())


@pytest.fixture(scope="module")
def adapted(made, tmp_path_factory):
    return with_adapters(made, tmp_path_factory.mktemp("adapted") / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"weight": 0.6}, {"dora": True}, {"dora": True, "weight": 0.6}], ids=str)
def test_what_peft_saves_is_merged_as_peft_merges_it(made, plain, tmp_path, how):
    state, merged = with_adapters(made, tmp_path / "merged", **how)
    save_file(state, tmp_path / "l.safetensors")
    found, want = load(made[2], lora=(tmp_path / "l.safetensors", how.get("weight", 1.0))), load(merged)
    same(found, want)
    assert any(not torch.equal(v, plain[k]) for k, v in want.unet.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("where, rslora", [("metadata", False), ("adapter_config.json", True)])
def test_alpha_is_read_where_peft_keeps_it(made, tmp_path, where, rslora):
    """It is not among the tensors of such a file."""
    alphas = {"unet": {"mid_block.attentions.0.proj_in": 11}}
    state, merged = with_adapters(made, tmp_path / "merged", alpha=2 * RANK, alphas=alphas, rslora=rslora)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "use_rslora": rslora}
    if where == "metadata":
        said = {f"{part}.{k}": v for part in ("unet", "text_encoder", "text_encoder_2") for k, v in config.items()}
        said["unet.alpha_pattern"] = alphas["unet"]
        save_file(state, tmp_path / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    else:
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": alphas["unet"]}))
    same(load(made[2], lora=tmp_path), load(merged))


@pytest.mark.slow
@pytest.mark.parametrize("config", [peft.LoHaConfig(r=RANK, alpha=2 * RANK, target_modules=["to_q"]),
                                    peft.LoKrConfig(r=64, alpha=16, target_modules=["to_q"]),   # both factors whole
                                    peft.LoKrConfig(r=RANK, alpha=1, decompose_both=True, target_modules=["to_q"])], ids=["LoHa", "LoKr, whole", "LoKr"])
def test_alpha_of_lycoris_in_peft_is_its_setting(made, tmp_path, config):
    family, parts, _ = made
    unet = copy.deepcopy(parts["unet"])
    peft.inject_adapter_in_model(config, unet)
    g = generator()
    for name, p in unet.named_parameters():
        if "hada_" in name or "lokr_" in name:
            p.data = draw(g, *p.shape)
    state = {f"base_model.model.{k}": v.clone() for k, v in peft.get_peft_model_state_dict(unet).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    said = {k: v for k, v in config.to_dict().items() if k in ("r", "alpha", "alpha_pattern")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    merge(unet, 1.0)
    same(load(made[2], lora=tmp_path), load(save(parts | {"unet": unet}, tmp_path / "merged", family)))


OLD = {"lora.down": lambda k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
       "lora_linear_layer": lambda k: k.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
       "default": lambda k: k.replace(".weight", ".default.weight"),
       "kohya's ends": lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up")}


def processors(key):
    """As diffusers named the layers of attention at first."""
    for projection in ("q", "k", "v", "out"):
        key = key.replace(f"to_{projection}.0.lora", f"to_{projection}.lora").replace(f"{projection}_proj.lora", f"to_{projection}.lora")
        key = key.replace(f".to_{projection}.lora_A", f".processor.to_{projection}_lora.down")
        key = key.replace(f".to_{projection}.lora_B", f".processor.to_{projection}_lora.up")
    return key.replace("self_attn.processor.", "self_attn.")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OLD, "processors"])
def test_older_names_mean_the_same(made, adapted, tmp_path, name):
    state, merged = adapted
    renamed = {(OLD.get(name) or processors)(k): v for k, v in state.items()}
    assert len(renamed) == len(state) and renamed.keys() != state.keys()
    torch.save(renamed, tmp_path / "l.bin")
    same(load(made[2], lora=tmp_path / "l.bin"), load(merged))


@pytest.mark.slow
def test_kohya_names_of_the_text_towers(made, adapted, tmp_path):
    """lora_te_, or lora_te1_ and lora_te2_ of XL; the towers' fused queries, keys and values take each its third."""
    state, merged = adapted
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        layer, _, end = rest.rpartition(".lora_")
        tower = {"unet": "unet", "text_encoder": "te1" if made[0] == "sdxl" else "te", "text_encoder_2": "te2"}[part]
        layer = layer if part == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
        renamed[f"lora_{tower}_{layer.replace('.', '_')}.{'lora_down' if end.startswith('A') else 'lora_up'}.weight"] = value
    save_file(renamed, tmp_path / "l.safetensors")
    same(load(made[2], lora=tmp_path / "l.safetensors"), load(merged))


@pytest.mark.slow
def test_open_clips_own_names_of_fused_queries_keys_and_values(made, tmp_path):
    tower = "te2" if made[0] == "sdxl" else "te"
    before = load(made[2]).text_encoders[-1].state_dict()["transformer.resblocks.0.attn.in_proj_weight"]
    tensors, change = lora(generator(), before)
    path = write(tmp_path / "l.safetensors", {"transformer.resblocks.0.attn.in_proj": tensors}, f"lora_{tower}_")
    found = load(made[2], lora=path).text_encoders[-1].state_dict()["transformer.resblocks.0.attn.in_proj_weight"]
    assert close(found, before.double() + change)


# ---------------------------------------------------------------------------------------------------- written out densely

def merged_weights(folder, path, weight=1.0):
    """Of the UNet, by their names."""
    return dict(read_tensors(find(folder, lora=[(path, weight)]).unet, UNet))


def close(found, want):
    return ((found.double() - want).abs().max() / want.abs().max()).item() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, -0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_its_formula_says(made, plain, tmp_path, kind, weight):
    """Of linear layers, of convolutions, and of the projections before a transformer, which are either."""
    g, files, want = generator(), {}, {}
    for layer in LAYERS[made[0]]:
        w = plain[f"{layer}.weight"]
        if w.shape[-1] == 3 or "middle" not in kind:
            files[layer], change = KINDS[kind](g, w)
            want[layer] = w.double() + weight * change
    found = merged_weights(made[2], write(tmp_path / "l.safetensors", files), weight)
    assert {layer: close(found[f"{layer}.weight"], w) for layer, w in want.items()} == dict.fromkeys(want, True)
    changed = {k.removesuffix(".weight") for k, v in found.items() if not torch.equal(v, plain[k])}
    assert changed == set(want)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr, second"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_dora_rescales_each_output_or_each_input(made, plain, tmp_path, kind, side, weight):
    g, files, want = generator(), {}, {}
    for layer in LAYERS[made[0]]:
        w = plain[f"{layer}.weight"]
        files[layer], change = KINDS[kind](g, w)
        files[layer]["dora_scale"], want[layer] = dora(g, w, change, side, weight)
    found = merged_weights(made[2], write(tmp_path / "l.safetensors", files), weight)
    assert all(close(found[f"{layer}.weight"], w) for layer, w in want.items())


def test_differences_of_biases_and_norms(made, plain, tmp_path):
    g, layer, norm = generator(), "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1"
    up_down, change = lora(g, plain[f"{layer}.weight"])
    files = {layer: up_down | {"diff_b": draw(g, *plain[f"{layer}.bias"].shape)},
             norm: {k: draw(g, *plain[f"{norm}.{end}"].shape) for k, end in (("w_norm", "weight"), ("b_norm", "bias"))}}
    found = merged_weights(made[2], write(tmp_path / "l.safetensors", files))
    assert close(found[f"{layer}.weight"], plain[f"{layer}.weight"].double() + change)
    for name, diff in ((f"{layer}.bias", files[layer]["diff_b"]), (f"{norm}.weight", files[norm]["w_norm"]),
                       (f"{norm}.bias", files[norm]["b_norm"])):
        assert torch.equal(found[name], plain[name] + diff)


@pytest.mark.slow
def test_both_namings_of_a_unet_mean_the_same(made, plain, tmp_path):
    """kohya's scripts name the layers of XL as single files do, others as diffusers; dots for "_" where ComfyUI saves."""
    g, table = generator(), LAYERS[made[0]]
    files = {layer: lora(g, plain[f"{layer}.weight"])[0] for layer in table}
    want = merged_weights(made[2], write(tmp_path / "l.safetensors", files))
    ldm = {table[layer]: tensors for layer, tensors in files.items()}
    for names, how in ((ldm, {}), (ldm, {"prefix": "diffusion_model.", "joined": False}), (files, {"prefix": "lycoris_"}),
                       (files, {"prefix": "", "joined": False}), (files, {"prefix": "base_model.model.", "joined": False})):
        found = merged_weights(made[2], write(tmp_path / "l.safetensors", names, **how))
        assert all(torch.equal(found[name], each) for name, each in want.items())


@pytest.mark.slow
def test_projections_may_be_linear_in_one_file_and_convolutions_in_the_other(made, plain, tmp_path):
    g, layer = generator(), next(iter(LAYERS[made[0]]))
    tensors, change = lora(g, plain[f"{layer}.weight"].squeeze())
    for shape in ((), (1, 1)):
        files = {layer: {k: v.reshape(*v.shape[:2], *shape) if v.ndim else v for k, v in tensors.items()}}
        found = merged_weights(made[2], write(tmp_path / "l.safetensors", files))[f"{layer}.weight"]
        assert close(found.squeeze(), plain[f"{layer}.weight"].squeeze().double() + change)


# ----------------------------------------------------------------------------------------------------- as a model holds it

@pytest.fixture
def one(made, plain, tmp_path):
    """A LoRA of a few layers, in half precision."""
    g = generator(7)
    files = {layer: {k: v.half() for k, v in lora(g, plain[f"{layer}.weight"])[0].items()} for layer in LAYERS[made[0]]}
    return write(tmp_path / "one.safetensors", files)


@pytest.mark.slow
def test_several_are_merged_in_turn(made, plain, one, tmp_path):
    g, layer = generator(8), next(iter(LAYERS[made[0]]))
    other = write(tmp_path / "other.safetensors", {layer: lora(g, plain[f"{layer}.weight"])[0]})
    both, name = load(made[2], lora=[(one, 0.5), other]), f"{layer}.weight"
    changes = [merged_weights(made[2], *pair)[name] - plain[name] for pair in ((one, 0.5), (other, 1.0))]
    assert torch.allclose(both.unet.state_dict()[name], plain[name] + sum(changes), atol=1e-6)
    assert [n.split(",")[0] for n in both.notes if "merged" in n] == ["one.safetensors", "other.safetensors"]


@pytest.mark.slow
def test_nothing_stays_of_it_but_the_weights(made, plain, one):
    found, before = load(made[2], lora=one), load(made[2])
    assert [type(m) for m in found.unet.modules()] == [type(m) for m in before.unet.modules()]
    assert {k: v.dtype for k, v in found.unet.state_dict().items()} == {k: v.dtype for k, v in plain.items()}


@pytest.mark.slow
def test_a_network_held_in_half_is_merged_before_it_is_rounded(made, one):
    half, name = load(made[2], lora=one, held=torch.float16), f"{next(iter(LAYERS[made[0]]))}.weight"
    assert torch.equal(half.unet.state_dict()[name], merged_weights(made[2], one)[name].half())


@pytest.mark.slow
def test_a_single_file_takes_what_its_folder_takes(made, single, one):
    found = merged_weights(single, one)
    assert all(torch.equal(found[k], v) for k, v in merged_weights(made[2], one).items())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["m.safetensors", "folder"])
def test_the_merged_model_may_be_written(made, one, tmp_path, form):
    convert(find(made[2], lora=[(one, 0.8)]), tmp_path / form)
    same(load(tmp_path / form), load(made[2], lora=(one, 0.8)), 0)


@pytest.mark.slow
def test_a_written_model_keeps_its_precision(made, single, one, tmp_path):
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(single).items()}, tmp_path / "half.safetensors")
    convert(find(tmp_path / "half.safetensors", lora=[(one, 1.0)]), tmp_path / "m.safetensors")
    assert {v.dtype for v in load_file(tmp_path / "m.safetensors").values() if v.is_floating_point()} == {torch.float16}


def test_a_pixel_model_takes_one_by_its_own_names(emoji, tmp_path):
    layer = next(name for name, m in emoji.unet.named_modules() if name.endswith("attn1.to_q"))
    tensors, change = lora(generator(), emoji.unet.get_submodule(layer).weight)
    found = load("emoji", lora=write(tmp_path / "l.safetensors", {layer: tensors}, "unet.", False))
    assert close(found.unet.get_submodule(layer).weight, emoji.unet.get_submodule(layer).weight.double() + change)




def test_factors_go_to_where_the_weight_is(tmp_path, monkeypatch):
    """To a GPU, of a pipeline that lies on one: here a device without numbers stands for it."""
    tensors, _ = lora(generator(), torch.empty(8, 8))
    save_file({end.lstrip("."): t for end, t in tensors.items()}, tmp_path / "l.safetensors")
    up, down = (next(key for key in load_file(tmp_path / "l.safetensors") if role in key) for role in ("up", "down"))
    change = Change(open_file(tmp_path / "l.safetensors"), "LoRA", {"up": up, "down": down}, 1.0, 1.0)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.ones((), dtype=torch.bool))
    assert change(torch.empty(8, 8, device="meta")).device.type == "meta"
