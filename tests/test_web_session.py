"""What the page does, as functions, without a browser and without Gradio."""
import base64
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from web_page import CAT, DOG, apart, asked, blank, last, png, url

import p2p
from p2p.cli import main
from p2p.web import sources
from p2p.web.session import Session
from p2p.web.sources import Sources
from p2p.web.visits import Visits


@pytest.mark.slow
def test_a_prompt_shows_its_picture_and_a_fader_with_a_map_for_every_word(session):
    view = last(session)
    assert [word.name for word in view.words] == CAT.split() and view.edit is None and view.done
    assert apart(view.source, p2p.generate(session.model, CAT, steps=4, seed=1, guidance_scale=3.0).images[0]) <= 1
    recorded = p2p.generate(session.model, CAT, steps=4, seed=1, guidance_scale=3.0,
                            record=p2p.Record(text=None, mean=True)).maps
    trace = next(iter(session.sources.kept.values()))
    for (name, ours), (_, theirs) in zip(trace.maps.each_word(), recorded.each_word()):
        assert torch.allclose(ours, theirs, atol=1e-3), name


@pytest.mark.slow
def test_an_edit_is_that_of_the_library_with_a_preview_on_the_way(session):
    views = list(session.run(asked(session, target=DOG, hand={"weights": {"red": 2.0, "dog": 1}}, layers=["up"], negative="night")))
    settings = dict(steps=4, seed=1, guidance_scale=3.0, negative_prompt="night")
    wanted = p2p.edit(session.model, CAT, p2p.Edit(DOG, equalizer={"red": 2.0}, layers=["up"]), **settings)
    assert apart(views[-1].source, wanted.images[0]) <= 1 and apart(views[-1].edit, wanted.images[1]) <= 1
    assert [(view.edit is None, view.done) for view in views] == [(True, False), (False, False), (False, True)]
    assert [(w.name, w.weight) for w in views[-1].words][1:3] == [("red", 2.0), ("dog", 1.0)]
    assert all(word.map is not None for word in views[-1].words)


@pytest.mark.slow
def test_a_moved_fader_costs_one_further_edit_and_no_source(session, monkeypatch):
    traced, rows, real = [], [], sources.trace
    monkeypatch.setattr(sources, "trace", lambda *a, **k: traced.append(a[1]) or real(*a, **k))
    forward = type(session.model.unet).forward
    monkeypatch.setattr(type(session.model.unet), "forward", lambda self, x, *a, **k: rows.append(len(x)) or forward(self, x, *a, **k))
    last(session, target=DOG)
    first, rows[:] = sum(rows), []
    for moved in ({"hand": {"weights": {"dog": 2.0}}}, {"usual": False, "cross": 0.3}, {"blend": "dog"}, {"layers": ["up"]}):
        last(session, target=DOG, **moved)
        assert sum(rows) == first / 2 == 2 * 4   # the target's rows, with and without its prompt, at 4 steps
        rows.clear()
    assert len(traced) == 1
    last(session, target=DOG, seed="2")
    assert len(traced) == 2


def test_a_run_that_is_replaced_while_its_source_is_computed_shows_nothing(session, monkeypatch):
    real, moved = session.sources.of, asked(session, target=DOG, steps=1, hand={"weights": {"dog": 2.0}})

    def of(*given):
        source = real(*given)
        session.want(moved)   # of the same source
        return source
    monkeypatch.setattr(session.sources, "of", of)
    assert list(session.run(asked(session, target=DOG, steps=1))) == [] == list(session.run(asked(session, steps=1)))
    assert not session.gallery and list(session.run(moved))[-1].done


@pytest.mark.slow
def test_a_run_that_is_replaced_stops_at_its_next_step(session):
    run = session.run(asked(session, target=DOG))
    next(run)
    session.want(asked(session, target=DOG, hand={"weights": {"dog": 2.0}}))
    assert list(run) == [] and not session.gallery
    run = session.run(asked(session, target=DOG))
    next(run)
    session.want(asked(session, target=DOG, hand={"weights": {"dog": 1}}))   # another request for the same
    assert list(run)[-1].done
    gone = asked(session, target=DOG, hand={"weights": {"cat": 2.0}})   # the prompt has no such word
    run = session.run(gone)
    next(run)
    session.want(gone)
    assert list(run)[-1].done


