"""PIE-Bench's rows: what the published scripts do with an item, as jobs."""
import numpy as np
import pytest
import torch
from PIL import Image

import p2p
from p2p import UsageError
from p2p.image import from_base64
from p2p.lists import pie, protocol


def item(source="a red cat on grass", target="a red dog on grass", blended="cat dog"):
    return protocol.Item("k", pie.Path("k.png"), source, target, blended, [], "1", "k.png")


def told(name, model, *given, **changed):
    return protocol.job(protocol.replace(protocol.find(name), **changed), item(*given), model)


# ---------------------------------------------------------------------------- run_editing_*.py, row by row

P2P = {"source": "a red cat on grass", "targets": ["a red dog on grass"], "steps": 50, "guidance_scale": 7.5,
       "mode": "refine", "cross_replace_steps": 0.4, "self_replace_steps": 0.6, "self_max_tokens": 1024, "windows_over": "run",
       "aligner": "official", "fit": "square", "equalizer": {"dog": 2.0},
       "local_blend": {"words": [["cat"], ["dog"]], "keep": "sampled"}}
BARE = {k: P2P[k] for k in ("source", "targets", "steps", "guidance_scale", "fit")}
PNP = BARE | {"editor": {"name": "plug-and-play", "source_prompt": ""}, "negative_prompt": "ugly, blurry, black, low res, unrealistic"}


@pytest.mark.parametrize("name, wanted", [
    ("ddim+p2p", P2P | {"method": "ddim"}),
    ("null-text-inversion+p2p", P2P | {"method": "null-text"}),
    ("negative-prompt-inversion+p2p", P2P | {"method": "negative-prompt"}),
    ("directinversion+p2p", P2P | {"method": "direct"}),
    ("null-text-inversion+proximal-guidance", P2P | {"method": "null-text", "proximal": ["published", 0.75]}),
    ("negative-prompt-inversion+proximal-guidance", P2P | {"method": "negative-prompt", "proximal": ["published", 0.75]}),
    ("edit-friendly-inversion+p2p", {k: v for k, v in P2P.items() if k not in ("equalizer", "local_blend")} | {
        "method": "edit-friendly", "seed": 1234, "skip": 12, "mode": "replace", "self_max_tokens": 256, "windows_over": "schedule"}),
    ("ddim+masactrl", BARE | {"source": "", "method": "ddim", "editor": "masactrl"}),
    ("directinversion+masactrl", BARE | {"source": "", "method": "direct", "editor": "masactrl"}),
    ("ddim+pnp", PNP | {"method": "ddim", "path": "resampled"}),
    ("directinversion+pnp", PNP | {"method": "direct"}),
    ("directinversion+p2p_guidance_25_75", P2P | {"method": "direct", "inversion_guidance": 2.5}),
    ("directinversion+p2p_guidance_0_1", P2P | {"method": "direct", "inversion_guidance": 0.0, "guidance_scale": 1.0}),
    ("ablation_directinversion_step_100+p2p", P2P | {"method": "direct", "steps": 100})])
def test_published_rows_are_what_the_scripts_do(emoji, name, wanted):
    said = told(name, emoji)
    assert said.pop("image").endswith("k.png") and said == wanted


def test_every_named_row_of_the_published_tables_is_there_or_refused_by_name():
    assert len([n for n in protocol.PUBLISHED if "_guidance_" in n]) == 20 and len(protocol.GROUPS["published"]) == 11
    for name in ("stylediffusion+p2p", "edict+p2p", "edict+direct_forward", "ddim+pix2pix-zero", "instruct-pix2pix",
                 "instruct-diffusion", "blended-latent-diffusion", "ablation_null-latent-inversion+p2p",
                 "ablation_null-text-inversion_single_branch+p2p_a800", "ablation_directinversion_04+p2p",
                 "ablation_directinversion_interval_24+p2p", "ablation_directinversion_add-source+p2p"):
        with pytest.raises(UsageError, match="not offered, for want of"):
            protocol.find(name)
    with pytest.raises(UsageError, match="no method; published: ddim"):
        protocol.find("ddim+p2q")


