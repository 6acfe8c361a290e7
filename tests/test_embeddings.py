"""Textual inversion: words of a user's own are read as diffusers reads them, and are words for all that edits by words."""
import diffusers
import pytest
import torch
from safetensors.torch import save_file

import p2p
from p2p import CheckpointError, align
from p2p.models.text import tokens
from p2p.request.emphasis import condition, read, token_weights
from p2p.request.ready import unread_words
from p2p.weights.convert import convert
from p2p.weights.embeddings import open_words
from p2p.weights.load import find

PROMPTS = ["a photo of <cat-toy> on grass", "<cat-toy>", "grass, <Cat-Toy>s and a dog", "no such word"]
WIDTHS = {"sd1": [64], "sd2": [128], "sdxl": [64, 128]}   # of tests/families.py


def load(path, **kw):
    return p2p.load(path, device="cpu", **kw)


def vectors(widths, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=g) for width in widths]


def pickled(path, value):
    torch.save(value, path)
    return path


def parameters(tensor):
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})


A1111 = {"string_to_token": {"*": 265}, "name": "cat", "step": 500, "sd_checkpoint": "4bdfc29c"}
LAYOUTS = {   # (tensors) -> files
    "A1111": lambda d, v: [pickled(d / f"x{i}.pt", A1111 | {"string_to_param": {"*": t}}) for i, t in enumerate(v)],
    "A1111, parameters": lambda d, v: [pickled(d / f"x{i}.pt", A1111 | {"string_to_param": parameters(t)}) for i, t in enumerate(v)],
    "emb_params": lambda d, v: [save(d / f"x{i}.safetensors", {"emb_params": t}) for i, t in enumerate(v)],
    "OneTrainer": lambda d, v: [save(d / f"x{i}.safetensors", {"emp_params": t}) for i, t in enumerate(v)],
    "diffusers": lambda d, v: [pickled(d / f"learned_embeds_{i}.bin", {"<cat-toy>": t}) for i, t in enumerate(v)],
    "diffusers, safetensors": lambda d, v: [save(d / f"x{i}.safetensors", {"<cat-toy>": t}) for i, t in enumerate(v)],
    "clip_l, clip_g": lambda d, v: [save(d / "x.safetensors", dict(zip(("clip_l", "clip_g"), v)))],
}


