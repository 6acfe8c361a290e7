"""Faults that a fresh look at issue L's lines found, with inputs of its own: each with its right value."""
import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import p2p
from p2p import CheckpointError, UsageError
from p2p.cli.parser import main
from p2p.lists import pie, pie_data
from p2p.request.prompts import check
from p2p.weights import folder
from p2p.weights.load import find, find_vae

SOURCE, SWAPPED = "a red cat on grass", "a red dog on grass"


@pytest.mark.slow
@pytest.mark.parametrize("settings, acts", [({}, True), ({"cross_replace_steps": 0.0}, False), ({"layers": "down"}, False),
                                            ({"layers": "up"}, True)])
def test_renormalising_hybrid_attention_acts_where_the_source_is_injected(narrow, undecoded, settings, acts):
    """There the text's share of a row is the source's, and that of the pixels the target's own: they do not sum to 1."""
    with_, left = (p2p.edit(narrow, SOURCE, p2p.Edit(SWAPPED, renormalise=r, **settings), steps=2) for r in (True, False))
    assert torch.allclose(with_.latents, left.latents, atol=1e-4) is not acts
    assert any("renormalise changes nothing" in note for note in with_.notes) is not acts


ENTRY = {"image_path": "a.png", "original_prompt": "a cat", "editing_prompt": "a dog", "blended_word": "cat dog", "mask": [10, 100]}


@pytest.mark.parametrize("field, values", [("blended_word", (5, ["cat", "dog"], {"a": 1}, True)), ("editing_prompt", (None, 5)),
                                           ("mask", ([1, 2, 3], [-5, 10], [1.5, 2], [True, 2], "12", {"1": 2}, None))])
def test_fields_of_the_benchmarks_mapping_have_their_types(tmp_path, field, values):
    file = tmp_path / "mapping_file.json"
    for value in values:
        file.write_text(json.dumps({"0001": ENTRY | {field: value}}))
        with pytest.raises(UsageError, match=f"not PIE-Bench's mapping .*0001: {field}"):
            pie_data.read(tmp_path)
    file.write_text(json.dumps({"0001": {k: v for k, v in ENTRY.items() if k != "editing_prompt"}}))
    with pytest.raises(UsageError, match="0001: no editing_prompt"):
        pie_data.read(tmp_path)
    file.write_text(json.dumps({"0001": ENTRY | {"blended_word": None, "mask": []}}))
    assert pie_data.read(tmp_path)[0][4:6] == ("", [])


