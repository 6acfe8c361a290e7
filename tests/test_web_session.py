"""What the page does, as functions, without a browser and without Gradio."""
import base64
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_png import chunk

import p2p
from p2p.cli import main
from p2p.web import sources, visits
from p2p.web.asked import read
from p2p.web.session import Session
from p2p.web.sources import Sources
from p2p.web.visits import Visits
from p2p.weights.load import find

CAT, DOG = "a red cat on grass", "a red dog on grass"
PAGE = dict(source=CAT, target="", hand={}, usual=True, cross=0.8, self_=0.4, guidance=3.0, steps=4, seed="1", negative="",
            layers=[], blend="", method="edit-friendly")


@pytest.fixture
def session(narrow):
    return Session(narrow, Sources(narrow))


def asked(session, **moved):
    return read(session.model.unet, **PAGE | moved)


def last(session, **moved):
    return list(session.run(asked(session, **moved)))[-1]


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def blank(side):
    """A black square as a PNG, packed at once: Pillow would hold a byte a pixel."""
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)),
                     chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 1)), chunk(b"IEND", b"")))


def apart(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_a_prompt_shows_its_picture_and_a_fader_with_a_map_for_every_word(session):
    view = last(session)
    assert [word.name for word in view.words] == CAT.split() and view.edit is None and view.done
    assert apart(view.source, p2p.generate(session.model, CAT, steps=4, seed=1, guidance_scale=3.0).images[0]) <= 1
    recorded = p2p.generate(session.model, CAT, steps=4, seed=1, guidance_scale=3.0,
                            record=p2p.Record(text=None, mean=True)).maps
    trace = next(iter(session.sources.kept.values()))
    for (name, ours), (_, theirs) in zip(trace.maps.each_word(), recorded.each_word()):
        assert torch.allclose(ours, theirs, atol=1e-3), name


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


def test_a_run_that_was_announced_before_another_does_not_begin(session, monkeypatch):
    """The server's queue may hold it while the page holds back the latest."""
    first, second, third = (asked(session, target=DOG, seed=seed) for seed in "123")
    for each in (first, second, third):
        session.want(each)
    monkeypatch.setattr(p2p.Model, "predict", lambda *_, **__: pytest.fail("the network ran"))
    assert list(session.run(first)) == list(session.run(second)) == [] and session.wanted == third
    monkeypatch.undo()
    assert list(session.run(third))[-1].done and last(session, target=DOG, seed="9").done   # which was not announced
    session.want(first)
    session.want(second)
    assert list(session.replay(session.choose(0)))[-1].done and list(session.run(second)) == []


def test_faders_are_of_the_words_that_the_tower_reads(session):
    long = "a cat on grass" + " next to a dog" * 12
    view = last(session, source=long, hand={"weights": {"dog#12": 2.0, "cat": 2.0}})
    assert len(view.words) == 30 and all(word.map for word in view.words)   # of 32 tokens, two of which are the ends
    assert 'the fader of "dog#12" is left out: the prompt has no such word' in view.notes


def test_faders_of_words_that_are_gone_are_said(session):
    view = last(session, target=DOG, hand={"weights": {"cat": 3.0}})
    assert 'the fader of "cat" is left out: the prompt has no such word' in view.notes


def test_what_waits_for_an_edit_is_said(session):
    assert any("blend, layers: of an edit" in note for note in last(session, blend="cat", layers=["up"]).notes)
    assert any("windows: of an edit" in note for note in last(session, usual=False, cross=0.1).notes)


def test_an_inversion_without_a_picture_is_said_and_makes_no_second_edit(session):
    plain = last(session, target=DOG)
    view = last(session, target=DOG, method="ddim")
    assert "ddim changes nothing: it inverts a picture of your own" in view.notes and not any("inverts" in note for note in plain.notes)
    assert len(session.gallery) == 1


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


def test_outside_of_a_painted_mask_nothing_changes(session):
    mask = np.zeros((256, 256), np.uint8)
    mask[:128] = 255
    view = last(session, target=DOG, hand={"mask": base64.b64encode(png(Image.fromarray(mask))).decode()})
    changed = np.asarray(view.source) != np.asarray(view.edit)
    assert changed[:32].any() and not changed[32:].any()


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["edit-friendly", "ddim", "direct"])
def test_a_picture_of_ones_own_is_edited(session, method, emoji):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    view = session.upload(url(png(photo)))
    assert view.source.size == (64, 64) and any("cropped" in note and "--" not in note for note in view.notes)
    assert apart(last(session, method=method).source, view.source) == 0
    view = last(session, target=DOG, method=method)
    inversion = p2p.invert(session.model, session.picture, CAT, method=method, steps=4, guidance_scale=3.0,
                           **({"seed": 1} if method == "edit-friendly" else {}))
    assert apart(view.edit, p2p.edit(session.model, inversion, DOG, guidance_scale=3.0).images[1]) <= 1
    assert len(session.sources.kept) == 1 and session.gallery[-1].settings["inversion"]["picture"]
    assert session.forget().source is None and session.picture is None


