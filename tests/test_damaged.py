"""Files that are damaged, foreign or malicious: one exception type, a helpful message, nothing run, memory bounded."""
import json
import os
import pickle
import resource
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from p2p import CheckpointError
from p2p.models.vae import AutoencoderKL
from p2p.weights import keys
from p2p.weights.files import open_file
from p2p.weights.fill import fill
from p2p.weights.load import BUNDLED, find
from p2p.weights.load import load as build

CPU = torch.device("cpu")


def refuse(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        package = find(path)
        build(package, CPU)
    assert len(str(error.value)) < 1200 and Path(path).name in str(error.value)


def header(h, data=b""):
    raw = h if isinstance(h, bytes) else json.dumps(h).encode()
    return struct.pack("<Q", len(raw)) + raw + data


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {   # what safetensors itself refuses, or we do after it
    "empty file": b"", "four bytes": b"\0\0\0\0", "length only": struct.pack("<Q", 10), "length beyond file": struct.pack("<Q", 10**9) + b"{",
    "length beyond 100 MB": struct.pack("<Q", 2**40) + b"{}", "not JSON": header(b"{nonsense}"), "a list": header(b"[1, 2]      "),
    "no tensors": header({}), "only metadata": header({"__metadata__": {"format": "pt"}}),
    "bad dtype": header({"a": F4 | {"dtype": "F99"}}, bytes(4)), "negative dimension": header({"a": F4 | {"shape": [-1]}}, bytes(4)),
    "shape and span differ": header({"a": F4 | {"shape": [2]}}, bytes(4)),
    "reversed offsets": header({"a": F4 | {"data_offsets": [4, 0]}}, bytes(4)),
    "overflowing shape": header({"a": F4 | {"shape": [2**62, 2**62]}}, bytes(4)),
    "hole": header({"a": F4, "b": F4 | {"data_offsets": [8, 12]}}, bytes(12)), "overlap": header({"a": F4, "b": F4}, bytes(4)),
    "trailing bytes": header({"a": F4}, bytes(9)), "cut data": header({"a": F4 | {"shape": [4], "data_offsets": [0, 16]}}, bytes(7)),
    "metadata not text": header({"__metadata__": {"a": 1}, "a": F4}, bytes(4)), "invalid utf-8": header(b'{"\xff": 1}'),
    "html": b"<!DOCTYPE html><html><body>404</body></html>", "html in capitals": b"  <HTML>" + bytes(50),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "zip": b"PK\x03\x04" + bytes(60),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(60), "text": b"hello, I am a model", "gzip": b"\x1f\x8b" + bytes(30), "json": b'{"a": 1}',
    "a million names": lambda: header(("{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6)) + "}").encode()),
    "unknown model": header({"a": F4}, bytes(4)), "gguf": b"GGUF" + bytes(60),
}


NEITHER = ("empty file", "four bytes", "length only", "length beyond 100 MB", "a list", "png", "text", "gzip", "json")
OTHERS = {"html": "a web page: the download failed", "html in capitals": "a web page", "git-lfs pointer": "run `git lfs pull`",
          "gguf": "a GGUF file, which other programs run"}
EMPTY = ("no tensors", "only metadata", "unknown model")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(tmp_path, name, suffix):
    path = tmp_path / f"model{suffix}"
    content = HEADERS[name]
    path.write_bytes(content() if callable(content) else content)
    if name == "zip":
        said = "a PyTorch pickle; if it comes from a source you trust, rename it" if suffix == ".safetensors" else "damaged or cut short"
    elif name in OTHERS or name in NEITHER:
        said = OTHERS.get(name, "neither a safetensors file nor a PyTorch pickle")
    elif suffix == ".ckpt":
        said = "this is a safetensors file under the name of a pickle: rename it to model.safetensors"
    else:
        said = "no UNet, no autoencoder, no text tower found" if name in EMPTY else "damaged"
    refuse(path, said)


KINDS = {
    "a LoRA": ["lora_unet_down_blocks_0.lora_up.weight"], "a ControlNet": ["control_model.input_hint_block.0.weight"],
    "the transformer is not whole": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    "an unCLIP": [keys.UNET + "input_blocks.0.0.weight", "embedder.model.visual.proj"],
    "an SDXL refiner": [keys.UNET + "label_emb.0.0.weight", keys.TEXT_SGM2 + "token_embedding.weight"],
    "an EDM model": [keys.UNET + "out.2.weight", "edm_mean", "edm_std"], "an autoencoder alone": ["encoder.down.0.block.0.conv1.weight"],
    "the UNet of a diffusers folder": ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight", "conv_in.weight"],
    "a text tower alone": ["text_model.embeddings.token_embedding.weight", "text_model.x", "text_model.y"],
    "textual-inversion": ["emb_params"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    save_file({k: torch.zeros(2, 4, 3, 3) for k in KINDS[kind]}, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", kind)


@pytest.mark.parametrize("channels, kind", [(9, "an inpainting"), (8, "an InstructPix2Pix"), (5, "a depth-guided"), (7, "an upscaling")])
def test_other_inputs_are_refused_by_name(tmp_path, channels, kind):
    save_file({keys.UNET + "input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", kind)


def test_fp8_is_refused_by_name(tmp_path):
    save_file({keys.UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", "fp8")


def test_folders_of_other_kinds(tmp_path):
    refuse(tmp_path, "without model_index.json")
    for text, match in (("{", "not readable as JSON"), ("[]", "holds a list"), ('{"_class_name": "FluxPipeline"}', "transformer.config.json: no such file")):
        (tmp_path / "model_index.json").write_text(text)
        refuse(tmp_path, match)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refuse(tmp_path, "unet.config.json: no such file")


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3])
def test_shards_stay_beside_their_index(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    refuse(index, "only plain file names|not an index")


def test_shards_hold_what_the_index_says(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "1.safetensors")
    for where in ({"a": "1.safetensors"}, {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}):
        (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        refuse(tmp_path / "m.safetensors.index.json", "does not hold what the index says")


# ------------------------------------------------------------------------------------------------------- the bundled format

def unet_sizes(**changed):
    return lambda tensors, meta: meta.update(unet=json.dumps(json.loads(meta["unet"]) | changed))


def schedule(change):
    return lambda tensors, meta: tensors.update(alphas_cumprod=change(tensors["alphas_cumprod"].clone()))


EMOJI = {   # what is wrong with a trained file, and what is said about it
    "no sizes": (lambda t, m: m.pop("unet"), "metadata do not hold"), "not JSON": (lambda t, m: m.update(unet="{"), "metadata do not hold"),
    "a list": (lambda t, m: m.update(unet="[1]"), "metadata do not hold"), "unknown field": (unet_sizes(colour=3), "metadata do not hold.*colour"),
    "no heads": (unet_sizes(heads=[0, 0, 0]), "no network has the sizes"), "no channels": (unet_sizes(channels=[]), "no network has the sizes"),
    "other width": (unet_sizes(channels=[64, 96, 192]), "does not fit"), "other text": (unet_sizes(context_dim=64), "mixes two models"),
    "prediction": (lambda t, m: m.update(prediction="zz"), "'zz'.*not known; give prediction, one of eps, v, x0"),
    "no schedule": (lambda t, m: t.pop("alphas_cumprod"), "missing: alphas_cumprod"),
    "short schedule": (schedule(lambda a: a[:10].contiguous()), r"alphas_cumprod, of shape \[10\], is no noise schedule"),
    "schedule of NaN": (schedule(lambda a: a.index_fill_(0, torch.tensor(5), float("nan"))), "alphas_cumprod.*no noise schedule"),
    "schedule of zeros": (schedule(torch.zeros_like), "alphas_cumprod.*no noise schedule"),
    "no vocabulary": (lambda t, m: t.pop("text.vocab"), "missing: text.vocab"),
    "scalar vocabulary": (lambda t, m: t.update({"text.vocab": torch.tensor(3)}), "sizes are those of no model"),
    "addition": (lambda t, m: t.update({"lora.x": torch.zeros(2)}), "unexpected: lora.x"),
    "extra weight": (lambda t, m: t.update({"unet.x": torch.zeros(2)}), "unexpected: unet.x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EMOJI)
def test_damaged_emoji_models(tmp_path, name):
    damage, said = EMOJI[name]
    with safe_open(BUNDLED["emoji"], framework="pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())
    damage(tensors, meta)
    save_file(tensors, tmp_path / "m.safetensors", meta)
    refuse(tmp_path / "m.safetensors", said)


def test_an_autoencoder_beside_a_pixel_model_is_refused(sd1_file):
    with pytest.raises(CheckpointError, match="emoji.*works on pixels and has no autoencoder"):
        find("emoji", vae=sd1_file)


def test_a_missing_autoencoder_is_the_file_that_is_named(sd1_file):
    with pytest.raises(CheckpointError, match="^none.safetensors: no such file"):
        find(sd1_file, vae="none.safetensors")


SD1 = {   # the same of a Stable Diffusion file
    "stray block": (lambda t: t.update({keys.UNET + "input_blocks.99.0.op.weight": torch.zeros(2)}), "unexpected: .*input_blocks.99"),
    "flat embedding": (lambda t: t.update({keys.TEXT_SD1 + "embeddings.token_embedding.weight": torch.zeros(9)}), "sizes are those of no"),
    "flat convolution": (lambda t: t.update({keys.VAE + "encoder.conv_in.weight": torch.zeros(9)}), "sizes are those of no model"),
    "schedule of NaN": (lambda t: t.update(alphas_cumprod=torch.full((1000,), float("nan"))), "alphas_cumprod.*no noise schedule"),
    "short schedule": (lambda t: t.update(alphas_cumprod=torch.linspace(0.9, 0.1, 7)), "alphas_cumprod.*no noise schedule"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SD1)
def test_damaged_stable_diffusion_files(tmp_path, sd1_tensors, name):
    tensors = dict(sd1_tensors)
    SD1[name][0](tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", SD1[name][1])


def test_a_prediction_that_nobody_knows_is_not_taken_for_another(tmp_path, sd1_tensors):
    path = tmp_path / "m.safetensors"
    save_file(sd1_tensors, path, {"modelspec.prediction_type": "zzz"})
    refuse(path, "said to predict 'zzz' .by the file's metadata.")
    assert find(path, prediction="v").prediction == "v"
    path.with_suffix(".yaml").mkdir()   # no side file, whatever it is
    refuse(path, "said to predict 'zzz'")


def test_a_prediction_is_read_as_comfyui_writes_it(tmp_path, sd1_tensors):
    save_file(sd1_tensors, tmp_path / "m.safetensors", {"modelspec.predict_key": "v"})
    found = find(tmp_path / "m.safetensors")
    assert (found.prediction, found.why) == ("v", "the file's metadata")


# ---------------------------------------------------------------------------------------------------------------- pickles

class Evil:
    """Creates a file when it is unpickled by anything careless."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evils(mark):
    return {
        "os.system": Evil(os.system, f"touch {mark}"), "open": Evil(open, str(mark), "w"), "eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(mark)!r}, 'w')"), "Path.touch": Evil(Path.touch, mark), "mkdir": Evil(os.mkdir, str(mark)),
    }


@pytest.mark.parametrize("name", ["os.system", "open", "eval", "exec", "Path.touch", "mkdir"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_malicious_pickles_do_not_run(tmp_path, name, new, suffix):
    mark, path = tmp_path / "mark", tmp_path / f"model{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "x": evils(mark)[name]}, path, _use_new_zipfile_serialization=new)
    refuse(path, "wants to use .*may be malicious|damaged")
    assert not mark.exists()


def test_code_beside_weights_is_called_what_it_is(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refuse(path, "a TorchScript archive.*give the same weights as .safetensors")


def test_plain_pickles_do_not_run(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.ckpt"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(Evil(os.system, f"touch {mark}"), protocol))
        refuse(path, "malicious|damaged")
        assert not mark.exists()


def test_pickles_of_other_things(tmp_path):
    for thing, match in (([torch.zeros(1)], "holds a list"), ({"a": 1}, "no UNet"), ({"state_dict": {"b": torch.zeros(3)}}, "no UNet|textual")):
        torch.save(thing, tmp_path / "m.ckpt")
        refuse(tmp_path / "m.ckpt", match)
    loop = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "m.ckpt")
    refuse(tmp_path / "m.ckpt", "no UNet")


def test_a_huge_claim_is_refused_before_memory_is_taken(tmp_path, sd1_tensors):
    """A small pickle whose tensor pretends, by stride 0, to hold 2^40 numbers."""
    name = "model.diffusion_model.time_embed.0.weight"
    torch.save(sd1_tensors | {name: torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "m.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(tmp_path / "m.ckpt", "time_embed.0.weight is .1048576, 1048576.")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000   # kB


# --------------------------------------------------------------------------------------------------------------- mutations

@pytest.fixture(scope="module")
def valid(tmp_path_factory, sd1_tensors):
    """A small valid file (the autoencoder of the golden checkpoint), its bytes, and its header's end."""
    path = tmp_path_factory.mktemp("valid") / "vae.safetensors"
    save_file({k.removeprefix(keys.VAE): v for k, v in sd1_tensors.items() if k.startswith(keys.VAE)}, path)
    data = path.read_bytes()
    return path, data, 8 + struct.unpack("<Q", data[:8])[0]


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["flip", "cut", "insert", "remove"]), where=st.floats(0, 1), near_header=st.booleans(),
       value=st.integers(0, 255), count=st.integers(1, 64))
def test_mutated_files_load_or_raise_our_error(valid, sd1_file, kind, where, near_header, value, count):
    """Whatever bytes change, the file loads with the right shapes or raises CheckpointError, and nothing else."""
    path, data, header_end = valid
    at = int(where * (header_end if near_header else len(data) - 1))
    data = bytearray(data)
    if kind == "flip":
        data[at] ^= value or 1
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = bytes([value]) * count
    else:
        del data[at: at + count]
    changed = path.with_name("changed.safetensors")
    changed.write_bytes(data)
    try:
        vae = fill("autoencoder", find(sd1_file, vae=changed).vae, AutoencoderKL, CPU, None)
    except CheckpointError:
        return
    sound = fill("autoencoder", find(sd1_file, vae=path).vae, AutoencoderKL, CPU, None)
    assert {k: v.shape for k, v in vae.state_dict().items()} == {k: v.shape for k, v in sound.state_dict().items()}


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(new=st.booleans(), kind=st.sampled_from(["flip", "cut", "insert", "remove"]), where=st.floats(0, 1), value=st.integers(1, 255),
       count=st.integers(1, 64))
def test_mutated_pickles_load_or_raise_our_error(pickled, new, kind, where, value, count):
    path, data = pickled[new].with_name("changed.ckpt"), bytearray(pickled[new].read_bytes())
    at = int(where * (len(data) - 1))
    if kind == "flip":
        data[at] ^= value
    elif kind == "insert":
        data[at:at] = bytes([value]) * count
    else:
        del data[at: len(data) if kind == "cut" else at + count]
    path.write_bytes(data)
    try:
        file = open_file(path)
        assert all(tuple(file[k].shape) == shape for k, shape in file.shapes.items())
    except CheckpointError as error:
        assert len(str(error)) < 1200


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """A small checkpoint in both formats; nearly all of it is what says how to read it."""
    folder, made = tmp_path_factory.mktemp("pickled"), {}
    state = {"state_dict": {f"layer.{i}.weight": torch.arange(3.0)[:i] for i in range(4)}, "epoch": 3, "callbacks": {"x": [1.5, None]}}
    for new in (True, False):
        made[new] = folder / f"{new}.ckpt"
        torch.save(state, made[new], _use_new_zipfile_serialization=new)
    return made