@pytest.mark.parametrize("ends", ["another prompt", "another picture", "a closed tab"])
def test_a_source_that_nobody_waits_for_stops_at_its_next_call(session, monkeypatch, ends):
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    calls, predict = [], p2p.Model.predict

    def counted(model, *given, **named):
        calls.append(0)
        if len(calls) == 3:
            {"another prompt": lambda: session.want(asked(session, source=DOG, target=CAT, method="ddim")),
             "another picture": lambda: session.upload(url(png(Image.new("RGB", (64, 64))))), "a closed tab": session.close}[ends]()
        if len(calls) == 2:   # the same source: it is awaited further
            session.want(asked(session, target=DOG, method="ddim", steps=20, hand={"weights": {"dog": 2.0}}))
        return predict(model, *given, **named)
    monkeypatch.setattr(p2p.Model, "predict", counted)
    assert list(session.run(asked(session, target=DOG, method="ddim", steps=20))) == []
    assert len(calls) == 3 and not session.sources.kept


@pytest.mark.slow
def test_a_model_of_noisy_steps_is_not_traced(narrow):
    """DeepFloyd IF's pictures are drawn with eta 1, and a trace by DDIM: what is shown is what is recorded."""
    noisy = Session(replace(narrow, eta=1.0), Sources(replace(narrow, eta=1.0)))
    views = [last(noisy, target=DOG), last(noisy)]
    wanted = p2p.edit(noisy.model, CAT, DOG, steps=4, seed=1, guidance_scale=noisy.gallery[0].settings["guidance_scale"])
    assert wanted.settings["eta"] == 1.0 == noisy.gallery[0].settings["eta"] == noisy.gallery[1].settings["eta"]
    for image, k in ((views[0].source, 0), (views[0].edit, 1), (views[1].source, 0)):
        assert apart(image, wanted.images[k]) <= 1
    assert all(word.map for word in views[1].words)


def test_a_source_alone_stops_as_soon_as_another_is_asked_for(narrow, monkeypatch):
    noisy, calls, predict = Session(replace(narrow, eta=1.0), Sources(replace(narrow, eta=1.0))), [], p2p.Model.predict

    def counted(model, *given, **named):
        calls.append(0)
        if len(calls) == 2:
            noisy.want(asked(noisy, source=DOG, steps=30))
        return predict(model, *given, **named)
    monkeypatch.setattr(p2p.Model, "predict", counted)
    assert list(noisy.run(asked(noisy, steps=30))) == [] and len(calls) == 2 and not noisy.gallery


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_pictures_are_uploaded_to_models_of_few_steps(narrow, sampler):
    few = Session(replace(narrow, sampler=sampler), Sources(replace(narrow, sampler=sampler)))
    few.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    view = last(few, target=DOG, method="ddcm")
    inverted = p2p.invert(few.model, few.picture, CAT, method="ddcm", steps=4, seed=1, guidance_scale=3.0)
    assert view.done and apart(view.edit, p2p.edit(few.model, inverted, DOG, guidance_scale=3.0).images[1]) <= 1


def test_a_tab_that_is_left_stops_what_runs_for_it_and_loses_nothing(narrow):
    """It may have lost its connection alone."""
    all_visits, request = Visits(narrow), SimpleNamespace(session_hash="a")
    session = all_visits.of(request)
    last(session, steps=1)
    run = session.run(asked(session, target=DOG))
    next(run)
    all_visits.left(request)
    assert list(run) == [] and all_visits.of(request) is session and len(session.gallery) == 1
    all_visits.left(SimpleNamespace(session_hash="unknown"))


@pytest.mark.slow
def test_a_run_that_was_announced_before_another_does_not_begin(session, monkeypatch):
    """The server's queue may hold it while the page holds back the latest."""
    first, second, third = (asked(session, target=DOG, seed=seed) for seed in "123")
    for each in (first, second, third):
        session.want(each)
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    assert list(session.run(first)) == list(session.run(second)) == [] and session.wanted == third
    monkeypatch.undo()
    assert list(session.run(third))[-1].done and last(session, target=DOG, seed="9").done   # which was not announced
    session.want(second)
    session.announce(item := session.choose(0))
    assert list(session.run(second)) == [] and list(session.replay(item))[-1].done
    session.want(first)
    assert list(session.run(first))[-1].done
    session.want(second)
    assert list(session.run(first))[-1].done   # typed back, and sent in the second's place


