"""Tokenizers of diffusers folders: their tokens are CLIP's, in whatever file they are written, or they are refused."""

import json

import published
import pytest
from oracles import transformers
from test_configs import changed, laid_out

from p2p import CheckpointError
from p2p.models.text import END, START
from p2p.weights.load import find
from p2p.weights.tokenizer import merges, vocabulary

CONFIG = "tokenizer/tokenizer_config.json"


@pytest.fixture
def folder(tmp_path):
    return laid_out(tmp_path, published.SD1)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """CLIP's tokenizer as transformers writes it."""
    made = transformers.CLIPTokenizer(vocab=vocabulary(), merges=[tuple(m.split(" ")) for m in merges()])
    folder = tmp_path_factory.mktemp("clip")
    made.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_ours_are_the_tokens_of_transformers(theirs):
    clip = transformers.CLIPTokenizer.from_pretrained(theirs)
    assert clip.get_vocab() == vocabulary() and len(merges()) == 48894
    assert clip("a cat")["input_ids"] == [START, 320, 2368, END]


def test_what_transformers_writes_is_read(folder, theirs):
    for file in theirs.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    assert (folder / "tokenizer/tokenizer.json").exists() and find(folder).text[0].config.pad_id == END


@pytest.mark.slow
def test_words_and_merges_as_published(folder):
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges(), "one more", ""]), encoding="utf-8")
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<|endoftext|>": END}))
    assert find(folder).family == "sd1"
    (folder / "tokenizer/merges.txt").write_bytes("\r\n".join(["#version: 0.2", *merges(), ""]).encode())   # edited on Windows
    changed(folder, CONFIG, added_tokens_decoder={"0": {"content": "!"}, str(END): {"content": "<|endoftext|>"}}, unk_token="<|endoftext|>")
    assert find(folder).family == "sd1"


def swapped(pairs):
    return [pairs[1], pairs[0], *pairs[2:]]


def tokens(**changes):
    """A tokenizer.json of CLIP's, with changes."""
    model = {"type": "BPE", "vocab": vocabulary(), "merges": merges()} | changes
    return json.dumps({"added_tokens": model.pop("added", []), "model": model})


FILES = {   # what lies in the folder of the tokenizer, what is said
    "other merges": ("merges.txt", lambda: "#version: 0.2\n" + "\n".join(swapped(merges())), "another vocabulary"),
    "few merges": ("merges.txt", lambda: "#version: 0.2\n" + "\n".join(merges()[:9]), "another vocabulary"),
    "merges of bytes": ("merges.txt", lambda: b"#version\n\xff\xfe", "cannot be read"),
    "other words": ("tokenizer.json", lambda: tokens(vocab=vocabulary() | {"cat</w>": 3}), "another vocabulary"),
    "no words": ("tokenizer.json", lambda: tokens(vocab=None), "another vocabulary"),
    "other pairs": ("tokenizer.json", lambda: tokens(merges=swapped(merges())), "another vocabulary"),
    "pairs that are none": ("tokenizer.json", lambda: tokens(merges=3), "another vocabulary"),
    "no model": ("tokenizer.json", lambda: '{"model": [1]}', "expected an object"),
    "no JSON": ("tokenizer.json", lambda: "{", "not readable as JSON"),
    "JSON of another kind": ("vocab.json", lambda: "[1]", "holds a list, not an object"),
    "tokens that are none": ("tokenizer.json", lambda: json.dumps(json.loads(tokens()) | {"added_tokens": 5}), "added_tokens = 5; expected a list"),
    "a word more": ("tokenizer.json", lambda: tokens(added=[{"id": 49408, "content": "<sks>"}]), "adds the token '<sks>'"),
    "a word of another number": ("added_tokens.json", lambda: '{"cat</w>": 7}', "adds the token 'cat</w>'"),
    "a new word": ("added_tokens.json", lambda: '{"<sks>": 49408}', "adds the token '<sks>'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FILES)
def test_other_tokens_are_refused(folder, case):
    name, text, said = FILES[case]
    text = text()
    (folder / "tokenizer" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        find(folder)


@pytest.mark.parametrize("field, value, said", [
    ("bos_token", "<|endoftext|>", "bos_token"), ("eos_token", {"content": "!"}, "eos_token = '!'"), ("add_eos_token", False, "add_eos_token"),
    ("additional_special_tokens", ["<sks>"], "additional_special_tokens"), ("extra_special_tokens", {"x": "<sks>"}, "extra_special_tokens"),
    ("added_tokens_decoder", {"49408": {"content": "<sks>"}}, "adds the token '<sks>'"), ("added_tokens_decoder", [1], "expected an object"),
    ("added_tokens_decoder", {"1": {"content": 3}}, "adds the token"), ("pad_token", {"content": 3}, "pads with")])
def test_fields_that_change_tokens_are_refused(folder, field, value, said):
    changed(folder, CONFIG, **{field: value})
    if field == "pad_token":   # or it is overruled
        (folder / "tokenizer/special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError, match=f"{CONFIG}: .*{said}"):
        find(folder)
