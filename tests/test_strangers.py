"""Text that strangers wrote: JSON, YAML and names in files: read within bounds, refused by name, printed safely."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file

from p2p import CheckpointError, UsageError
from p2p.cli.parser import main
from p2p.lists import batch, pie_data
from p2p.request.source import Inversion
from p2p.show.pictures import CHUNK, read_settings
from p2p.weights.load import BUNDLED, find
from p2p.weights.load import load as build
from p2p.weights.t5 import load_prompts
from p2p.weights.untrusted import parse_json, parse_settings

SECONDS = 5
JSON = {  # what is no JSON, or would be none that can be held, and what is said of it
    "nothing": ("", "Expecting value"),
    "cut": ('{"a": 1', "Expecting"),
    "NaN": ('{"a": NaN}', "NaN is no finite number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no finite number"),
    "1e999": ('{"a": 1e999}', "1e999 is no finite number"),
    "10^400": ('{"a": 1' + "0" * 400 + "}", "0000 ... 0000000000 is no finite number"),
    "a million digits": ('{"a": ' + "9" * 10**6 + "}", "9999 ... 9999999999 is no finite number"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' is there twice"),
    "lists 100,000 deep": ("[" * 10**5 + "]" * 10**5, "nested more than 64"),
    "objects 900 deep": ('{"a":' * 900 + "1" + "}" * 900, "nested more than 64"),
    "open for ever": ("[" * 10**7, "more than 4,194,304 values|nested"),
    "five million values": ("[" + "0," * 5 * 10**6 + "0]", "values"),
}
OTHER = {"a list": "[1, 2]", "a text": '"a"', "a number": "3", "null": "null"}


@pytest.mark.parametrize("case", JSON)
def test_json_within_bounds(case):
    began = time.process_time()
    with pytest.raises(ValueError, match=JSON[case][1]):
        parse_json(JSON[case][0])
    assert time.process_time() - began < SECONDS


def test_json_of_honest_files():
    said = {
        "model_max_length": 10**18 - 1,
        "betas": [0.00085, 1e-300],
        "name": "ü \U0001f600",
        "none": None,
        "deep": {"a": [[[1]]]},
    }
    assert parse_json(json.dumps(said)) == said and parse_json(json.dumps(said, ensure_ascii=False)) == said
    assert parse_json('{"a": NaN}', nan=True) == {"a": None}
    assert parse_json(str(10**30)) == 1e30 and parse_json(str(2**64 - 1)) == 2**64 - 1
    with pytest.raises(ValueError, match="Infinity"):
        parse_json('{"a": Infinity}', nan=True)


def _index(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    return lambda: find(tmp_path / "m.safetensors.index.json")


def _folder_file(name):
    def place(tmp_path, text):
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return lambda: find(tmp_path)

    return place


def _emoji(tmp_path, text):
    with safe_open(BUNDLED["emoji"], framework="pt") as f:
        save_file(
            {"alphas_cumprod": f.get_tensor("alphas_cumprod")},
            tmp_path / "m.safetensors",
            f.metadata() | {"unet": text},
        )
    return lambda: find(tmp_path / "m.safetensors")


def _prompts(tmp_path, text):
    save_file(
        {"prompt_embeds": torch.zeros(1, 2, 3)}, tmp_path / "p.safetensors", {"prompts": text, "tokens": "[]"}
    )
    return lambda: load_prompts(tmp_path / "p.safetensors")


def _inversion(tmp_path, text):
    save_file({"latents": torch.zeros(1, 2, 3)}, tmp_path / "i.safetensors", {"inversion": text})
    return lambda: Inversion.load(tmp_path / "i.safetensors")


def _png(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png", pnginfo=info)
    return lambda: read_settings(tmp_path / "p.png")


def _pie(tmp_path, text):
    (tmp_path / "mapping_file.json").write_text(text)
    return lambda: pie_data.read(tmp_path)


PLACES = {
    "an index of shards": _index,
    "model_index.json": _folder_file("model_index.json"),
    "a UNet's config": _folder_file("unet/config.json"),
    "a bundled model's sizes": _emoji,
    "encoded prompts": _prompts,
    "an inversion": _inversion,
    "a picture's settings": _png,
    "PIE-Bench's mapping": _pie,
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [*JSON, *OTHER])
def test_every_place_that_reads_json(tmp_path, place, case):
    text = OTHER[case] if case in OTHER else JSON[case][0]
    if len(text) > 10**6 and place in (
        "a picture's settings",
        "an inversion",
        "encoded prompts",
        "a bundled model's sizes",
    ):
        text = text[: 10**6]  # Pillow's and safetensors' own limits are tested by them
    began, read = time.process_time(), PLACES[place](tmp_path, text)
    with pytest.raises((CheckpointError, UsageError)) as error:
        read()
    assert (
        str(tmp_path) in str(error.value)
        and len(str(error.value)) < 600
        and time.process_time() - began < SECONDS
    )


# -------------------------------------------------------------------------------- sizes in configs

SIZES = {  # of a small Stable Diffusion folder: file, field, value
    "unet/config.json": {
        "layers_per_block": [10**6, -1, 0, 1.5, "2", True, [2] * 17, [[2, 2]], 10**30],
        "block_out_channels": [[10**9, 10**9], [-32, 64], [], 5, "x", [32] * 10**5, {"a": 1}],
        "transformer_layers_per_block": [10**6, [-1, 1]],
        "attention_head_dim": [0, "8"],
        "cross_attention_dim": [2**40],
        "sample_size": [-8, [8, "x"], 10**9],
        "in_channels": [None, "4", [4]],
        "down_block_types": [3, ["Evil\x1b[2J"]],
    },
    "vae/config.json": {
        "layers_per_block": [10**6],
        "block_out_channels": [[2**60, 1]],
        "scaling_factor": ["x", [1]],
        "latent_channels": [10**7],
    },
    "text_encoder/config.json": {
        "num_hidden_layers": [10**6, -2, 2.0],
        "hidden_size": [2**50, "64"],
        "vocab_size": [10**12],
        "max_position_embeddings": [10**12],
        "num_attention_heads": [0],
    },
    "scheduler/scheduler_config.json": {"beta_start": ["x", [0.1]], "beta_end": [{}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import families

    return families.save(families.build("sd1"), tmp_path_factory.mktemp("strangers") / "folder", "sd1")


@pytest.mark.parametrize(
    "file, field, value",
    [(f, k, v) for f, s in SIZES.items() for k, vs in s.items() for v in vs],
    ids=lambda x: str(x)[:24].replace("/", "."),
)
def test_sizes_are_checked_before_anything_is_built(folder, file, field, value, monkeypatch):
    before = (folder / file).read_text()
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    (folder / file).write_text(json.dumps(json.loads(before) | {field: value}))
    try:
        with pytest.raises(CheckpointError) as error:
            find(folder)
    finally:
        (folder / file).write_text(before)
    message = str(error.value)
    assert str(folder) in message and len(message) < 700 and message.isprintable()


def test_a_network_of_more_blocks_than_its_file_has_tensors_is_not_built(folder, monkeypatch):
    file = folder / "unet/config.json"
    before = file.read_text()
    file.write_text(
        json.dumps(json.loads(before) | {"layers_per_block": 256, "transformer_layers_per_block": 200})
    )
    package = find(folder)
    file.write_text(before)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    with pytest.raises(
        CheckpointError, match=r"its config asks for [\d,]+ blocks, but the file holds \d+ tensors"
    ):
        build(package, torch.device("cpu"))


# -------------------------------------------------------------------------------- settings lines


def test_settings_lines():
    text = 'params:\n  num_head_channels: 8\n  att_pool_heads: \'2\'  # and more\n# parameterization: "v"\n- a: b\nmodel:\n  x: "y"\nbad key: 1\n'
    assert parse_settings(text) == {
        "params": "",
        "num_head_channels": "8",
        "att_pool_heads": "2",
        "model": "",
        "x": "y",
    }


@pytest.mark.parametrize(
    "text",
    [
        " " * 10**6,
        "a:" * 400_000,
        "\n" * 10**6,
        "_" * 10**6,
        ("a" * 100 + " ") * 9000 + ":",
        "#" * 10**6,
        "\t\n" * 450_000,
    ],
)
def test_settings_lines_take_linear_time(text):
    began = time.process_time()
    parse_settings(text)
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    "settings, said",
    [
        (" " * 2**21, "more than 1,048,576 bytes"),
        ("num_head_channels: 0", "heads = .0."),
        ("num_head_channels: -1", "heads"),
        ("att_pool_heads: " + "9" * 5000, "sizes"),
        ("num_head_channels: x", "sizes"),
        ("att_pool_heads: 1e9", "sizes"),
    ],
)
def test_deepfloyds_settings(tmp_path, settings, said):
    (tmp_path / "config.yml").write_text(settings)
    torch.save({"encoder_pooling.1.positional_embedding": torch.zeros(1, 4)}, tmp_path / "pytorch_model.bin")
    began = time.process_time()
    with pytest.raises(CheckpointError, match=said):
        find(tmp_path)
    assert time.process_time() - began < SECONDS


def test_a_file_beside_a_model_is_read_within_bounds(tmp_path, sd1_tensors):
    save_file(sd1_tensors, tmp_path / "m.safetensors")
    beside = tmp_path / "m.yaml"
    beside.write_text('model:\n  params:\n    parameterization: "v"   # said so\n')
    assert find(tmp_path / "m.safetensors").prediction == "v"
    beside.write_text("# parameterization: v\n")
    assert find(tmp_path / "m.safetensors").prediction == "eps"
    beside.write_text("a: b\n" * 10**6)
    with pytest.raises(CheckpointError, match="m.yaml: cannot be read .more than 1,048,576 bytes"):
        find(tmp_path / "m.safetensors")


# -------------------------------------------------------------------------------- indexes


def test_an_index_that_names_itself_is_refused(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(CheckpointError, match="only plain file names"):
        find(index)


@pytest.mark.parametrize(
    "map_", [[], "x", 3, None, {"a": []}, {"a": {"b": 1}}, {"a": None}, {"a": 1.5}, {"a": True}]
)
def test_maps_of_shards_that_are_none(tmp_path, map_):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(CheckpointError, match="not an index of shards|only plain file names|no UNet"):
        find(index)


# -------------------------------------------------------------------------------- messages

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202egnp.exe\u2028\x00"


def printed(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable(), out + err
    return code, out + err


@pytest.mark.parametrize(
    "make",
    [
        lambda p: save_file({EVIL.strip("\0"): torch.zeros(2)}, p / "m.safetensors"),
        lambda p: torch.save({EVIL: torch.zeros(2)}, p / "m.safetensors"),
        lambda p: torch.save({EVIL: torch.zeros(2), "b": 3}, p / "m.ckpt"),
        lambda p: (p / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": EVIL}})),
        lambda p: (p / "m.safetensors.index.json").write_text(
            json.dumps({"weight_map": {EVIL: "gone.safetensors"}})
        ),
        lambda p: (p / "model_index.json").write_text(json.dumps({"_class_name": EVIL})),
        lambda p: (p / "m.txt").write_bytes(EVIL.encode() * 9),
        lambda p: (p / EVIL.replace("\0", "").replace("/", "")).write_bytes(b"x"),
    ],
)
def test_names_from_files_do_not_control_the_terminal(tmp_path, capsys, make):
    make(tmp_path)
    file = next(iter(tmp_path.iterdir()))
    code, said = printed(capsys, "inspect", tmp_path if file.name == "model_index.json" else file)
    assert code == 3 and 20 < len(said) < 1000


def test_what_inspect_prints_is_harmless(tmp_path, capsys, sd1_tensors):
    save_file(sd1_tensors, tmp_path / "m.safetensors", {"modelspec.prediction_type": "v" + EVIL})
    assert printed(capsys, "inspect", tmp_path / "m.safetensors")[0] == 3
    code, said = printed(capsys, "inspect", tmp_path / "m.safetensors", "--prediction", "v")
    assert code == 0 and "v (as asked)" in said


def test_why_a_job_failed_is_harmless(capsys):
    """An unforeseen error's text is a stranger's too."""
    job = SimpleNamespace(line=3)
    batch._follow([(job, f"RuntimeError: {EVIL}")], [job], 1, quiet=True)
    said = capsys.readouterr().err
    assert "line 3 failed: RuntimeError" in said and said.replace("\n", "").replace("\r", "").isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CheckpointError, UsageError])
def test_messages_are_short_and_plain(kind):
    assert str(kind(f"a{EVIL}b")) == r"a\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202egnp.exe\u2028\x00b"
    assert (
        str(kind("Größe 猫 👩‍🎨 «ok»\n  two")) == "Größe 猫 👩‍🎨 «ok»\n  two" and str(kind("a\nb")) == r"a\nb"
    )
    numbers = str(kind(f"x = {[0.25] * 1000!r}, {torch.arange(900.0)!r}; write y, z"))
    assert len(numbers) < 600 and "more" in numbers and numbers.endswith("write y, z")
    assert len(str(kind("w" * 10**6))) < 500 and len(str(kind("a b " * 10**6))) < 2**14
    short = "; ".join(f"{i}, {i}, {i}" for i in range(40))
    assert (
        str(kind(short)) == short
        and str(kind("[1, 2, 3] is not (4, 64, 64)")) == "[1, 2, 3] is not (4, 64, 64)"
    )
