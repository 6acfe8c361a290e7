"""Every setting of an inversion, by every method: it acts on the edits, or it is refused by name, at every entrance."""
import json

import pytest
import torch
from PIL import Image

import p2p
from p2p import UsageError
from p2p.cli.parser import main
from p2p.lists import jobs, work
from p2p.request.inverting import READ_BY
from p2p.request.source import METHODS

SOURCE, TARGET = "a cat on grass", "a dog on grass"
VALUES = {"inner_steps": 2, "seed": 5, "inversion_guidance": 2.0, "eta": 0.5, "skip": 2, "final_alpha": 0.99995, "guidance_scale": 1.7,
          "steps": 4, "fit": "pad"}
OPTIONS = {"inversion_guidance": "--inversion-cfg", "guidance_scale": "--cfg"}


def unread(method, name):
    return method not in READ_BY.get(name, METHODS)


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((40, 24), 90).convert("RGB")


def edited(model, picture, method, **settings):
    usual = {"steps": 3, "height": 16, "width": 32} | ({} if unread(method, "inner_steps") else {"inner_steps": 1})
    inversion = p2p.invert(model, picture, SOURCE, method=method, **usual | settings)
    return p2p.edit(model, inversion, TARGET).latents


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_acts_or_is_refused(narrow, picture, method):
    plain = edited(narrow, picture, method)
    for name, value in VALUES.items():
        if unread(method, name):
            with pytest.raises(UsageError, match=f"{name}: {method} inversion does not read it"):
                edited(narrow, picture, method, **{name: value})
        else:
            assert not torch.equal(edited(narrow, picture, method, **{name: value}), plain), name


class Reached(Exception):
    pass


@pytest.fixture
def asked(monkeypatch, emoji):
    """What reaches the network, which is not run: the inversion as it is asked for."""
    found = []

    def stop(run, inversion):
        found.append(inversion)
        raise Reached

    monkeypatch.setattr("p2p.sources.methods._inverted", stop)
    monkeypatch.setattr(p2p, "load", lambda *_, **__: emoji)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", ["invert", "edit", "batch"])
def test_it_arrives_or_is_refused(asked, emoji, picture, tmp_path, capsys, command, method):
    picture.save(tmp_path / "p.png")
    start = {"invert": ["invert", str(tmp_path / "p.png"), SOURCE], "edit": ["edit", "--image", str(tmp_path / "p.png"), SOURCE, TARGET]}
    for name, value in VALUES.items():
        asked.clear()
        try:
            if command == "batch":
                said = {"source": SOURCE, "targets": [TARGET], "image": "p.png", "method": method, name: value}
                (tmp_path / "x.jsonl").write_text(json.dumps(said))
                work._ready(emoji, jobs.read(tmp_path / "x.jsonl", emoji)[0])
            else:
                option = OPTIONS.get(name, "--" + name.replace("_", "-"))
                assert main([*start[command], "--method", method, option, str(value), "-q", "-o", str(tmp_path)]) == 2
            refused = True
        except UsageError as error:
            assert name in str(error)
            refused = True
        except Reached:
            refused = False
        assert refused == unread(method, name) and (refused or getattr(asked[0], name) == value), name
        if refused and command != "batch":
            assert f"{name}: {method} inversion does not read it" in capsys.readouterr().err