def test_a_picture_of_ones_own_is_shown_until_its_edit_is(session):
    """By every method: also by those whose source is computed beside its edit."""
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))), "own.png")
    views = list(session.run(asked(session, target=DOG, method="ddim", hand={"photo": "own.png"})))
    assert len(views) > 1 and all(view.source is not None for view in views)


def test_a_picture_that_made_room_is_missed(session):
    session.upload(url(png(Image.new("RGB", (64, 64), "red"))), "own.png")
    new = Session(session.model, session.sources)
    with pytest.raises(p2p.UsageError, match="own.png is here no more: visits that do nothing for long make room"):
        last(new, target=DOG, hand={"photo": "own.png"})


def test_a_request_of_another_picture_than_the_visit_has_is_refused_with_the_reason(session):
    """Pictures are taken and put away while requests are on their way."""
    red, blue = (url(png(Image.new("RGB", (64, 64), colour))) for colour in ("red", "blue"))
    session.upload(red, "red.png")
    last(session, target=DOG, steps=1)   # sent before the page knew the name: it is of the picture
    assert session.gallery[-1].asked.photo == "red.png"
    session.upload(blue, "blue.png")
    with pytest.raises(p2p.UsageError, match="red.png is here no more: blue.png took its place"):
        last(session, target=DOG, steps=1, hand={"photo": "red.png"})
    session.forget()
    with pytest.raises(p2p.UsageError, match="blue.png is here no more: it was put away"):
        last(session, target=DOG, steps=1, hand={"photo": "blue.png"})
    list(session.replay(session.choose(0)))
    assert session.photo == "red.png" and len(session.gallery) == 1


def test_what_a_picture_without_an_edit_does_not_read_is_said(session):
    session.upload(url(png(Image.new("RGB", (64, 64), "red"))))
    said = " ".join(last(session, negative="a tree", guidance=9.0).notes)
    assert "negative prompt, guidance: of an edit" in said


def test_a_seed_that_nothing_is_drawn_by_is_said(session):
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    for seed in "12":
        assert "the seed changes nothing: ddim draws no noise" in last(session, target=DOG, method="ddim", seed=seed).notes
    assert len(session.sources.kept) == 1
    assert not any("seed" in note for note in last(session, target=DOG).notes)


def test_a_downloaded_picture_is_made_again_by_the_command_line(session, once, tmp_path, capsys):
    view = last(session, target=DOG, hand={"weights": {"red": 2.0}})
    file = session.download(session.choose(0))
    assert main(["edit", "--from", str(file), "--out", str(tmp_path / "out"), "-q"]) == 0
    again = next((tmp_path / "out").rglob("edit.png"))
    assert apart(Image.open(again), view.edit) <= 1
    session.close()
    assert not file.parent.exists()


def test_a_picture_of_the_visit_is_replayed(session):
    session.upload(url(png(Image.new("RGB", (64, 64), "red"))))
    first = last(session, target=DOG)
    session.forget()
    last(session, target=DOG)
    assert [item.caption for item in session.gallery] == ["cat to dog"] * 2
    view = list(session.replay(session.choose(0)))[-1]
    assert apart(view.edit, first.edit) == 0 and session.picture is not None and len(session.gallery) == 2
    for wrong in (2, -1, True, "0", None, 10**9):
        with pytest.raises(p2p.UsageError):
            session.choose(wrong)


