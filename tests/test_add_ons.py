"""Add-on files of all kinds, right, damaged, hostile and of other families: merged, or refused in one clear message; recorded, and
done again from the same files or not at all."""
import json
import os
import shutil
import zipfile
from pathlib import Path

import families
import pickle_bytes as raw
import pytest
import torch
from lora_files import KINDS, LAYERS, dora, lora, write
from PIL import Image
from safetensors.torch import load_file, save_file

import p2p
from p2p import CheckpointError, UsageError
from p2p.cli.parser import main
from p2p.lists import jobs
from p2p.models.unet import UNet
from p2p.show.pictures import read_settings, save_png
from p2p.weights.fill import read_tensors
from p2p.weights.load import find

SMALL = ["--steps", "2", "--height", "16", "--width", "16", "--seed", "3"]
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
SHAPES = {"sd1": (64, 64), "sd2": (128, 128), "sdxl": (128, 192)}   # of the weight of that layer, (out, in)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: families.save(families.build(f), tmp_path_factory.mktemp(f) / "folder", f) for f in SHAPES}


@pytest.fixture(scope="module")
def weights(folders):
    return {f: dict(read_tensors(find(folder).unet, UNet)) for f, folder in folders.items()}


def made(weights, family="sd1", kind="LoRA"):
    """A LoRA or its kin of every layer of LAYERS that the kind is for."""
    g, plain = torch.Generator().manual_seed(0), {layer: weights[family][f"{layer}.weight"] for layer in LAYERS[family]}
    return {layer: KINDS[kind](g, w)[0] for layer, w in plain.items() if w.shape[-1] == 3 or "middle" not in kind}


def pair(family="sd1", **more):
    out, inputs = SHAPES[family]
    return {f"{LAYER}.lora_up.weight": torch.ones(out, 4), f"{LAYER}.lora_down.weight": torch.ones(4, inputs), **more}