@pytest.mark.slow
def test_faders_are_of_the_words_that_the_tower_reads(session):
    long = "a cat on grass" + " next to a dog" * 12
    view = last(session, source=long, hand={"weights": {"dog#12": 2.0, "cat": 2.0}})
    assert len(view.words) == 30 and all(word.map for word in view.words)   # of 32 tokens, two of which are the ends
    assert 'the fader of "dog#12" is left out: the prompt has no such word' in view.notes


@pytest.mark.slow
def test_faders_of_words_that_are_gone_are_said(session):
    view = last(session, target=DOG, hand={"weights": {"cat": 3.0}})
    assert 'the fader of "cat" is left out: the prompt has no such word' in view.notes


def test_what_waits_for_an_edit_is_said(session):
    assert any("blend, layers: of an edit" in note for note in last(session, blend="cat", layers=["up"]).notes)
    assert any("windows: of an edit" in note for note in last(session, usual=False, cross=0.1).notes)


@pytest.mark.slow
def test_an_inversion_without_a_picture_is_said_and_makes_no_second_edit(session):
    plain = last(session, target=DOG)
    view = last(session, target=DOG, method="ddim")
    assert "ddim changes nothing: it inverts a picture of your own" in view.notes and not any("inverts" in note for note in plain.notes)
    assert len(session.gallery) == 1


@pytest.mark.slow
def test_brackets_weigh_the_same_in_both_prompts_and_faders_weigh_beside_them(session):
    weighed = "a (red:1.5) cat on grass"
    view = last(session, source=weighed, hand={"weights": {"grass": 1.000001}})
    assert apart(view.source, view.edit) <= 1
    assert apart(view.source, last(session, source=CAT).source) > 1
    view = last(session, target="a (red:1.5) dog on grass", hand={"weights": {"red": 2.0}})
    assert view.done and [(word.name, word.weight) for word in view.words][1] == ("red", 2.0)
    assert session.gallery[-1].settings["targets"][0]["emphasis"] == "embedding"


def test_the_same_prompt_twice_has_the_maps_of_the_source(session):
    assert all(word.map for word in last(session, target=CAT).words)


@pytest.mark.slow
def test_a_picture_without_maps_says_when_they_come(session):
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    assert "the words' maps come with an edit" in last(session, method="ddim").notes
    assert not any("maps" in note for note in last(session, method="direct").notes)


@pytest.mark.slow
@pytest.mark.parametrize("blend, words", [("dog", ((), ("dog",))), ("red, cat:dog", (("red", "cat"), ("red", "dog"))),
                                          ("cat:", (("cat",), ()))])
def test_blend_words_are_found_in_the_prompts_that_have_them(session, blend, words):
    last(session, target=DOG, blend=blend)
    recorded = session.gallery[-1].settings["targets"][0]["local_blend"]["words"]
    assert tuple(map(tuple, recorded)) == words


@pytest.mark.slow
def test_outside_of_a_painted_mask_nothing_changes(session):
    mask = np.zeros((256, 256), np.uint8)
    mask[:128] = 255
    view = last(session, target=DOG, hand={"mask": base64.b64encode(png(Image.fromarray(mask))).decode()})
    changed = np.asarray(view.source) != np.asarray(view.edit)
    assert changed[:32].any() and not changed[32:].any()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_nor_does_it_in_the_preview(session, own):
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    if own:
        session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    hand = {"mask": base64.b64encode(png(Image.fromarray(mask))).decode()}
    preview, = (view for view in session.run(asked(session, target=DOG, steps=10, hand=hand)) if view.edit and not view.done)
    changed = np.abs(np.asarray(preview.source).astype(int) - np.asarray(preview.edit))
    assert changed[:32].max() > 1 >= changed[32:].max()


def test_masks_are_of_a_size_that_is_painted(session):
    large = png(Image.new("1", (2048, 2048), 1))
    with pytest.raises(p2p.UsageError, match="2048 x 2048; this page paints smaller ones"):
        last(session, target=DOG, hand={"mask": base64.b64encode(large).decode()})


def test_guidance_of_0_is_of_1(session):
    assert asked(session, guidance=0) == asked(session, guidance=1)