def save(path, state):
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    """Contexts of PROMPTS by diffusers, with the same vectors."""
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    convert(find(made[2]), folder)
    kind = diffusers.StableDiffusionXLPipeline if made[0] == "sdxl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(folder)
    for i, t in enumerate(vectors(WIDTHS[made[0]])):
        n = "_2" if i else ""
        pipe.load_textual_inversion(t, token="<cat-toy>", tokenizer=getattr(pipe, f"tokenizer{n}"),
                                    text_encoder=getattr(pipe, f"text_encoder{n}"))
    lowered = [p.lower() for p in PROMPTS]
    with torch.no_grad():
        return pipe.encode_prompt(lowered, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contexts_are_those_of_diffusers(made, expected, tmp_path, layout):
    files = LAYOUTS[layout](tmp_path, vectors(WIDTHS[made[0]]))
    found = load(made[2], embeddings=[(path, "<cat-toy>") for path in files]).text(PROMPTS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(load(made[2]).text(PROMPTS[:1]), expected[:1], atol=0.1)


@pytest.mark.slow
def test_words_are_the_files_own_unless_they_are_given(made, tmp_path):
    v = vectors(WIDTHS[made[0]])
    own, named = (LAYOUTS[layout](tmp_path, v) for layout in ("diffusers", "clip_l, clip_g" if len(v) > 1 else "emb_params"))
    model = load(made[2], embeddings=own)
    assert list(model.text_encoders[0].words) == ["<cat-toy>"] and "<cat-toy>: 3 vectors" in "\n".join(model.notes)
    assert list(load(made[2], embeddings={"My-Toy": named[0]}).text_encoders[0].words) == ["my-toy"]
    renamed = named[0].rename(tmp_path / "EasyNegative.safetensors")
    assert list(load(made[2], embeddings=renamed).text_encoders[0].words) == ["easynegative"]


# ----------------------------------------------------------------------------------------------------- a word of its own

@pytest.fixture(scope="module")
def emoji_words(tmp_path_factory):
    """The bundled model with two words, of three vectors and of one."""
    folder = tmp_path_factory.mktemp("words")
    model = p2p.load("emoji", device="cpu")
    table, known = model.text_encoders[0].token_embedding.weight, model.text_encoders[0].vocab.tolist()
    rows = [table[known.index(i)] for i in tokens("red cat house").ids[1:-1]]
    save_file({"<beast>": torch.stack(rows), "<hue>": rows[0].clone()}, folder / "w.safetensors")
    return p2p.load("emoji", device="cpu", embeddings=folder / "w.safetensors")


def test_vectors_copied_from_tokens_are_read_as_these_tokens(emoji, emoji_words):
    """Nothing else changes: contexts of other prompts keep their bits."""
    assert torch.equal(emoji_words.text(["a red cat house on grass"]), emoji_words.text(["a <beast> on grass"]))
    assert torch.equal(emoji.text(["a red cat on grass"]), emoji_words.text(["a <hue> cat on grass"]))
    assert torch.equal(emoji.text(["a red cat on grass"]), emoji_words.text(["a red cat on grass"]))
    assert unread_words(emoji_words, "a <beast> on grass") == []


def test_several_vectors_are_one_word_of_several_tokens(emoji_words):
    t = emoji_words.tokens("a <beast> and a <hue>, cat")
    assert [(word, len(columns)) for word, columns in align.words(t)] == [
        ("a", 1), ("<beast>", 3), ("and", 1), ("a", 1), ("<hue>,", 2), ("cat", 1)]
    assert align.word_tokens(t, "<beast>", 32) == [2, 3, 4] and align.word_tokens(t, "<BEAST>", 32) == [2, 3, 4]
    other = emoji_words.tokens("a dog and a <hue>, cat")
    assert align.is_swap(t, other)
    m = align.replacement(t, other, 32)
    assert m[2:5, 2].tolist() == [1, 1, 1] and m[5, 3] == m[7, 5] == 1


@pytest.mark.slow
def test_weights_windows_blends_and_maps_know_the_word(emoji_words):
    blend = p2p.LocalBlend(words=("<beast>", "dog"))
    r = p2p.edit(emoji_words, "a <beast> on grass", p2p.Edit("a dog on grass", local_blend=blend), steps=2, record=p2p.Record(text=256))
    assert [w for w, _ in r.maps.each_word(0)] == ["a", "<beast>", "on", "grass"]
    again = p2p.Edit("a <beast> on grass", equalizer={"<beast>": 2}, cross_replace_steps={"<beast>": 0.5})
    assert len(p2p.edit(emoji_words, "a <beast> on grass", again, steps=2).images) == 2
    assert r.settings["embeddings"][0]["words"] == ["<beast>", "<hue>"] and len(r.settings["embeddings"][0]["sha256"]) == 64


@pytest.mark.slow
def test_weights_in_a_prompt_are_on_the_whole_word(emoji_words):
    """All its tokens weigh the same: in a target as the word's fader, elsewhere in the embedding."""
    prompt, size = "a (<beast>:1.5) on grass", (64, 64)
    assert token_weights(read(prompt), emoji_words.tokens) == [1, 1, 1.5, 1.5, 1.5, 1, 1, 1]
    of_word, of_tokens = (condition(emoji_words, [p], *size).context for p in (prompt, "a (red cat house:1.5) on grass"))
    assert torch.equal(of_word, of_tokens) and not torch.equal(of_word, emoji_words.text("a <beast> on grass"))
    run = dict(steps=2, seed=1)
    faded = p2p.edit(emoji_words, "a cat on grass", prompt, **run)
    same = p2p.edit(emoji_words, "a cat on grass", p2p.Edit("a <beast> on grass", equalizer={"<beast>": 1.5}), **run)
    assert faded.images[1].tobytes() == same.images[1].tobytes()
    with pytest.raises(p2p.UsageError, match="a part of a word"):
        p2p.edit(emoji_words, "a cat on grass", "a <be(ast>:1.5) on grass", **run)


def test_words_belong_to_their_model(emoji, emoji_words):
    prompt = "a <beast> on grass"
    assert tokens(prompt) == emoji.tokens(prompt) != emoji_words.tokens(prompt)


@pytest.mark.parametrize("text, found", [
    ("<beast>s", 1), ("x<beast>", 1), ("<beast><beast>", 2), ("my-style", 1), ("my-styles", 0), ("amy-style", 0), ("my-style.", 1),
    ("MY-STYLE", 1), ("my-style-2", 1), ("<beast", 0)])
def test_words_of_letters_end_where_words_do(text, found):
    """So do not the others, as in diffusers; the longest counts."""
    words = {"<beast>": range(50000, 50002), "my-style": [50002], "my-style-2": [50003]}
    ids = tokens(text, words).ids
    assert sum(i in (50000, 50002, 50003) for i in ids) == found and len(ids) == len(tokens(text, words).spans)
    if text == "my-style-2":
        assert ids[1:-1] == [50003]


# ----------------------------------------------------------------------------------------------------------------- refused

def refused(made, files, *said):
    with pytest.raises(CheckpointError) as error:
        find(made[2], embeddings=[(path, word) for path, word in files])
    assert all(part in str(error.value) for part in (files[-1][0].name, *said)), str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.slow
@pytest.mark.parametrize("word", ["cat", "a", "<start_of_text>"])
def test_words_that_clip_knows_are_no_names(made, tmp_path, word):
    files = LAYOUTS["diffusers"](tmp_path, vectors(WIDTHS[made[0]]))
    refused(made, [(path, word) for path in files[:1]], "CLIP knows already", ":WORD")


@pytest.mark.parametrize("word", ["two words", "(cat)", "a:b", "x,y", " "])
def test_what_is_no_word_is_no_name(made, tmp_path, word):
    refused(made, [(LAYOUTS["diffusers"](tmp_path, vectors(WIDTHS[made[0]]))[0], word)], "no single word")


def test_vectors_of_another_width_are_of_another_family(made, tmp_path):
    for width, named in ((768, "sd1"), (1024, "sd2"), (1280, "sdxl"), (7, "another model")):
        file = save(tmp_path / "x.safetensors", {"<w>": torch.zeros(2, width)})
        refused(made, [(file, None)], f"width {width}", named, f"family {made[0]}")


def test_a_word_needs_as_many_vectors_in_each_tower(made, tmp_path):
    first = LAYOUTS["diffusers"](tmp_path, vectors(WIDTHS[made[0]][:1]))
    refused(made, [(first[0], None)] * 2, "is there already")
    if made[0] == "sdxl":
        refused(made, [(first[0], None)], "no vectors of width 128")
        other = save(tmp_path / "y.safetensors", {"<cat-toy>": torch.zeros(2, 128)})
        refused(made, [(other, None), (first[0], None)], "has 3 and 2 vectors")


@pytest.mark.slow
@pytest.mark.parametrize("what, state", [
    ("not finite", {"<w>": torch.full((1, 128), float("nan"))}), ("76 vectors", {"<w>": torch.zeros(76, 64)}),
    ("0 vectors", {"<w>": torch.zeros(0, 64)}), ("no embedding", {"a.weight": torch.zeros(64, 64)}), ("no embedding", {}),
    ("stored as I64", {"<w>": torch.zeros(2, 64, dtype=torch.long)}),
    ("a LoRA or the like", {"lora_unet_x.lora_down.weight": torch.zeros(4, 64), "lora_unet_x.lora_up.weight": torch.zeros(64, 4)}),
    ("a ControlNet", {"control_model.zero_convs.0.0.weight": torch.zeros(9, 9, 1, 1)})])
def test_what_is_no_embedding_is_named(sd1_file, tmp_path, what, state):
    path = save(tmp_path / "x.safetensors", state)
    with pytest.raises(CheckpointError, match=what):
        p2p.load(sd1_file, family="sd1", device="cpu", embeddings=path)


def test_a_model_without_such_towers_takes_none(tmp_path):
    path = save(tmp_path / "x.safetensors", {"<w>": torch.zeros(1, 64)})
    with pytest.raises(CheckpointError, match="no CLIP text tower"):
        find("emoji-upscaler", embeddings=[(path, None)])


def test_vectors_for_the_towers_output_are_no_words(tmp_path):
    save_file({"emp_params": torch.randn(2, 768), "emp_params_out": torch.randn(2, 768)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="emp_params_out: vectors that replace the text tower's output"):
        open_words(tmp_path / "x.safetensors")