@pytest.mark.parametrize("blended, words, weight", [
    ("cat dog", (["cat"], ["dog"]), {"dog": 2.0}),
    ("cat dog red grass", (["cat"], ["dog"]), {"dog": 2.0}),                  # the first two of any number
    ("red cat dog", (["red"], []), None),                                    # the second word is none of the target
    ("tiger dog", ([], ["dog"]), {"dog": 2.0}), ("cat lion", (["cat"], []), None),
    ("Cat dog", ([], ["dog"]), {"dog": 2.0}), ("cat dog,", (["cat"], []), None),   # equality, with case and punctuation
    ("grass a", (["grass"], ["a#1", "a#2"]), {"a#1": 2.0, "a#2": 2.0})])
def test_published_blends_look_words_up_by_equality(emoji, blended, words, weight):
    said = told("ddim+p2p", emoji, "a red cat on grass", "a red dog and a grass", blended)
    assert tuple(said["local_blend"]["words"]) == words and said.get("equalizer") == weight


def test_a_word_with_its_punctuation_is_another_one(emoji):
    said = told("ddim+p2p", emoji, "a red cat, on grass", "a red dog on grass", "cat, dog")
    assert said["local_blend"]["words"] == [["cat,"], ["dog"]]
    assert told("ddim+p2p", emoji, "a red cat, on grass", "a red dog on grass", "cat dog")["local_blend"]["words"] == [[], ["dog"]]


def test_words_of_neither_prompt_make_the_target_the_source_and_the_item_stays(emoji, tmp_path):
    said = told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "sky lion")
    mask = from_base64(said["local_blend"]["mask"])
    assert np.asarray(mask).max() == 0 and "equalizer" not in said and "words" not in said["local_blend"]
    with pytest.raises(UsageError, match="one word"):
        told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "cat")
    assert "local_blend" not in told("ddim+p2p", emoji, "a red cat on grass", "a red dog on grass", "")


def test_a_row_of_ones_own_skips_the_share_that_the_row_it_is_like_does(emoji):
    for steps, skip in ((50, 12), (100, 24), (10, 2)):
        job = pie.custom({"like": "edit-friendly-inversion+p2p", "steps": steps}).job(item(), emoji)
        assert (job["steps"], job["skip"]) == (steps, skip)


@pytest.mark.parametrize("settings", [{"method": "noise"}, {"like": "noise"}])
def test_brackets_of_the_benchmarks_prompts_weigh_nothing(emoji, settings):
    job = pie.custom(settings).job(item("a cat (black) on grass", "a dog (black) on grass", ""), emoji)
    assert job["source"] == r"a cat \(black\) on grass" and job["targets"] == [r"a dog \(black\) on grass"]


def test_models_to_which_brackets_are_text_are_given_them_as_they_are(emoji, monkeypatch):
    monkeypatch.setattr("p2p.request.emphasis.TextEncoder", int)   # as of one that reads its text by T5
    for job in (pie.custom({"method": "noise"}).job(item("a (cat)", "a (dog)", ""), emoji), told("ddim", emoji, "a (cat)", "a (dog)", "")):
        assert job["source"] == "a (cat)" and job["targets"] == ["a (dog)"]


def test_edit_friendly_replaces_where_the_prompts_have_as_many_words(emoji):
    row = "edit-friendly-inversion+p2p"
    assert told(row, emoji, "a cat on grass", "a dog on ice", "cat dog")["mode"] == "replace"
    assert told(row, emoji, "a huge dog on grass", "a dog on foggy grass", "")["mode"] == "replace"     # ours refines
    assert told(row, emoji, "a cat on grass", "a black cat on grass", "")["mode"] == "refine"


