"""DeepFloyd's T5 from a stranger's folder: every tensor is the file's, nothing in it runs or is unpickled."""

import builtins
import json
import os

import pytest
import torch
from deepfloyd_models import randomised, t5
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import transformers
from safetensors.torch import load_file, save_file

from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.weights import fields
from p2p.weights.t5 import load_t5

CPU, F32 = torch.device("cpu"), torch.float32
WEIGHTS, CONFIG = "text_encoder/model.safetensors", "text_encoder/config.json"


@pytest.fixture
def folder(tmp_path):
    t5(tmp_path)
    return tmp_path


def change(file, **fields):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | fields))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["safetensors", "bin", "shards", "embed_tokens", "with a decoder"])
def test_it_is_transformers_own(folder, how):
    theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=F32)
    state = load_file(folder / WEIGHTS)
    if how == "bin":
        (folder / WEIGHTS).unlink()
        torch.save(state, folder / "text_encoder/pytorch_model.bin")
    elif how == "shards":
        (folder / WEIGHTS).unlink()
        theirs.save_pretrained(folder / "text_encoder", max_shard_size="10KB")
        assert (folder / f"{WEIGHTS}.index.json").exists()
    elif how == "embed_tokens":
        save_file(
            {("encoder.embed_tokens.weight" if k == "shared.weight" else k): v for k, v in state.items()},
            folder / WEIGHTS,
        )
    elif how == "with a decoder":
        save_file(
            state | {"decoder.final_layer_norm.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3)},
            folder / WEIGHTS,
        )
    ours = load_t5(folder, CPU, F32)
    ids = ours.tokenize(["a cat on grass", ""])
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        assert not ours.tower.training and torch.equal(ours.encode(ids)[0], want)


SIZES = [   # each field of the config, away from its usual value
    dict(feed_forward_proj="relu"),
    dict(feed_forward_proj="gelu", d_kv=4, num_heads=3),
    dict(feed_forward_proj="gated-silu", d_kv=24, num_heads=5, num_layers=3),
    dict(layer_norm_epsilon=0.03, d_ff=7),
    dict(relative_attention_num_buckets=4, relative_attention_max_distance=2),
    dict(relative_attention_num_buckets=9, relative_attention_max_distance=60, d_model=17),
    dict(tie_word_embeddings=False, is_gated_act=False, dense_act_fn="relu"),
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=lambda c: ", ".join(f"{k}={v}" for k, v in c.items()))
def test_every_field_of_its_config_is_used(folder, sizes):
    """As transformers reads the same folder."""
    change(folder / CONFIG, **sizes)
    made = randomised(transformers.T5EncoderModel(transformers.T5Config.from_pretrained(folder / "text_encoder")))
    save_file({k: v for k, v in made.state_dict().items() if k != "encoder.embed_tokens.weight"}, folder / WEIGHTS)
    theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=F32)
    ours = load_t5(folder, CPU, F32)
    ids = ours.tokenize(["a cat on grass, a big red hippopotamus", ""])
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        assert want.isfinite().all() and torch.equal(ours.encode(ids)[0], want)


def test_every_field_of_transformers_config_is_in_a_table():
    known = {*fields.T5.used.split(), *fields.T5.supported, *" ".join(fields.T5.idle).split()}
    assert {k for k, v in transformers.T5Config().to_dict().items() if v} <= known


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), count=st.integers(1, 40), put=st.binary(max_size=6))
def test_a_damaged_tokenizer_is_read_or_refused(folder, at, count, put):
    """tokenizer.json is read by compiled code, whose panics are no Exceptions."""
    file = folder / "tokenizer/tokenizer.json"
    whole = file.read_bytes()
    at = int(at * len(whole))
    file.write_bytes(whole[:at] + put + whole[at + count:])
    try:
        load_t5(folder, CPU, F32)
    except CheckpointError:
        pass
    finally:
        file.write_bytes(whole)


def test_halves_keep_wide_what_transformers_keeps_wide(folder):
    theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    ours = load_t5(folder, CPU, torch.float16).tower
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {
        k: v.dtype for k, v in theirs.state_dict().items()
    }
    assert ours.shared.weight.data_ptr() == ours.encoder.embed_tokens.weight.data_ptr()


def rewritten(edit):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS)

    return damage


def retokenized(folder, edit):
    file = folder / "tokenizer/tokenizer.json"
    said = json.loads(file.read_text())
    edit(said)
    file.write_text(json.dumps(said))


