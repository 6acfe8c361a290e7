"""Negative prompts: what guidance leads away from, against diffusers' pipelines; for every row, or each its own."""
import hashlib
import json

import families
import pytest
import torch
from oracles import diffusers
from PIL import Image

import p2p
from p2p.cli.parser import main
from p2p.errors import UsageError
from p2p.lists import jobs
from p2p.request.start import draw
from p2p.show.pictures import read_settings
from p2p.weights.convert import convert
from p2p.weights.load import find

EASY = dict(steps=3, guidance_scale=5.0, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_are_those_of_diffusers_pipelines(tmp_path, family):
    """The empty prompt of SDXL is zeros; a negative prompt is not."""
    folder = families.save(families.build(family), tmp_path / "made", family)
    convert(find(folder), tmp_path / "whole")   # with tokenizers
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipe, model = kind.from_pretrained(tmp_path / "whole"), p2p.load(tmp_path / "whole", device="cpu")
    side = 8 * model.shrink
    for negatives in (["a bird", "a bird"], ["red", "a fast car"], ["", "a bird"] if family == "sd1" else ["a", "b"]):
        ours = p2p.generate(model, ["a cat", "a dog"], negative_prompt=negatives, height=side, width=side, **EASY).latents
        latents = draw(model.latent_shape(side, side), [1], 1)[0].expand(2, -1, -1, -1)
        with torch.no_grad():
            theirs = pipe(["a cat", "a dog"], negative_prompt=negatives, num_inference_steps=3, guidance_scale=5.0, height=side, width=side,
                          latents=latents.clone(), output_type="latent").images
        assert (ours - theirs).abs().max() < 1e-3 * theirs.std()


@pytest.mark.slow
def test_each_row_has_its_own_and_the_empty_one_is_none(narrow):
    each = ["", "a bird", "a tree"]
    r = p2p.edit(narrow, "a cat", ["a dog", "a fox"], negative_prompt=each, **EASY)
    assert torch.allclose(r.latents[:1], p2p.generate(narrow, "a cat", **EASY).latents, atol=1e-4)
    for i, negative in enumerate(each[1:], 1):
        alone = p2p.edit(narrow, "a cat", r.prompts[i], negative_prompt=["", negative], **EASY)
        assert torch.allclose(r.latents[i], alone.latents[1], atol=1e-4)
    assert r.settings["negative_prompt"] == each


@pytest.mark.slow
def test_inversions_with_guidance_and_traces_keep_theirs(narrow, tmp_path):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    plain, led = (p2p.invert(narrow, x, "a cat", method="direct", steps=3, inversion_guidance=3, negative_prompt=n) for n in (None, "a bird"))
    assert not torch.equal(plain.latents, led.latents)
    led.save(tmp_path / "inv.safetensors")
    assert p2p.Inversion.load(tmp_path / "inv.safetensors").negative_prompt == "a bird"
    default = p2p.edit(narrow, led, "a dog").latents[1]
    assert torch.equal(default, p2p.edit(narrow, led, "a dog", negative_prompt="a bird").latents[1])
    assert not torch.equal(default, p2p.edit(narrow, led, "a dog", negative_prompt="a tree").latents[1])
    traced = p2p.trace(narrow, "a cat", negative_prompt="a bird", **EASY)
    assert torch.allclose(p2p.edit(narrow, traced, "a dog").latents, p2p.edit(narrow, "a cat", "a dog", negative_prompt="a bird", **EASY).latents,
                          atol=1e-4)


@pytest.mark.parametrize("settings, message", [
    (dict(method="null-text", negative_prompt="a"), "has its own in its place"),
    (dict(method="negative-prompt", negative_prompt="a"), "has its own in its place"),
    (dict(method="ddim", negative_prompt="a"), "without guidance"), (dict(method="noise", negative_prompt="a"), "without guidance"),
    (dict(method="direct", inversion_guidance=2, negative_prompt="[a:b:0.4]"), "a schedule")])
def test_inversions_that_do_not_read_it_refuse_it(narrow, settings, message):
    with pytest.raises(UsageError, match=message):
        p2p.invert(narrow, torch.zeros(1, 3, 64, 64), "a cat", steps=2, **settings)


@pytest.mark.parametrize("settings, message", [
    (dict(negative_prompt=["a", "b", "c"]), "3 given for 2 rows"), (dict(negative_prompt="a", guidance_scale=1), "without guidance"),
    (dict(negative_prompt=[]), "0 given for 2 rows")])
def test_runs_that_cannot_read_it_refuse_it(narrow, settings, message):
    with pytest.raises(UsageError, match=message):
        p2p.edit(narrow, "a cat", "a dog", **EASY | settings)


@pytest.mark.parametrize("latents_only", [True, False])
def test_a_source_that_is_followed_reads_none(narrow, latents_only):
    traced = p2p.trace(narrow, "a cat", latents_only=latents_only, **EASY)
    with pytest.raises(UsageError, match='a bird.* is given for the source.*give "" for it'):
        p2p.edit(narrow, traced, "a dog", negative_prompt=["a bird", "a house"])


@pytest.mark.slow
def test_from_the_command_line_from_a_list_and_again(tmp_path, capsys):
    argv = ["edit", "a cat", "a dog", "--negative", "", "--negative", "a bird", "--steps", "2", "--seed", "1", "-o", str(tmp_path / "a")]
    assert main(argv) == 0
    made = capsys.readouterr().out.split()[1]
    assert read_settings(made)["negative_prompt"] == ["", "a bird"]
    assert main(["edit", "--from", made, "-o", str(tmp_path / "b")]) == 0
    again = capsys.readouterr().out.split()[1]
    job = {"source": "a cat", "targets": "a dog", "steps": 2, "seed": 1, "negative_prompt": ["", "a bird"]}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "c"), "-q"]) == 0
    row = json.loads((tmp_path / "c" / "results.jsonl").read_text())
    pixels = [p2p.image.open_picture(p).tobytes() for p in (made, again, tmp_path / "c" / row["images"][1])]
    assert pixels[0] == pixels[1] == pixels[2]


