"""Encoded prompts from files: what was changed in them is named before anything is computed."""
import json

import pytest
import torch
from safetensors.torch import save_file
from test_stored import flip

from p2p import CheckpointError
from p2p.models.t5 import EncodedPrompts
from p2p.models.text import Tokens
from p2p.weights.t5 import load_prompts, save_prompts


def prompts(**changed):
    text = {
        "prompts": ["", "a cat"],
        "tokens": [["", [1], [[0, 0]]], ["a cat", [3, 4, 1], [[0, 1], [2, 5], [0, 0]]]],
    }
    return {k: json.dumps(v) for k, v in (text | changed).items()}


def test_encoded_prompts_are_loaded_as_saved(tmp_path):
    want = EncodedPrompts(
        ["", "a cat"],
        [Tokens("", [1], [(0, 0)]), Tokens("a cat", [3, 4, 1], [(0, 1), (2, 5), (0, 0)])],
        torch.randn(2, 7, 5),
    )
    save_prompts(want, tmp_path / "p.safetensors")
    got = load_prompts(tmp_path / "p.safetensors")
    assert (
        got.prompts == want.prompts
        and got.split == want.split
        and torch.equal(got.embeddings, want.embeddings)
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": ["a", "a"]},
        {"prompts": [""]},
        {"prompts": [1, 2]},
        {"prompts": "ab"},
        {"prompts": 3},
        {"tokens": []},
        {"tokens": 3},
        {"tokens": [["", [1], [[0, 0]]]] * 3},
        {"tokens": [["", [1], [[0, 9]]], ["a cat", [3], [[0, 1]]]]},
        {"tokens": [[1, 2, 3]] * 2},
        {"tokens": [["", [1.5], [[0, 0]]], ["a", [3], [[0, 1]]]]},
        {"tokens": [["", [-1], [[0, 0]]], ["a", [3], [[0, 1]]]]},
        {"tokens": [["", [1, 2], [[0, 0]]], ["a", [3], [[0, 1]]]]},
        {"tokens": [["", [1], [[1, 0]]], ["a", [3], [[0, 1]]]]},
        {"tokens": [["", [1], [["a", "b"]]], ["a", [3], [[0, 1]]]]},
        {"tokens": [[["x"], [1], [[0, 0]]], ["a", [3], [[0, 1]]]]},
    ],
)
def test_prompts_that_somebody_changed(tmp_path, changed):
    save_file({"prompt_embeds": torch.zeros(2, 7, 5)}, tmp_path / "p.safetensors", prompts(**changed))
    with pytest.raises(CheckpointError, match="p.safetensors: not a file of encoded prompts") as error:
        load_prompts(tmp_path / "p.safetensors")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "embeddings",
    [
        torch.zeros(3, 7, 5),
        torch.zeros(2, 7),
        torch.zeros(2, 7, 5).int(),
        torch.full((2, 7, 5), float("nan")),
        torch.zeros(2, 0, 5),
        torch.zeros(2, 7, 5).to(torch.float8_e4m3fn),
    ],
)
def test_embeddings_that_somebody_changed(tmp_path, embeddings):
    save_file({"prompt_embeds": embeddings}, tmp_path / "p.safetensors", prompts())
    with pytest.raises(CheckpointError, match="not a file of encoded prompts"):
        load_prompts(tmp_path / "p.safetensors")


def test_one_bit_that_flips_in_encoded_prompts_is_noticed(tmp_path):
    path = tmp_path / "p.safetensors"
    save_prompts(EncodedPrompts([""], [Tokens("", [1], [(0, 0)])], torch.randn(1, 7, 5)), path)
    flip(path, path.stat().st_size - 2)
    with pytest.raises(CheckpointError, match="changed or damaged after it was saved"):
        load_prompts(path)