NAN = float("nan")
HOSTILE = [dict(source="a" * 10**6), dict(source=""), dict(source=" \n\t"), dict(source=5), dict(source=None), dict(source="a \ud800 cat"),
           dict(target=["a"]), dict(target="(" * 1999), dict(target="[cat:dog:0.4]"), dict(hand=[]), dict(hand={"weights": []}),
           dict(hand={"weights": {"cat": NAN}}), dict(hand={"weights": {"cat": "2"}}), dict(hand={"weights": {"cat": 10**400}}),
           dict(hand={"weights": {f"w{i}": 2 for i in range(1000)}}), dict(hand={"mask": "/etc/passwd"}, target=DOG),
           dict(hand={"photo": 5}), dict(hand={"photo": "\ud83d"}), dict(hand={"weights": {"\ud83d": 2}}), dict(blend="\udfff", target=DOG), dict(blend=":", target=DOG), dict(layers=["up"] * 10**6), dict(hand={"mask": {"path": "/etc/passwd"}}), dict(hand={"mask": "A" * 2**21}), dict(usual="yes"), dict(cross=NAN),
           dict(cross=float("inf")), dict(self_=-1), dict(self_="0.4"), dict(guidance=1e300), dict(guidance=True), dict(steps=10**9),
           dict(steps=0), dict(steps=2.5), dict(steps=NAN), dict(seed="-5x"), dict(seed="1" * 30), dict(seed=NAN), dict(seed=None),
           dict(seed=str(-2**63 - 1)), dict(negative={}), dict(layers="up"), dict(layers=["nowhere"]), dict(layers=[["up"]]),
           dict(blend="unicorn", target=DOG), dict(blend=":", target=DOG, hand={"mask": "x"}), dict(blend="cat:unicorn", target=DOG),
           dict(method="../../etc/passwd"), dict(method=None)]


@pytest.mark.slow
@pytest.mark.parametrize("moved", HOSTILE, ids=lambda moved: repr(moved)[:50])
def test_what_no_control_gives_is_refused(session, moved):
    with pytest.raises(p2p.UsageError) as error:
        last(session, **moved)
    assert len(str(error.value)) < 600 and not session.sources.kept
    assert last(session, steps=1).done


@pytest.mark.slow
@pytest.mark.parametrize("moved", [dict(source="a\x00\x1b[31m cat"), dict(source="<script>alert(1)</script> cat"), dict(seed="-5"),
                                   dict(source="猫 🐈 קאט"), dict(source="$" * 1999)], ids=repr)
def test_strange_values_that_mean_something_are_drawn(session, moved):
    assert last(session, **moved, steps=1).done


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize("value", [None, 5, [], {"path": "/etc/passwd"}, "/etc/passwd", "http://127.0.0.1/x.png", "data:image/png;base64,!",
                                   url(b"plain text"), url(SVG, "svg+xml"), url(b""), "data:,", "x" * 30 * 2**20,
                                   url(png(Image.new("RGB", (64, 64)))[:60])], ids=lambda value: repr(value)[:40])
def test_uploads_that_are_no_pictures_are_refused(session, value):
    with pytest.raises(p2p.UsageError) as error:
        session.upload(value)
    assert len(str(error.value)) < 300 and session.picture is None


@pytest.mark.slow
def test_large_uploads(session):
    assert session.upload(url(png(Image.new("L", (5000, 4000), 90)))).source.size == (64, 64)   # 20 megapixels
    session.forget()
    with pytest.raises(p2p.UsageError, match="pixels"):
        session.upload(url(blank(30_000)))


def test_the_page_is_offered_without_its_weight(monkeypatch, capsys):
    """Help imports neither torch nor Gradio; without Gradio the command says what to install."""
    code = ("import sys; from p2p.cli import main; assert main(['web', '--help']) == 0; "
            "assert not {'torch', 'gradio'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--share" in done.stdout, done.stderr
    assert main(["web", "--port", "70000"]) == 2 and "65535" in capsys.readouterr().err
    monkeypatch.setattr("p2p.cli.checks.find_spec", lambda name: None)
    assert main(["web"]) == 2
    assert capsys.readouterr().err == "p2p: p2p web needs Gradio: pip install -e '.[web]' in the clone\n"


@pytest.mark.slow
def test_settings_are_json(session):
    last(session, target=DOG)
    assert json.loads(json.dumps(session.gallery[-1].settings))["source"] == CAT