@pytest.mark.parametrize("name", ["", "pie.csv", "pie.json", "a\nb", "a\0b", "a/b", "..", "noise"])
def test_rows_have_names_that_folders_beside_the_tables_can_have(tmp_path, capsys, name):
    (tmp_path / "ways.json").write_text(json.dumps({name: {"method": "noise"}}))
    command = ["eval", "pie", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--methods", "noise"]
    assert main([*command, "--ways", str(tmp_path / "ways.json")]) == 2
    assert "a row's name is that of its folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("like", [["direct"], {"a": 1}, 5, None])
def test_a_row_is_like_one_that_is_named(like):
    with pytest.raises(UsageError, match="a row's name is a text"):
        pie.custom({"like": like})


def test_a_window_of_no_word_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert main(["edit", SOURCE, SWAPPED, "--cross", "=0.4", "--out", str(tmp_path / "out")]) == 2
    assert "--cross =0.4: expected END" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("block", ["model.diffusion_model.input_blocks.{}.0.out_layers.3.weight",
                                   "cond_stage_model.transformer.text_model.encoder.layers.{}.layer_norm1.bias"])
def test_no_network_has_thousands_of_blocks(tmp_path, sd1_tensors, block):
    """To look through them, or to build them before their tensors are missed, would take minutes."""
    some = {block.format(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    all_ = some | {name: {"dtype": "F32", "shape": [0, *tensor.shape[1:]], "data_offsets": [0, 0]} for name, tensor in sd1_tensors.items()}
    head = json.dumps(all_).encode()
    (tmp_path / "many.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    began = time.process_time()
    with pytest.raises(CheckpointError, match="20,000 blocks .* no network has more than a few dozen"):
        find(tmp_path / "many.safetensors")
    assert time.process_time() - began < 30


def test_a_folder_of_pictures_hides_no_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("emoji").mkdir()
    assert find("emoji").family == "emoji"
    with pytest.raises(CheckpointError, match="model_index.json"):
        find("./emoji")


@pytest.mark.slow
def test_a_header_of_very_many_tensors_takes_no_time(tmp_path):
    head = json.dumps({f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(250_000)}).encode()
    (tmp_path / "many.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    began = time.process_time()
    with pytest.raises(CheckpointError, match="250,000 tensors, more than any model has"):
        find(tmp_path / "many.safetensors")
    assert time.process_time() - began < 30


@pytest.mark.parametrize("prompt, word, weight", [("a cat ::2", "cat", "2"), ("hot dog :: 1.5 food", "dog", "1.5"), ("a cat::2", "cat", "2")])
def test_weights_of_midjourney_are_noted_with_spaces_too(prompt, word, weight):
    (note,) = check(prompt)
    assert f"--weight {word}={weight} " in note
    assert [check(text) for text in ("a :: b", "std::vector", "at 10 ::30", "a cat :: dog")] == [[]] * 4


FOREIGN = {   # names and shapes of tensors
    "a textual-inversion embedding": [{f"<{c}>": (768,) for c in "abc"}, {"<a>": (768,), "<b>": (2, 768), "<c>": (768,)}],
    "an IP-Adapter": [{f"{n}.to_{c}_ip.weight": (9, 9) for n in (1, 3) for c in "kv"},
                      {"mid_block.attn2.processor.to_k_ip.0.weight": (9, 9)},
                      {"encoder_hid_proj.image_projection_layers.0.image_embeds.weight": (9, 9)}],
    "a PuLID": [{"pulid_ca.0.norm1.weight": (9,), "pulid_encoder.latents": (1, 9, 9)}, {"id_adapter.latents": (1, 9, 9)}],
    "a ControlNet": [{"lllite_unet_input_blocks_4_1_attn1_to_k.conditioning1.0.weight": (9, 3, 4, 4)}],
    "a tiny autoencoder": [{"taesd_decoder.1.weight": (64, 4, 3, 3), "taesd_decoder.3.conv.0.weight": (64, 9)},
                           {"decoder.1.weight": (64, 4, 3, 3), "encoder.0.weight": (64, 3, 3, 3)},
                           {"decoder.1.bias": (64,), "vae_scale": (1,)}],
    "full differences": [{f"lora_unet_{c}.b_norm": (9,) for c in "abc"}],
}


@pytest.mark.parametrize("kind, shapes", [(k, s) for k, each in FOREIGN.items() for s in each])
def test_other_layouts_of_foreign_files_are_named(tmp_path, kind, shapes):
    """Several words in one file; adapters saved by their processors alone; both halves of a tiny autoencoder."""
    save_file({k: torch.ones(s) for k, s in shapes.items()}, tmp_path / "m.safetensors")
    for read in (find, find_vae):
        with pytest.raises(CheckpointError, match=f"m.safetensors: {kind}"):
            read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", [{"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"},
                                    {"transformer_layers_per_block": [1, [1, 2]]},
                                    {"reverse_transformer_layers_per_block": [[1], 2]}])
def test_a_folder_of_a_distilled_network_is_named(change):
    with pytest.raises(CheckpointError, match="config.json: a distilled network .SSD-1B"):
        folder.unet_from_config(Path("config.json"), change, "sdxl")


def test_the_folder_of_a_tiny_autoencoder_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "latent_channels": 4}))
    with pytest.raises(CheckpointError, match="config.json: a tiny autoencoder"):
        find_vae(tmp_path)
