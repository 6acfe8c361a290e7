"""What the text towers of Stable Diffusion 3 and FLUX give together, against diffusers' pipelines; T5 from elsewhere, or none."""
import shutil
from pathlib import Path

import flow_models as made
import pytest
import torch
from deepfloyd_models import t5
from oracles import diffusers

import p2p
from p2p import CheckpointError
from p2p.cli.parser import main
from p2p.models.t5 import EncodedPrompts, NoT5
from p2p.models.text import TextEncoder
from p2p.request.emphasis import condition
from p2p.weights.mmdit import T5
from p2p.weights.t5 import load_prompts, save_prompts

pytestmark = pytest.mark.slow

PROMPTS = ["a big red cat, on grass", "", " ".join(["a dog on grass,"] * 30)]   # the last one is cut by CLIP, not by T5


@pytest.fixture(scope="module", params=["3 medium", "dev", "schnell"])
def saved(request, tmp_path_factory):
    """(kind, diffusers' pipeline, its folder)"""
    root = tmp_path_factory.mktemp("flow")
    pipe = made.pipeline(request.param, root)
    pipe.save_pretrained(root / "folder")
    return request.param, pipe, root / "folder"


def theirs(kind, pipe, prompts):
    """(context, pooled text)"""
    with torch.no_grad():
        if made.FAMILY[kind] == "flux":
            return pipe.encode_prompt(prompts, max_sequence_length=256 if kind == "schnell" else 512)[:2]
        return pipe.encode_prompt(prompts, None, None)[::2]


def check(model, kind, pipe, prompts=PROMPTS):
    context, pooled = theirs(kind, pipe, prompts)
    ours = model.condition(prompts)
    assert ours.context.shape == context.shape and (ours.context - context).abs().max() <= 1e-5 * context.abs().max()
    assert ours.vector.shape == pooled.shape and (ours.vector - pooled).abs().max() <= 1e-5


def test_the_text_is_that_of_diffusers(saved):
    kind, pipe, folder = saved
    model = p2p.load(folder, device="cpu")
    check(model, kind, pipe)
    null, (context, pooled) = model.null(2), theirs(kind, pipe, [""])
    assert (null.context - context).abs().max() <= 1e-5 * context.abs().max() and (null.vector - pooled).abs().max() <= 1e-5
    towers = [*(["clip"] if made.FAMILY[kind] == "sd3" else []), "t5"]
    assert [(isinstance(tower, TextEncoder), n) for tower, n in model.text_groups] == [
        (name == "clip", 77 if name == "clip" else 512 if kind == "dev" else 256) for name in towers]
    assert model.length == model.text(PROMPTS[:1]).shape[1] == sum(n for _, n in model.text_groups)
    assert model.tokens("a cat").ids == [i for tower, _ in model.text_groups for i in tower.tokens("a cat").ids]
    assert model.tokens("a cat").ids[-1] == 1                                       # T5's </s>


def test_tokens_of_a_model_are_its_t5s(saved, monkeypatch, capsys):
    """Of a folder, and of its name on the Hub."""
    _, _, folder = saved
    monkeypatch.setattr("p2p.weights.hub.download", lambda name, ema: folder)
    ids = p2p.load(folder, device="cpu").text_encoders[-1].tokens("a cat").ids
    for model in (str(folder), "org/name"):
        assert main(["tokens", "a cat", "--model", model]) == 0
        assert [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]] == ids