def test_pictures_of_a_visit_that_made_room_are_missed(session):
    last(session)
    session.close()
    with pytest.raises(p2p.UsageError, match="are here no more"):
        session.choose(0)


def test_all_that_a_source_holds_is_counted(session):
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    for method in ("edit-friendly", "null-text"):
        last(session, method=method, steps=2)
        held = session.sources.kept.popitem()[1]
        given = held.given
        assert held.bytes == sum(v.nbytes for v in vars(given).values() if isinstance(v, torch.Tensor)) + sum(
            v.nbytes for v in (given.queries or {}).values()) > given.latents.nbytes


def test_sources_that_hold_nothing_are_bounded_too(narrow, monkeypatch):
    monkeypatch.setattr(sources, "MOST", 2)
    noisy = Session(replace(narrow, eta=1.0), Sources(replace(narrow, eta=1.0)))
    for seed in range(4):
        last(noisy, seed=str(seed), steps=1)
    assert len(noisy.sources.kept) == 2


def test_a_model_whose_file_is_gone_goes_on(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(find("emoji").where, file)
    model = p2p.load(file)
    session = Session(model, Sources(model))
    assert last(session, target=DOG, steps=1).done
    file.unlink()
    assert last(session, target=DOG, steps=1, seed="2").done


def test_a_gallery_and_its_sources_are_bounded(session, monkeypatch):
    monkeypatch.setattr(session.sources, "budget", 10)
    for seed in range(3):
        last(session, seed=str(seed), steps=1)
    assert len(session.sources.kept) == 1 and session.gallery.maxlen == 24
    given = next(iter(session.sources.kept.values())).given
    assert given.queries is None   # they do not fit the budget: an edit runs the source's row
    assert last(session, seed="2", steps=1, target=DOG).done
    said = [last(session, seed=str(seed), steps=1).notes for seed in range(3, 24)]
    assert [any("its oldest made room" in note for note in notes) for notes in said] == [False] * 20 + [True]


def test_visits_are_bounded(narrow, monkeypatch):
    monkeypatch.setattr(visits, "MOST", 2)
    all_visits = Visits(narrow)
    first = all_visits.of(SimpleNamespace(session_hash="0"))
    for name in "120":
        all_visits.of(SimpleNamespace(session_hash=name))
    assert len(all_visits.sessions) == 2 and (again := all_visits.of(SimpleNamespace(session_hash="0"))) is not first
    said = "the pictures of this visit are here no more: visits that do nothing for long make room for others"
    assert said in last(again, steps=1).notes and said not in last(again, steps=1, seed="2").notes
    assert said not in last(all_visits.of(SimpleNamespace(session_hash="new")), steps=1).notes


def test_a_visit_that_waits_for_its_picture_makes_no_room(narrow, monkeypatch):
    monkeypatch.setattr(visits, "MOST", 2)
    all_visits = Visits(narrow)
    first = all_visits.of(SimpleNamespace(session_hash="0"))
    run = first.run(asked(first, target=DOG))
    next(run)
    for name in "123":
        all_visits.of(SimpleNamespace(session_hash=name))
    assert all_visits.known(SimpleNamespace(session_hash="0")) is first and list(run)[-1].done
    assert all_visits.known(SimpleNamespace(session_hash="new")) is None
    all_visits.of(SimpleNamespace(session_hash="4"))
    assert all_visits.known(SimpleNamespace(session_hash="0")) is None


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


@pytest.mark.parametrize("moved", HOSTILE, ids=lambda moved: repr(moved)[:50])
def test_what_no_control_gives_is_refused(session, moved):
    with pytest.raises(p2p.UsageError) as error:
        last(session, **moved)
    assert len(str(error.value)) < 600 and not session.sources.kept
    assert last(session, steps=1).done


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


def test_settings_are_json(session):
    last(session, target=DOG)
    assert json.loads(json.dumps(session.gallery[-1].settings))["source"] == CAT
