"""What a run gives, in a notebook or on disk; settings by other names; notes before the first step."""
import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.show.pictures import read_settings

EASY = dict(steps=2, seed=1)


@pytest.fixture(scope="module")
def result(narrow):
    return p2p.edit(narrow, "a cat on grass", "a dog on grass", record=p2p.Record(text=1024), **EASY)


def test_reprs_fit_on_a_line_or_two(narrow, result):
    inv = p2p.invert(narrow, torch.zeros(1, 3, 64, 64), "a cat", method="ddim", steps=2)
    assert repr(result) == "<Result of edit: 2 x 64 x 64, ['a cat on grass', 'a dog on grass'], latents (3, 64, 64)>"
    assert repr(inv).startswith('<Inversion by ddim of "a cat": 2 of 2 steps, latents (3, 64, 64), model ')
    assert repr(narrow).startswith("<Model emoji: emoji, predicts ")
    assert repr(result.maps).startswith("<AttentionMaps of ['a cat on grass', 'a dog on grass']: ")
    assert all(len(repr(x)) < 250 for x in (narrow, result, inv, result.maps))


def test_a_notebook_shows_the_captioned_grid(result):
    html = result._repr_html_()
    picture = Image.open(io.BytesIO(base64.b64decode(re.search("base64,([^\"]+)", html)[1])))
    assert picture.tobytes() == result.grid().tobytes() and "a cat on grass | a dog on grass" in html


def test_saved_in_a_folder_once(result, tmp_path):
    files = result.save(tmp_path / "new")
    assert [f.name for f in files] == ["source.png", "edit.png", "grid.png", "settings.json"]
    assert read_settings(files[1]) == json.loads(files[3].read_text()) == json.loads(json.dumps(result.settings))
    assert Image.open(files[0]).tobytes() == result.images[0].tobytes()
    with pytest.raises(UsageError, match="holds source.png, edit.png, grid.png, settings.json already"):
        result.save(tmp_path / "new")


def test_a_map_is_shown_in_colours_or_over_its_picture(result):
    plain, over = result.maps.show("cat"), result.maps.show("dog", 1, result.images[1])
    assert plain.size == (256, 256) and over.size == result.images[1].size
    with pytest.raises(UsageError, match='no word "fox"'):
        result.maps.show("fox")


@pytest.mark.parametrize("run", [lambda m, **s: p2p.generate(m, "a cat", **s), lambda m, **s: p2p.edit(m, "a cat", "a dog", **s)])
def test_settings_by_other_names(narrow, run):
    assert run(narrow, num_inference_steps=2, cfg=2).settings["steps"] == 2
    with pytest.raises(UsageError, match="guidance_scal: no setting of .*; did you mean guidance_scale?"):
        run(narrow, guidance_scal=2)
    with pytest.raises(UsageError, match="the same setting twice"):
        run(narrow, num_inference_steps=2, steps=2)


@pytest.mark.slow
def test_steps_can_be_looked_at_and_changed(narrow):
    """Left alone they end in the edit; a target that is changed changes, and nothing else does."""
    edit = p2p.edit(narrow, "a cat", "a dog", **EASY)
    record, seen = p2p.Record(text=1024), []
    for step in p2p.steps(narrow, "a cat", "a dog", record=record, **EASY):
        seen.append((step.index, step.x.clone(), step.x_0.shape, step.maps.word("dog", 1).shape))
    assert [i for i, *_ in seen] == [0, 1] and torch.equal(seen[-1][1], edit.latents)
    for step in p2p.steps(narrow, "a cat", "a dog", **EASY):
        if step.index == 0:
            x = step.x.clone()
            x[1] += 1
            step.x = x
        last = step
    assert torch.equal(last.x[0], edit.latents[0]) and not torch.equal(last.x[1], edit.latents[1]) and last.maps is None


def test_x_0_is_what_x_leads_to(narrow):
    """The bundled model's last step ends in the picture that was predicted, without noise."""
    first, last = p2p.steps(narrow, "a cat", "a dog", **EASY)
    assert narrow.schedule(2).levels[-1].sigma == 0 and torch.equal(last.x, last.x_0) and not torch.equal(first.x, first.x_0)


def test_a_preview_is_called_with_every_step(narrow):
    found = []
    p2p.edit(narrow, "a cat", "a dog", on_step=lambda step: found.append(step.index), **EASY)
    assert found == [0, 1]
    with pytest.raises(UsageError, match="on_step is a function"):
        p2p.edit(narrow, "a cat", "a dog", on_step=3, **EASY)


@pytest.mark.parametrize("x", [torch.zeros(1, 3, 64, 64), None])
def test_another_x_must_fit(narrow, x):
    with pytest.raises(UsageError, match="step.x must be a tensor"):
        for step in p2p.steps(narrow, "a cat", "a dog", **EASY):
            step.x = x


def test_the_command_line_says_its_version_and_errors_in_two_lines(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"p2p {p2p.__version__}\n"
    assert main(["edit", "a", "b", "--stepz", "3"]) == 2
    err = capsys.readouterr().err
    assert err == "p2p edit: unrecognized arguments: --stepz 3\np2p edit --help lists the options\n"


def test_notes_come_before_the_first_step(monkeypatch, capsys, tmp_path):
    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(p2p.Model, "predict", stop)
    with pytest.raises(Stop):
        main(["edit", "a cat", "a dog", "--steps", "2", "-o", str(tmp_path)])
    assert "mode replace (chosen from the prompts)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda x: x.numpy(), lambda x: x.data, lambda x: x], ids=["numpy", "data", "in place"])
def test_a_step_that_was_changed_is_recorded(narrow, change):
    """However it was: --from would make another picture."""
    assert p2p.edit(narrow, "a cat", "a dog", on_step=lambda step: change(step.x).__iadd__(0.3), **EASY).settings["changed_between_steps"]
    assert "changed_between_steps" not in p2p.edit(narrow, "a cat", "a dog", on_step=lambda step: step.x.sum(), **EASY).settings
