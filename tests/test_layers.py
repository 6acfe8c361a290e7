"""`Edit.layers`: which layers are injected; the others are as if there were no edit."""
import json

import pytest
import torch

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.models import attention
from p2p.request.layers import chosen
from p2p.show.pictures import read_settings

SOURCE, TARGET, EASY = "a cat on grass", "a dog on grass", dict(steps=3, seed=1)


def edited(model, layers, targets=TARGET, **settings):
    return p2p.edit(model, SOURCE, targets, layers=layers, **EASY | settings).latents[-1]


def on(model, layers, kind):
    return [site for site, both in chosen(layers, model.unet).items() if both[kind]]


def test_names_shares_and_lists_choose_layers(emoji):
    text = emoji.unet.text_sites()
    assert on(emoji, "up", 0) == [s for s in text if s.startswith("up")]
    assert on(emoji, (0, 0.5), 0) == text[:(len(text) + 1) // 2]   # the layer in the middle has the depth 1/2
    assert on(emoji, (0.0, 1.0), 0) == text
    assert on(emoji, ["mid", (0.9, 1.0)], 0) == [s for s in text if s.startswith("mid") or s == text[-1]]
    assert set(on(emoji, {"cross": "up"}, 1)) == {m.site for m in emoji.unet.layers(attention.SelfAttention)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "narrow"])
def test_all_layers_are_the_edit_and_no_text_layer_is_none(request, name):
    """Every layer by name or by share is the edit itself; where none is chosen for either kind of attention, the target is itself."""
    model = request.getfixturevalue(name)
    size = dict(height=32, width=32) if name == "sd1" else {}
    whole = edited(model, None, **size)
    for every in ((0.0, 1.0), ["down", "mid", "up"], {"cross": (0.0, 1.0), "self": "block"}):
        assert torch.equal(edited(model, every, **size), whole)
    assert not torch.equal(edited(model, "mid", **size), whole)


@pytest.mark.slow
def test_each_kind_has_its_own(sd1):
    """Self-attention limited to a layer whose window is empty, cross-attention everywhere: as self 0."""
    size = dict(height=32, width=32)
    both = edited(sd1, {"cross": (0.0, 1.0), "self": "mid"}, self_max_tokens=0, **size)
    assert torch.equal(both, edited(sd1, None, self_replace_steps=0.0, **size))
    only_self = edited(sd1, {"cross": "mid"}, cross_replace_steps=0.0, **size)
    assert torch.equal(only_self, edited(sd1, None, cross_replace_steps=0.0, **size))


@pytest.mark.slow
def test_a_layer_that_is_not_chosen_is_not_edited(narrow, monkeypatch):
    calls = []
    real = attention.edited_attend
    monkeypatch.setattr(attention, "edited_attend", lambda *a: calls.append(1) or real(*a))
    edited(narrow, None, cross_replace_steps=1.0)
    whole, text = len(calls), narrow.unet.text_sites()
    calls.clear()
    edited(narrow, text[0], cross_replace_steps=1.0)
    assert whole == len(text) * EASY["steps"] and len(calls) == EASY["steps"]


@pytest.mark.slow
def test_targets_have_their_own_layers(narrow):
    edits = [p2p.Edit(TARGET, layers="up"), p2p.Edit(TARGET), p2p.Edit(TARGET, layers={"self": "down_blocks.2"})]
    together = p2p.edit(narrow, SOURCE, edits, **EASY).latents
    for e, x in zip(edits, together[1:]):
        assert torch.allclose(p2p.edit(narrow, SOURCE, e, **EASY).latents[1], x, atol=1e-4)
    assert torch.allclose(together[0], p2p.generate(narrow, SOURCE, **EASY).latents[0], atol=1e-4)


@pytest.mark.slow
def test_a_traced_source_serves_them(narrow):
    traced = p2p.trace(narrow, SOURCE, **EASY)
    record = p2p.Record(text=1024)
    a = p2p.edit(narrow, traced, p2p.Edit(TARGET, layers="up"), record=record)
    b = p2p.edit(narrow, SOURCE, p2p.Edit(TARGET, layers="up"), record=record, **EASY)
    assert torch.allclose(a.latents[1], b.latents[1], atol=1e-4)
    assert torch.allclose(a.maps.word("grass", 0), b.maps.word("grass", 0), atol=1e-3)


@pytest.mark.parametrize("bad, message", [
    ("nowhere", "none is chosen by 'nowhere'"), ((0.9, 0.1), "start not after the end"), (3, "is not a part of"), ([], "is not a part of"),
    ({"both": "up"}, "is not a part of"), ("", "is not a part of"), ({"cross": "nowhere"}, "no layer is chosen for cross"),
    ({"self": "up"}, "no layer is chosen for self"), ((0, 2), "between 0 and 1")])
def test_others_are_refused(narrow, bad, message):
    with pytest.raises(UsageError, match=message):
        edited(narrow, bad)


@pytest.mark.slow
def test_from_the_command_line_from_a_list_in_a_sweep_and_again(tmp_path, capsys):
    how = ["--steps", "2", "--seed", "1", "-o", str(tmp_path)]
    assert main(["edit", SOURCE, TARGET, "--layers", "cross=mid+0.8:1", *how]) == 0
    made = capsys.readouterr().out.split()[1]
    assert read_settings(made)["targets"][0]["layers"] == {"cross": ["mid", [0.8, 1.0]]}
    assert main(["edit", "--from", made, "-o", str(tmp_path)]) == 0
    again = capsys.readouterr().out.split()[1]
    job = {"source": SOURCE, "targets": {"prompt": TARGET, "layers": {"cross": ["mid", [0.8, 1]]}}, "steps": 2, "seed": 1}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "c"), "-q"]) == 0
    row = json.loads((tmp_path / "c" / "results.jsonl").read_text())
    pixels = [p2p.image.open_picture(p).tobytes() for p in (made, again, tmp_path / "c" / row["images"][1])]
    assert pixels[0] == pixels[1] == pixels[2]
    assert main(["sweep", SOURCE, TARGET, "--over", "layers=up,mid+down,0.2:0.8", *how]) == 0
    assert main(["edit", SOURCE, TARGET, "--layers", "up", "--layers", "self=mid", *how]) == 2
    assert "expected LAYERS once, or cross=LAYERS" in capsys.readouterr().err


@pytest.mark.slow
def test_heads_are_chosen_by_a_fork_in_one_function(emoji, monkeypatch):
    """The plain way: replace the formula by one that keeps some heads' own result. All heads: the edit; none: no edit of text."""
    real = attention.edited_attend

    def of_heads(heads):
        def edited_attend(q, k, v, q_src, k_src, mix, keep):
            chosen = torch.tensor([h in heads for h in range(q.shape[1])])[:, None, None]
            return torch.where(chosen, real(q, k, v, q_src, k_src, mix, keep), attention.attend(q, k, v))
        return edited_attend

    whole, found = edited(emoji, None), {}
    for heads in ((), (0,), range(99)):
        monkeypatch.setattr(attention, "edited_attend", of_heads(heads))
        found[len(heads)] = edited(emoji, None)
    assert torch.equal(found[99], whole)
    monkeypatch.setattr(attention, "edited_attend", real)
    assert torch.allclose(found[0], edited(emoji, None, cross_replace_steps=0.0), atol=1e-4)
    assert all((found[1] - other).abs().max() > 1e-2 for other in (found[0], whole))