def test_corrected_rows_choose_modes_and_fail_where_words_are_missing(emoji):
    said = told("direct", emoji, "a red cat on grass", "a red dog on grass", "red cat dog")
    assert said["local_blend"] == {"words": ["red cat", "dog"], "keep": "stored"} and said["equalizer"] == {"dog": 2.0}
    assert "mode" not in said and said["aligner"] == "exact" and said["fit"] == "crop" and said["method"] == "direct"
    with pytest.raises(UsageError, match="blended_word"):
        told("direct", emoji, "a red cat on grass", "a red dog on grass", "lion dog")
    assert told("ddim, plug-and-play", emoji)["editor"] == "plug-and-play"


def test_pictures_are_fitted_as_load_512_does():
    """[:, :, :3], the middle square by whole pixels, Image.resize as it is."""
    rng = np.random.default_rng(0)
    for h, w in ((40, 70), (71, 40), (33, 33)):
        a = rng.integers(0, 256, (h, w, 4), np.uint8)
        b = a[:, :, :3]
        b = b[:, (w - h) // 2:(w - h) // 2 + h] if h < w else b[(h - w) // 2:(h - w) // 2 + w]
        wanted = np.array(Image.fromarray(b).resize((64, 64)))
        assert np.array_equal(np.asarray(protocol.square(Image.fromarray(a), (64, 64))), wanted)


@pytest.mark.slow
@torch.no_grad()
def test_the_resampled_path_is_the_published_list(emoji):
    """extract_latents: inverted with the prompt, sampled again without guidance, reversed; step i is given entry -1 - i of a list
    without the noise itself, and the target starts from its last one."""
    inv = p2p.invert(emoji, Image.new("RGB", (64, 64), "teal"), "a red cat on grass", method="ddim", steps=6)
    found = protocol.resampled(emoji, inv)
    x, after = inv.latents[-1:], []
    schedule, text = emoji.schedule(6), emoji.condition(["a red cat on grass"])
    for t, a_t, a_prev in schedule:
        out = emoji.predict(x, t, text)[0]
        x = p2p.sampler.ddim_step(*p2p.sampler.x0_and_eps(x, out, a_t, emoji.prediction, emoji.clip), a_t, a_prev)
        after.append(x)
    latents = after[::-1]                                         # latent_reconstruction.reverse()
    given = [latents[-1 - i] for i in range(6)]
    assert found.method == "direct" and len(found.latents) == 7
    assert all((found.latents[6 - i] - given[i][0]).abs().max() < 1e-5 for i in range(6))


@pytest.mark.parametrize("name, said", [
    ("null-text-inversion+p2p_a800", "null-text-inversion.p2p as it ran on one kind of GPU; ask for null-text-inversion.p2p, "),
    ("null-text-inversion+p2p_3090", "on one kind of GPU"), ("ablation_null-latent-inversion+p2p_3090", "for want of null-text's"),
    ("ablation_directinversion_step_30+p2p", "20, 100 and 500 steps; for others ask for directinversion.p2p with --steps 30"),
    ("stylediffusion+p2p", "not offered, for want of StyleDiffusion's network, which is trained for each picture; compare")])
def test_names_of_the_published_tables_get_an_answer(name, said):
    with pytest.raises(UsageError, match=said):
        protocol.find(name)


def test_a_row_is_recorded_with_the_keys_of_its_first_version():
    """So that a row that was begun with an earlier version goes on."""
    published = {name: protocol.recorded(protocol.find(name)) for name in ("ddim+p2p", "ddim+masactrl")}
    assert {name: row["told"] for name, row in published.items()} == {"ddim+p2p": "prompt", "ddim+masactrl": "nothing"}
    assert all("source_conditioning" not in row for row in published.values())
    assert published["ddim+masactrl"]["inversion"] == "ddim" and published["ddim+masactrl"]["fit"] == "square"