def sentencepiece(folder, data):
    """In place of tokenizer.json, as DeepFloyd released it."""
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/spiece.model").write_bytes(data)
    change(folder / "tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")


def sharded(folder, name):
    state = load_file(folder / WEIGHTS)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
    (folder / WEIGHTS).unlink()


LAYER = "encoder.block.1.layer.0.SelfAttention.q.weight"
DAMAGES = {  # what happened to the folder, what is said
    "a tensor is missing": (rewritten(lambda s: s.pop(LAYER)), f"T5 does not fit. 1 missing: {LAYER}"),
    "the embedding is missing": (
        rewritten(lambda s: s.pop("shared.weight")),
        "1 missing: encoder.embed_tokens.weight",
    ),
    "a tensor has another shape": (
        rewritten(lambda s: s.update({LAYER: torch.zeros(32, 31)})),
        rf"{LAYER} is \[32, 31\], expected \[32, 32\]",
    ),
    "a tensor is turned": (
        rewritten(lambda s: s.update({LAYER: torch.zeros(16, 64)})),
        rf"{LAYER} is \[16, 64\]",
    ),
    "a tensor too many": (
        rewritten(lambda s: s.update({"encoder.block.7.x": torch.zeros(2)})),
        "1 unexpected: encoder.block.7.x",
    ),
    "a tensor of integers": (
        rewritten(lambda s: s.update({LAYER: torch.zeros(32, 32).int()})),
        f"{LAYER} holds torch.int32",
    ),
    "a tensor of NaN": (
        rewritten(lambda s: s.update({LAYER: torch.full((32, 32), float("nan"))})),
        f"{LAYER} holds values that are not finite",
    ),
    "more layers": (lambda f: change(f / CONFIG, num_layers=3), r"9 missing: encoder.block.2"),
    "10^6 layers": (lambda f: change(f / CONFIG, num_layers=10**6), "num_layers = 1000000"),
    "half a layer": (lambda f: change(f / CONFIG, num_layers=1.5), "num_layers = 1.5"),
    "no heads": (lambda f: change(f / CONFIG, num_heads=0), "num_heads = 0"),
    "a wide one": (lambda f: change(f / CONFIG, d_model=2**60), "d_model"),
    "an unknown activation": (
        lambda f: change(f / CONFIG, feed_forward_proj="evil", dense_act_fn="evil"),
        "no T5 has its config",
    ),
    "code of its own, for the network": (
        lambda f: change(f / CONFIG, auto_map={"AutoModel": "evil.Evil"}),
        "no auto_map",
    ),
    "code of its own, for the tokenizer": (
        lambda f: change(
            f / "tokenizer/tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.Evil", None]},
            tokenizer_class="Evil",
        ),
        "asks for code",
    ),
    "code of its own, in a second config": (
        lambda f: change(
            f / "tokenizer/config.json", auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"
        ),
        "no auto_map",
    ),
    "another tokenizer": (
        lambda f: change(f / "tokenizer/tokenizer_config.json", tokenizer_class="RagTokenizer"),
        "asks for code",
    ),
    "no tokenizer": (lambda f: [x.unlink() for x in (f / "tokenizer").iterdir()], "tokenizer cannot be read"),
    "a tokenizer that is none": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text("{"),
        "tokenizer cannot be read",
    ),
    "a tokenizer of more tokens": (
        lambda f: retokenized(f, lambda t: t["model"]["vocab"].extend([f"x{i}", -3.0] for i in range(99))),
        "has the token 130, of a network that knows 32",
    ),
    "a tokenizer without padding": (
        lambda f: change(f / "tokenizer/tokenizer_config.json", pad_token=None),
        "no token for padding",
    ),
    "a damaged spiece.model": (lambda f: sentencepiece(f, b"\x0a\xff\xff\xff\xff"), "tokenizer cannot be read"),
    "no bytes of spiece.model": (lambda f: sentencepiece(f, b""), "tokenizer cannot be read"),
    "another network": (lambda f: change(f / CONFIG, model_type="umt5"), "model_type = 'umt5'"),
    "a field that nobody knows": (lambda f: change(f / CONFIG, colour=3), "colour = 3 .not known"),
    "attention by code of a stranger's": (
        lambda f: change(f / CONFIG, attn_implementation="evil/kernel"),
        "attn_implementation = 'evil/kernel' .not known",
    ),
    "weights in another form": (
        lambda f: change(f / CONFIG, quantization_config={"quant_method": "x"}),
        "quantization_config",
    ),
    "a decoder": (lambda f: change(f / CONFIG, is_decoder=True), "is_decoder = True"),
    "two buckets": (lambda f: change(f / CONFIG, relative_attention_num_buckets=2), "no T5 has 2 buckets"),
    "buckets without a number": (lambda f: change(f / CONFIG, relative_attention_num_buckets=None), "no T5 has None"),
    "near buckets alone": (
        lambda f: change(f / CONFIG, relative_attention_max_distance=8),
        "no T5 has 32 buckets for positions of which 8",
    ),
    "an epsilon of text": (lambda f: change(f / CONFIG, layer_norm_epsilon="x"), "layer_norm_epsilon = 'x'"),
    "an epsilon that is null": (lambda f: change(f / CONFIG, layer_norm_epsilon=None), "no T5 has its config"),
    "a shard outside": (lambda f: sharded(f, "../x.safetensors"), "only plain file names"),
    "a shard that is absent": (lambda f: sharded(f, "x.safetensors"), "x.safetensors: no such file"),
    "no config": (lambda f: (f / CONFIG).unlink(), "no such file"),
    "no JSON": (lambda f: (f / CONFIG).write_text("["), "not readable as JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights found"),
    "cut weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]),
        "damaged or cut short",
    ),
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch mark",)


