"""Pictures of one's own, and what visits of the page keep of them and of others."""
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from web_page import CAT, DOG, apart, asked, last, png, url

import p2p
from p2p.cli import main
from p2p.web import sources, visits
from p2p.web.session import Session
from p2p.web.sources import Sources
from p2p.web.visits import Visits
from p2p.weights.load import find


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


@pytest.mark.slow
def test_a_picture_of_ones_own_is_shown_until_its_edit_is(session):
    """By every method: also by those whose source is computed beside its edit."""
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))), "own.png")
    views = list(session.run(asked(session, target=DOG, method="ddim", hand={"photo": "own.png"})))
    assert len(views) > 1 and all(view.source is not None for view in views)


def test_a_picture_that_made_room_is_missed(session):
    session.upload(url(png(Image.new("RGB", (64, 64), "red"))), "own.png")
    session.close()
    for each in (session, Session(session.model, session.sources)):
        with pytest.raises(p2p.UsageError, match="own.png is here no more: visits that do nothing for long make room"):
            last(each, target=DOG, hand={"photo": "own.png"})


@pytest.mark.slow
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
    session.forget()
    last(session, target=DOG, steps=1)
    session.upload(blue, "blue.png")
    list(session.replay(session.choose(1)))   # of a prompt alone
    with pytest.raises(p2p.UsageError, match="blue.png is here no more: it was put away"):
        last(session, target=DOG, steps=1, hand={"photo": "blue.png"})


def test_what_a_picture_without_an_edit_does_not_read_is_said(session):
    session.upload(url(png(Image.new("RGB", (64, 64), "red"))))
    said = " ".join(last(session, negative="a tree", guidance=9.0).notes)
    assert "negative prompt, guidance: of an edit" in said


@pytest.mark.slow
def test_a_seed_that_nothing_is_drawn_by_is_said(session):
    session.upload(url(png(Image.effect_noise((64, 64), 90).convert("RGB"))))
    for seed in "12":
        assert "the seed changes nothing: ddim draws no noise" in last(session, target=DOG, method="ddim", seed=seed).notes
    assert len(session.sources.kept) == 1
    assert not any("seed" in note for note in last(session, target=DOG).notes)


@pytest.mark.slow
def test_a_downloaded_picture_is_made_again_by_the_command_line(session, once, tmp_path, capsys):
    view = last(session, target=DOG, hand={"weights": {"red": 2.0}})
    file = session.download(session.choose(0))
    assert main(["edit", "--from", str(file), "--out", str(tmp_path / "out"), "-q"]) == 0
    again = next((tmp_path / "out").rglob("edit.png"))
    assert apart(Image.open(again), view.edit) <= 1
    session.close()
    assert not file.parent.exists()


@pytest.mark.slow
def test_a_picture_of_the_gallery_is_one_file_of_its_pixels(session):
    view = last(session, target=DOG, steps=1)
    (file, caption), = session.pictures()
    written = file.stat().st_mtime_ns
    last(session, target=DOG, steps=1, seed="2")
    assert session.pictures()[0] == (file, caption) and file.stat().st_mtime_ns == written   # not with every move
    assert apart(Image.open(file), view.edit) == 0 and Image.open(file).info == {}
    shutil.rmtree(file.parent)   # as what cleans temporary files does
    assert [picture.exists() for picture, _ in session.pictures()] == [True, True] and session.download(session.choose(1)).exists()


@pytest.mark.slow
def test_so_is_a_source_alone(session, once, tmp_path):
    view = last(session, negative="night")
    file = session.download(session.choose(0))
    assert main(["generate", "--from", str(file), "--out", str(tmp_path / "out"), "-q"]) == 0
    assert apart(Image.open(next((tmp_path / "out").rglob("1.png"))), view.source) <= 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_pictures_of_a_visit_that_made_room_are_missed(session):
    last(session)
    session.close()
    with pytest.raises(p2p.UsageError, match="are here no more"):
        session.choose(0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_whose_file_is_gone_goes_on(tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(find("emoji").where, file)
    model = p2p.load(file)
    session = Session(model, Sources(model))
    assert last(session, target=DOG, steps=1).done
    file.unlink()
    assert last(session, target=DOG, steps=1, seed="2").done


@pytest.mark.slow
def test_a_gallery_and_its_sources_are_bounded(session, monkeypatch):
    monkeypatch.setattr(session.sources, "budget", 10)
    for seed in range(3):
        last(session, seed=str(seed), steps=1)
    assert len(session.sources.kept) == 1 and session.gallery.maxlen == 24
    given = next(iter(session.sources.kept.values())).given
    assert given.queries is None   # they do not fit the budget: an edit runs the source's row
    assert last(session, seed="2", steps=1, target=DOG).done
    said, files = [], []
    for seed in range(3, 24):
        said.append(last(session, seed=str(seed), steps=1).notes)
        files = files or [file for file, _ in session.pictures()]
    assert [any("its oldest made room" in note for note in notes) for notes in said] == [False] * 20 + [True]
    assert [file.exists() for file in files] == [False, True, True, True, True]


def test_visits_are_bounded(narrow, monkeypatch):
    monkeypatch.setattr(visits, "MOST", 2)
    all_visits = Visits(narrow)
    first = all_visits.of(SimpleNamespace(session_hash="0"))
    last(first, steps=1)
    for name in "12":
        all_visits.of(SimpleNamespace(session_hash=name))
    assert len(all_visits.sessions) == 2 and (again := all_visits.of(SimpleNamespace(session_hash="0"))) is not first
    said = "the pictures of this visit are here no more: visits that do nothing for long make room for others"
    assert said in last(again, steps=1).notes and said not in last(again, steps=1, seed="2").notes
    for name in ("new", "1"):   # one of which had no picture
        assert said not in last(all_visits.of(SimpleNamespace(session_hash=name)), steps=1).notes


@pytest.mark.slow
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