def merge(folder, path):
    """Reads the whole UNet with the file merged."""
    return dict(read_tensors(find(folder, lora=[(path, 1.0)]).unet, UNet))


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_right_files_are_merged(folders, weights, tmp_path, family, kind):
    layers = made(weights, family, kind)
    found = merge(folders[family], write(tmp_path / "l.safetensors", layers))
    assert all(not torch.equal(found[f"{layer}.weight"], weights[family][f"{layer}.weight"]) for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("family, model", [(f, m) for f in SHAPES for m in SHAPES if f != m])
def test_another_family_is_refused_by_name(folders, weights, tmp_path, family, model):
    """Both are named: by what its cross-attention reads, which layers it has, how its text towers are called."""
    path = write(tmp_path / "l.safetensors", made(weights, family))
    with pytest.raises(CheckpointError) as error:
        find(folders[model], lora=[(path, 1.0)])
    said = str(error.value)
    assert str(path) in said and f"made for a model of the family {family}" in said and f"is of the family {model}" in said
    assert f"text of width {SHAPES[family][1]}" in said and len(said) < 900


@pytest.mark.slow
@pytest.mark.parametrize("family, layer, shape", [("sd1", LAYER, (4, 768)), ("sd2", LAYER, (4, 1024)), ("sdxl", LAYER, (4, 2048)),
                                                  ("sdxl", "lora_te2_text_model_encoder_layers_9_self_attn_q_proj", (4, 1280)),
                                                  ("sd2", "lora_te_text_model_encoder_layers_9_self_attn_q_proj", (4, 1024)),
                                                  ("sd1", "lora_te_text_model_encoder_layers_9_self_attn_q_proj", (4, 768))])
def test_families_of_full_size_are_known_by_their_widths(folders, tmp_path, capsys, family, layer, shape):
    path = tmp_path / "l.safetensors"
    save_file({f"{layer}.lora_up.weight": torch.ones(320, 4), f"{layer}.lora_down.weight": torch.ones(shape),
               f"{layer}.alpha": torch.tensor(2.0)}, path)
    assert main(["inspect", str(path), "--hash"]) == 0
    out = capsys.readouterr().out
    assert f"family      {family}\n" in out and "add-on      LoRA, rank 4, alpha 2" in out and len(out.split()[-1]) == 64
    for model in SHAPES:
        with pytest.raises(CheckpointError, match="do not fit|does not have"):
            find(folders[model], lora=[(path, 1.0)])


# ---------------------------------------------------------------------------------------------------------------- damaged

NAN, BIG = torch.full((4, 64), float("nan")), torch.ones(4, 65)
DAMAGED = {
    "half of a pair": ({f"{LAYER}.lora_up.weight": torch.ones(64, 4)}, "not complete: .* has up alone"),
    "the other half": ({f"{LAYER}.lora_down.weight": torch.ones(4, 64), f"{LAYER}.alpha": torch.tensor(1.0)}, "has alpha, down alone"),
    "alpha alone": ({f"{LAYER}.alpha": torch.tensor(1.0)}, "has alpha alone"),
    "not finite": (pair() | {f"{LAYER}.lora_down.weight": NAN}, "values that are not finite"),
    "infinite": (pair() | {f"{LAYER}.lora_up.weight": torch.full((64, 4), torch.inf)}, "values that are not finite"),
    "alpha not finite": (pair(**{f"{LAYER}.alpha": torch.tensor(torch.nan)}), "alpha is not one finite number"),
    "two alphas": (pair(**{f"{LAYER}.alpha": torch.ones(2)}), "alpha is not one finite number"),
    "too wide": (pair() | {f"{LAYER}.lora_down.weight": BIG}, r"do not fit: .*of a weight \[64, 65\], expected \[64, 64\]"),
    "another rank": (pair() | {f"{LAYER}.lora_down.weight": torch.ones(3, 64)}, r"factors \[64, 4\] and \[3, 64\]"),
    "no dimensions": (pair() | {f"{LAYER}.lora_down.weight": torch.ones(256)}, "do not fit: .*factors"),
    "empty": (pair() | {f"{LAYER}.lora_down.weight": torch.ones(0, 64), f"{LAYER}.lora_up.weight": torch.ones(64, 0)}, "an empty tensor"),
    "whole numbers": (pair() | {f"{LAYER}.lora_down.weight": torch.ones(4, 64, dtype=torch.long)}, "stored as I64"),
    "eight bits": (pair() | {f"{LAYER}.lora_down.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
    "a key of another kind": (pair(**{f"{LAYER}.lora_C.weight": torch.ones(4, 4)}), "not understood: .*lora_C"),
    "a layer that no model has": (pair(**{k.replace("mid", "rear"): v for k, v in pair().items()}), "does not have: lora_unet_rear"),
    "two kinds of one layer": (pair(**{f"{LAYER}.diff": torch.ones(64, 64)}), "not complete"),
    "twice the same": (pair(**{f"{LAYER}.lora_A.weight": torch.ones(4, 64)}), "are the same of one layer"),
    "a bias where there is none": ({f"{LAYER}.diff_b": torch.ones(64)}, "does not have"),
    "a LoHa without a factor": ({f"{LAYER}.hada_w1_a": torch.ones(64, 4), f"{LAYER}.hada_w1_b": torch.ones(4, 64)}, "not complete"),
    "a LoHa of two shapes": ({f"{LAYER}.hada_w1_a": torch.ones(64, 4), f"{LAYER}.hada_w1_b": torch.ones(4, 64),
                              f"{LAYER}.hada_w2_a": torch.ones(64, 4), f"{LAYER}.hada_w2_b": torch.ones(4, 32)}, "differ in shape"),
    "a LoKr without its second": ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "not complete"),
    "a LoKr of two ranks": ({f"{LAYER}.lokr_w1_a": torch.ones(2, 2), f"{LAYER}.lokr_w1_b": torch.ones(2, 2),
                             f"{LAYER}.lokr_w2_a": torch.ones(32, 3), f"{LAYER}.lokr_w2_b": torch.ones(3, 32)}, "two ranks"),
    "a LoKr that is too small": ({f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(3, 3)}, r"of a weight \[6, 6\]"),
    "a DoRA of another width": (pair(**{f"{LAYER}.dora_scale": torch.ones(7, 1)}), r"its dora_scale is \[7, 1\]"),
    "what overflows": (pair() | {f"{LAYER}.lora_up.weight": torch.full((64, 4), 3e38)}, "weights that are not finite"),
    "nothing": ({}, "no LoRA or the like: it holds 0 tensors"),
    "a text tower": ({"text_model.embeddings.token_embedding.weight": torch.ones(9, 9)}, "a text tower alone"),
    "an embedding": ({"emb_params": torch.ones(2, 768)}, r"a textual-inversion embedding; give it .*\(--embedding\)"),
    "an OFT": ({f"{LAYER}.oft_blocks": torch.ones(4, 2, 2)}, "an OFT"),
    "a ControlNet": ({"control_model.zero_convs.0.0.weight": torch.ones(9, 9, 1, 1)}, "a ControlNet"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("form", ["l.safetensors", "l.pt"])
def test_damaged_files_are_refused_in_one_message(folders, tmp_path, what, form):
    state, said = DAMAGED[what]
    path = tmp_path / form
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    said = said.replace("F8_E4M3", "float8_e4m3fn").replace("I64", "int64") if path.suffix == ".pt" else said
    with pytest.raises(CheckpointError, match=said) as error:
        merge(folders["sd1"], path)
    assert str(path) in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize("alpha", [2.0, 2])
def test_an_alpha_that_is_no_tensor_is_not_passed_over(folders, tmp_path, alpha):
    torch.save(pair(**{f"{LAYER}.alpha": alpha}), tmp_path / "l.pt")
    with pytest.raises(CheckpointError, match="numbers are no tensors: lora_unet.*alpha"):
        find(folders["sd1"], lora=[(tmp_path / "l.pt", 1.0)])


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("form", ["l.safetensors", "l.pt"])
def test_files_that_are_cut_short_are_refused(folders, tmp_path, form, share):
    path = tmp_path / form
    (save_file if path.suffix == ".safetensors" else torch.save)(pair(), path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        merge(folders["sd1"], path)


@pytest.mark.parametrize("said", ["{", "[1]", '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": true}',
                                  '{"unet.alpha_pattern": [4]}', '{"unet.alpha_pattern": {"(a+)+$": 4}}'])
def test_settings_that_hold_no_alpha_are_refused(folders, tmp_path, said):
    save_file({k.replace(LAYER, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"): v for k, v in pair().items()},
              tmp_path / "l.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError, match="alpha"):
        find(folders["sd1"], lora=[(tmp_path / "l.safetensors", 1.0)])


# ---------------------------------------------------------------------------------------------------------------- hostile

class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["lora", "embeddings"])
@pytest.mark.parametrize("name", ["l.pt", "l.bin", "l.ckpt", "l.pth"])
def test_no_code_of_a_pickle_runs(folders, tmp_path, how, name):
    ran = tmp_path / "ran"
    state = pair() if how == "lora" else {"string_to_param": {"*": torch.zeros(2, 64)}, "string_to_token": {"*": 265}}
    torch.save(state | {"x": Runs(ran)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="wants to use .*mkdir.*was not loaded"):
        find(folders["sd1"], **{how: [(tmp_path / name, 1.0 if how == "lora" else "<w>")]})
    assert not ran.exists()


def test_parameters_whose_state_is_no_dictionary_are_no_embedding(folders, tmp_path):
    """What a module's state would be is looked at, and is whatever a file says."""
    made = raw.name("torch.nn.modules.container.ParameterDict") + b")" + raw.NEWOBJ + b"](" + raw.text("no") + raw.text("state") + b"e" + raw.BUILD
    (tmp_path / "x.pt").write_bytes(raw.archive(raw.dictionary(string_to_param=made, string_to_token=b"}")))
    with pytest.raises(CheckpointError, match="a textual-inversion embedding"):
        find(folders["sd1"], embeddings=[(tmp_path / "x.pt", "<w>")])


@pytest.mark.parametrize("what", ["a folder", "nothing", "a web page", "a pipe", "a zip archive"])
@pytest.mark.parametrize("how", ["lora", "embeddings"])
def test_what_is_no_such_file_is_said(folders, tmp_path, what, how):
    path = tmp_path / "l.safetensors"
    if what == "a folder":
        path.mkdir()
    elif what == "a web page":
        path.write_text("<!doctype html>")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a zip archive":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(CheckpointError, match=str(path)):
        find(folders["sd1"], **{how: [(path, None if how == "embeddings" else 1.0)]})


# --------------------------------------------------------------------------------------------------------------- arguments

@pytest.mark.parametrize("given", [7, [7], [("l", "x")], [("l", 1, 2)], ("l", float("nan")), [("l", True)], {"l": 1}, ("l", 1e31)])
def test_what_is_no_lora_is_a_usage_error(given):
    with pytest.raises(UsageError, match="lora"):
        p2p.load("emoji", device="cpu", lora=given)


@pytest.mark.parametrize("given", [7, [7], {"<w>": 7}, [("x", 7)], {7: "x"}])
def test_what_is_no_embedding_is_a_usage_error(given):
    with pytest.raises(UsageError, match="embeddings"):
        p2p.load("emoji", device="cpu", embeddings=given)


# ---------------------------------------------------------------------------------------------------- on the command line

@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_file({"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(4))}, folder / "e.safetensors")
    return write(folder / "a:b.safetensors", made(weights)), folder / "e.safetensors"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run(folders, out, capsys, *options, source="a <w> on grass"):
    assert main(["edit", source, "a dog on grass", *SMALL, "--model", str(folders["sd1"]), "-o", str(out), *options]) == 0
    return [Path(p) for p in capsys.readouterr().out.split()]


@pytest.mark.slow
def test_what_was_added_is_recorded_and_done_again(folders, files, tmp_path, capsys):
    one, words = files
    plain = run(folders, tmp_path, capsys)
    pictures = run(folders, tmp_path, capsys, "--lora", f"{one}:0.5", "--lora", str(one), "--embedding", f"{words}:<w>")
    s = read_settings(pictures[1])
    assert [each["weight"] for each in s["lora"]] == [0.5, 1.0] and s["embeddings"][0]["words"] == ["<w>"]
    assert Image.open(plain[1]).tobytes() != Image.open(pictures[1]).tobytes() and "lora" not in read_settings(plain[1])
    assert main(["edit", "--from", str(pictures[1]), "-o", str(tmp_path)]) == 0
    assert [Path(p).read_bytes() for p in capsys.readouterr().out.split()] == [p.read_bytes() for p in pictures]
    keywords = dict(lora=[(one, 0.5), one], embeddings={"<w>": words})
    models = [p2p.load(folders["sd1"], device="cpu", **how) for how in ({}, keywords, keywords | {"lora": [(one, 0.6), one]})]
    ids = {jobs.parse({"source": "a cat", "targets": ["a dog"]}, 1, tmp_path, m).id for m in models}
    assert len(ids) == 3 and len({m.sha256 for m in models}) == 1
    assert models[0].overrides == {} and models[1].overrides == {name: s[name] for name in ("lora", "embeddings")}


@pytest.mark.slow
def test_another_file_is_not_taken_for_the_recorded_one(folders, files, tmp_path, capsys):
    one, words = (shutil.copy(file, tmp_path / f"{i}.safetensors") for i, file in enumerate(files))
    picture = run(folders, tmp_path, capsys, "--lora", f"{one}:0.5", "--embedding", f"{words}:<w>")[1]

    def again(*options):
        code = main(["edit", "--from", str(picture), "-o", str(tmp_path), *options])
        return code, capsys.readouterr()

    moved = [str(Path(file).rename(tmp_path / f"moved{i}.safetensors")) for i, file in enumerate((one, words))]
    code, said = again()
    assert code == 3 and "0.safetensors: no such file" in said.err and "say with --lora where it lies" in said.err
    code, said = again("--lora", moved[0])
    assert code == 3 and "say with --embedding where it lies" in said.err
    for lora_option, code in ((moved[0], 0), (f"{moved[0]}:0.5", 0), (f"{moved[0]}:0.6", 2)):
        assert again("--lora", lora_option, "--embedding", moved[1])[0] == code
    code, said = again("--lora", moved[0], "--lora", moved[0], "--embedding", moved[1])
    assert code == 2 and "1 files are recorded" in said.err
    for name, i in (("--lora", 0), ("--embedding", 1)):
        state = {k: v * 1.01 for k, v in load_file(moved[i]).items()}
        save_file(state, tmp_path / f"other{i}.safetensors")
        given = [moved[0], moved[1]]
        given[i] = str(tmp_path / f"other{i}.safetensors")
        code, said = again("--lora", given[0], "--embedding", given[1])
        assert code == 3 and "not the file that made" in said.err and f"the right one with {name}" in said.err


def test_a_picture_without_them_takes_none(folders, files, tmp_path, capsys):
    picture = run(folders, tmp_path, capsys)[1]
    for option, file in zip(("--lora", "--embedding"), files):
        assert main(["edit", "--from", str(picture), option, str(file), "-o", str(tmp_path)]) == 2
        assert "0 files are recorded" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("said", [{"lora": 7}, {"lora": [7]}, {"lora": [{"weight": "x", "sha256": "y"}]}, {"lora": [{"sha256": "y"}]},
                                  {"embeddings": [{"words": 7}]}, {"places": {"lora": ["/no/such"]}},
                                  {"places": {"lora": ["org/name"]}}])
def test_settings_of_a_stranger_are_refused(folders, files, tmp_path, capsys, said):
    picture = run(folders, tmp_path, capsys, "--lora", str(files[0]), "--embedding", f"{files[1]}:<w>")[1]
    save_png(tmp_path / "theirs.png", Image.open(picture), read_settings(picture) | said)
    assert main(["edit", "--from", str(tmp_path / "theirs.png"), "-o", str(tmp_path)]) in (2, 3)
    assert "Hub" not in capsys.readouterr().err


@pytest.mark.slow
def test_an_inversion_is_of_the_model_with_its_add_ons(folders, files):
    model = p2p.load(folders["sd1"], device="cpu", lora=files[0])
    inv = p2p.invert(model, Image.new("RGB", (16, 16), "red"), "a cat", method="ddim", steps=2, height=16, width=16)
    assert json.loads(json.dumps(inv.overrides)) == model.overrides
    p2p.edit(model, inv, "a dog")
    with pytest.raises(UsageError, match="made with .*lora.*: load it as it was"):
        p2p.edit(p2p.load(folders["sd1"], device="cpu"), inv, "a dog")


def test_convert_and_inspect_take_them(folders, weights, files, tmp_path, capsys):
    assert main(["convert", str(folders["sd1"]), str(tmp_path / "m.safetensors"), "--lora", f"{files[0]}:0.5"]) == 0
    layer = next(iter(LAYERS["sd1"]))
    want = dict(read_tensors(find(folders["sd1"], lora=[(files[0], 0.5)]).unet, UNet))[f"{layer}.weight"]
    assert torch.equal(load_file(tmp_path / "m.safetensors")[f"model.diffusion_model.{LAYERS['sd1'][layer]}.weight"], want)
    capsys.readouterr()
    assert main(["inspect", str(folders["sd1"]), "--lora", str(files[0])]) == 0
    assert "merged with weight 1: LoRA, rank 3, alpha 5; weights: 9 of the UNet" in capsys.readouterr().out
    assert main(["inspect", str(files[1])]) == 0
    assert "word        e: 2 of width 64" in capsys.readouterr().out
    for file in files:
        assert main(["inspect", str(file), "--family", "sd1", "--lora", str(files[0])]) == 3
        assert "an add-on, not a model, which reads no family, lora" in capsys.readouterr().err


def test_a_list_is_run_with_them(folders, files, tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text('{"source": "a <w>", "targets": ["a dog"], "steps": 2, "height": 16, "width": 16}\n')
    argv = ["batch", str(tmp_path / "list.jsonl"), "--model", str(folders["sd1"]), "-o", str(tmp_path / "out")]
    assert main([*argv, "--lora", str(files[0]), "--embedding", f"{files[1]}:<w>"]) == 0
    picture = next((tmp_path / "out").glob("*/*.png"))
    assert read_settings(picture)["lora"][0]["weight"] == 1 and read_settings(picture)["embeddings"]


@pytest.mark.slow
@pytest.mark.parametrize("name, option", [("lora", "--lora"), ("embeddings", "--embedding"), ("clip_skip", "--clip-skip")])
@pytest.mark.parametrize("of_target", [False, True])
def test_a_line_of_a_list_sets_nothing_of_the_model(folders, tmp_path, capsys, name, option, of_target):
    """It is loaded once for the whole list."""
    target = {"prompt": "a dog"} | ({name: "x"} if of_target else {})
    line = {"source": "a cat", "targets": [target]} | ({} if of_target else {name: "x"})
    (tmp_path / "list.jsonl").write_text(json.dumps({"source": "a cat", "targets": ["a dog"]}) + "\n" + json.dumps(line) + "\n")
    assert main(["batch", str(tmp_path / "list.jsonl"), "--model", str(folders["sd1"]), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{name}: of the model, which is loaded once" in error and f"give {option} to the command" in error
    assert "line 2" in error and not list((tmp_path / "out").glob("*/*.png"))


def test_dora_files_say_so(weights, tmp_path, capsys):
    g, layer = torch.Generator().manual_seed(0), next(iter(LAYERS["sd1"]))
    tensors, change = lora(g, weights["sd1"][f"{layer}.weight"])
    tensors["dora_scale"] = dora(g, weights["sd1"][f"{layer}.weight"], change, "outputs")[0]
    assert main(["inspect", str(write(tmp_path / "l.safetensors", {layer: tensors}))]) == 0
    assert "add-on      LoRA (DoRA), rank 3, alpha 5" in capsys.readouterr().out