@pytest.fixture
def alarmed(monkeypatch):
    """Nothing may be asked, unpickled by torch, or imported from the folder."""

    def alarm(*args, **kw):
        raise AssertionError("asked, or unpickled")

    monkeypatch.setattr(builtins, "input", alarm)
    monkeypatch.setattr(torch, "load", alarm)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_hostile_folder_is_refused(folder, case, alarmed):
    damage, said = DAMAGES[case]
    for where in ("text_encoder", "tokenizer"):
        (folder / where / "evil.py").write_text("raise AssertionError('run')")
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as error:
        load_t5(folder, CPU, F32)
    assert str(folder) in str(error.value) and len(str(error.value)) < 700


def test_a_malicious_pickle_is_not_loaded(folder, alarmed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state | {"x": Evil()}, folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="wants to use posix.system.*malicious"):
        load_t5(folder, CPU, F32)
    assert not (tmp_path / "mark").exists()


def test_it_is_a_model_file_that_the_exit_code_blames(folder, capsys):
    rewritten(lambda s: s.pop(LAYER))(folder)
    assert main(["encode", "a cat", "--model", str(folder), "--out", str(folder / "out")]) == 3
    assert LAYER in capsys.readouterr().err and not (folder / "out").exists()


def test_what_is_not_finite_is_not_written(folder, capsys):
    """Weights that are finite, and text that is not: an exit code of its own, and no file."""
    rewritten(lambda s: s.update({"encoder.final_layer_norm.weight": torch.full((32,), 3e38)}))(folder)
    assert main(["encode", "a cat", "--model", str(folder), "--out", str(folder / "out")]) == 4
    assert "T5 gives values that are not finite in float32" in capsys.readouterr().err and not (folder / "out").exists()


def test_tokens_are_shown_without_the_network(folder, capsys):
    (folder / WEIGHTS).unlink()
    assert main(["tokens", "a cat", "a big cat", "--model", str(folder)]) == 0
    said, own = capsys.readouterr().out, transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    for prompt in ("a cat", "a big cat"):
        for token in own(prompt)["input_ids"]:
            assert f"  {token:5}  " in said
    assert "'a big cat' from 'a cat' (mode refine): token of the target <- of the source" in said and "<- new" in said
    (folder / "tokenizer").rename(folder / "words")
    assert main(["tokens", "a cat", "--model", str(folder)]) == 3 and "no T5 with a tokenizer there" in capsys.readouterr().err


@pytest.mark.parametrize("what, said", [("absent", "no such folder"), ("file", "no T5 there"), ("clip", "no T5 there")])
def test_a_model_without_t5_is_not_taken_for_a_damaged_one(tmp_path, capsys, what, said):
    if what == "file":
        (tmp_path / what).write_bytes(b"x")
    elif what == "clip":
        (tmp_path / what / "text_encoder").mkdir(parents=True)
        (tmp_path / what / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    assert main(["encode", "a cat", "--model", str(tmp_path / what), "-o", str(tmp_path / "out")]) == 3
    assert said in capsys.readouterr().err