@pytest.mark.slow
@pytest.mark.parametrize("method, guidance", [("ddim", 3), ("rf-inversion", None), ("ddim", None)])
def test_what_inverting_leads_away_from_is_the_edits_negative_prompt(tmp_path, method, guidance):
    """Where it reads one: at 1 none does. Inverted and edited in one command, in two, in a list, and again, alike."""
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    invert = ["--image", str(tmp_path / "photo.png"), "--method", method, "--steps", "2"]
    invert += [] if guidance is None else ["--inversion-cfg", str(guidance)]
    negative, reads = ["--negative", "a bird"], (method, guidance) != ("ddim", None)

    def edited(name, *argv):
        assert main([*argv, "-q", "-o", str(tmp_path / name)]) == 0
        made, = (tmp_path / name).glob("*/edit.png")
        assert read_settings(made)["inversion"]["negative_prompt"] == ("a bird" if reads else None)
        return made

    made = [edited("one", "edit", *invert, "a cat", "a dog", *negative)]
    assert main(["invert", *invert[1:2], "a cat", *invert[2:], *(negative if reads else ()), "-q", "-o", str(tmp_path / "inverted")]) == 0
    inverted, = (tmp_path / "inverted").glob("*/inversion.safetensors")
    made += [edited("two", "edit", "--inversion", str(inverted), "a dog", *negative), edited("again", "edit", "--from", str(made[0]))]
    job = {"source": "a cat", "targets": "a dog", "image": "photo.png", "method": method, "steps": 2, "negative_prompt": "a bird"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job | ({} if guidance is None else {"inversion_guidance": guidance})))
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "list"), "-q"]) == 0
    made += list((tmp_path / "list").glob("*/edit.png"))
    assert len({p2p.image.open_picture(p).tobytes() for p in made}) == 1 and len(made) == 4
    assert main(["edit", "--from", str(made[0]), "--negative", "", "-q", "-o", str(tmp_path / "changed")]) == 0
    changed, = (tmp_path / "changed").glob("*/edit.png")
    assert read_settings(changed)["inversion"]["negative_prompt"] is None


@pytest.mark.slow
def test_a_picture_that_was_inverted_under_another_keeps_it(tmp_path):
    """Run again with other guidance; --negative alone is of both, as in edit --image."""
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    assert main(["invert", str(tmp_path / "photo.png"), "a cat", "--method", "ddim", "--steps", "2", "--inversion-cfg", "3", "--negative", "a bird",
                 "-q", "-o", str(tmp_path / "i")]) == 0
    inverted, = (tmp_path / "i").glob("*/inversion.safetensors")
    assert main(["edit", "--inversion", str(inverted), "a dog", "--negative", "a tree", "-q", "-o", str(tmp_path / "e")]) == 0
    made, = (tmp_path / "e").glob("*/edit.png")
    for i, (change, read) in enumerate([(["--inversion-cfg", "4"], "a bird"), (["--method", "fixed-point"], "a bird"), ([], "a bird"),
                                        (["--negative", "fog"], "fog")]):
        assert main(["edit", "--from", str(made), *change, "-q", "-o", str(tmp_path / str(i))]) == 0
        again, = (tmp_path / str(i)).glob("*/edit.png")
        assert read_settings(again)["inversion"]["negative_prompt"] == read, change


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--cfg", "1", "--negative", "a bird"], ["--negative", "a bird", "--negative", "a tree"], ["maps", "--negative", "a bird"]])
def test_one_that_inverting_alone_reads_is_not_refused(tmp_path, more):
    """rf-inversion is made under it; what the edits read of it is another matter."""
    Image.effect_noise((64, 64), 100).save(tmp_path / "photo.png")
    alone = more[0] == "maps"
    argv = ["maps", "a cat", *more[1:]] if alone else ["edit", "a cat", "a dog", *more]
    assert main([*argv, "--image", str(tmp_path / "photo.png"), "--method", "rf-inversion", "--steps", "2", "-q", "-o", str(tmp_path / "out")]) == 0
    assert main([*argv, "--image", str(tmp_path / "photo.png"), "--method", "direct", "--steps", "2", "-q", "-o", str(tmp_path / "out")]) == 2


def test_a_job_that_is_inverted_under_one_is_another_than_before(emoji, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    line = {"source": "a cat", "targets": "a dog", "image": "photo.png", "negative_prompt": "a bird"}
    for method, other in (("rf-inversion", True), ("direct", False)):
        job = jobs.parse(line | {"method": method}, 1, tmp_path, emoji)
        asked = job.settings() | {"image": job.content, "model": emoji.identity()}
        former = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        assert (job.id != former) is other