def test_padding_is_read_by_t5(saved):
    """Stable Diffusion 3 and FLUX do not mask it, DeepFloyd does: another text."""
    _, _, folder = saved
    tower = p2p.load(folder, device="cpu").text_encoders[-1]
    ids = tower.tokenize(["a cat"])
    masked = tower.tower(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (masked - tower.encode(ids)[0])[:, :2].abs().max() > 1e-2


def without_t5(folder, to, family):
    shutil.copytree(folder, to)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(to / f"{name}{T5[family]}")
    return to


def test_without_t5(saved, tmp_path):
    """In Stable Diffusion 3 its columns are zeros, as in diffusers; FLUX reads nothing else."""
    kind, pipe, folder = saved
    family = made.FAMILY[kind]
    bare = without_t5(folder, tmp_path / "bare", family)
    if family == "flux":
        with pytest.raises(CheckpointError, match="it has no T5; give the folder of a model that has it, as text"):
            p2p.load(bare, device="cpu")
    else:
        model = p2p.load(bare, device="cpu")
        assert isinstance(model.text_encoders[-1], NoT5) and any("it has no T5" in note for note in model.notes)
        alone = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        check(model, kind, alone)
        assert model.length == 77 + 256 and not model.text(["a cat"])[:, 77:].any() and model.text(["a cat"])[:, :77].any()
    check(p2p.load(bare, device="cpu", text=folder), kind, pipe)                      # from a folder of the same model


def test_t5_from_a_folder_of_another_model(saved, tmp_path):
    """DeepFloyd's is the same network: it is read as this model reads it."""
    kind, pipe, folder = saved
    bare = without_t5(folder, tmp_path / "bare", made.FAMILY[kind])
    t5(tmp_path / "if", width=made.WIDTH)
    check(p2p.load(bare, device="cpu", text=tmp_path / "if"), kind, pipe)
    t5(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="gives text of width 32, the transformer takes 224"):
        p2p.load(bare, device="cpu", text=tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="no T5 there"):
        p2p.load(bare, device="cpu", text=tmp_path)


def test_prompts_encoded_beforehand(saved, tmp_path, capsys):
    kind, pipe, folder = saved
    assert main(["encode", *PROMPTS[::2], "--model", str(folder), "-o", str(tmp_path)]) == 0
    file = capsys.readouterr().out.strip()
    model = p2p.load(without_t5(folder, tmp_path / "bare", made.FAMILY[kind]), device="cpu", text=file)
    check(model, kind, pipe)
    assert model.tokens("").ids[-1:] == [1] and model.identity()["text"]
    for ask in (model.condition, lambda prompts: model.tokens(prompts[0])):
        with pytest.raises(p2p.UsageError, match='"a bird" is not among the encoded ones'):
            ask(["a bird"])
    whole, cut = load_prompts(Path(file)), tmp_path / "cut.safetensors"
    save_prompts(EncodedPrompts(whole.prompts, [*whole.split.values()], whole.embeddings[:, :100].contiguous(), masked=False), cut)
    said = f"prompts encoded to 100 tokens, where {made.FAMILY[kind]} reads {whole.config.context_length}"
    assert any(said in note for note in p2p.load(folder, device="cpu", text=cut).notes) and not any("encoded to" in note for note in model.notes)
    t5(tmp_path / "if", width=made.WIDTH)
    assert main(["encode", "a cat", "--model", str(tmp_path / "if"), "-o", str(tmp_path)]) == 0
    with pytest.raises(CheckpointError, match="its T5 did not read the padding, as for DeepFloyd IF"):
        p2p.load(folder, device="cpu", text=capsys.readouterr().out.strip())


def test_weighted_prompts_encoded_beforehand(saved, tmp_path, capsys):
    """Stable Diffusion 3 reads brackets as weights, of T5's text too; to FLUX they are text."""
    kind, _, folder = saved
    prompt = "a (red:1.5) cat"
    assert main(["encode", prompt, "--model", str(folder), "-o", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert ("brackets are text to T5, and weigh nothing" in said.err) == (kind[0] != "3")
    bare = p2p.load(without_t5(folder, tmp_path / "bare", made.FAMILY[kind]), device="cpu", text=said.out.strip())
    ours, wanted = (condition(model, [prompt], 32, 32).context for model in (bare, p2p.load(folder, device="cpu")))
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_clip_skip_is_that_of_diffusers(saved):
    kind, pipe, folder = saved
    if made.FAMILY[kind] == "flux":
        with pytest.raises(CheckpointError, match="clip_skip 1; a whole number from 0 to 0"):
            p2p.load(folder, device="cpu", clip_skip=1)
        return
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, clip_skip=1)
    ours = p2p.load(folder, device="cpu", clip_skip=1).condition(PROMPTS)
    assert (ours.context - context).abs().max() <= 1e-5 * context.abs().max() and (ours.vector - pooled).abs().max() <= 1e-5
