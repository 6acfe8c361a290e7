"""Two tokenizers are two groups of columns, each aligned for itself: CLIP's and T5's, as in Stable Diffusion 3."""
import re
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plans import tables
from torch import nn

import p2p
from p2p import align
from p2p.blend import prepare
from p2p.cli.parser import main
from p2p.edits import Edit, alignment, choose_mode
from p2p.errors import UsageError
from p2p.lists.job import groups as batches
from p2p.lists.jobs import read as read_jobs
from p2p.models.conditioning import Conditioning
from p2p.models.mmdit import FLUX_DEV, SD3, SD35_LARGE, SD35_MEDIUM, MMDiTConfig, build
from p2p.models.t5 import EncodedPrompts, NoT5, T5Encoder
from p2p.models.text import TextConfig, TextEncoder, joined_tokens, tokens
from p2p.models.unet import SD1, UNet
from p2p.request.effect import left_out
from p2p.request.emphasis import condition, read, token_weights, weigh
from p2p.request.mask_sites import word_sites
from p2p.request.memory import qk_shapes
from p2p.request.ready import prompt_notes
from p2p.scope import scoped, subject
from p2p.show.leakage import leakage
from p2p.show.report import report
from p2p.weights.scheduler import Flow

CLIP, T5 = 10, 24   # columns
L = CLIP + T5
SOURCE, SWAP = "a cat on grass", "a schnauzer on grass"
MORE = "a big red cat on snowy green grass, with a hat"   # its hat is beyond CLIP's ten tokens


class Pieces:
    """Stands for T5's tokenizer: pieces of at most three letters, with the space before them, and an end."""

    pad_token_id, unk_token_id = 0, 2

    def __call__(self, text, max_length=None, **_):
        if isinstance(text, list):
            ids = [self(each)["input_ids"] for each in text]
            cut = [each if len(each) <= max_length else [*each[:max_length - 1], 1] for each in ids]
            return {"input_ids": torch.tensor([each + [0] * (max_length - len(each)) for each in cut])}
        found = list(re.finditer(r" ?([^\W\d_]{1,3}|\S)", text))
        return {"input_ids": [3 + zlib.crc32(m.group().encode()) % 997 for m in found] + [1],
                "offset_mapping": [m.span() for m in found] + [(0, 0)]}


class Tower(nn.Module):
    """Stands for T5's network: what a token is, and a little of what stands before it."""

    def __init__(self, width):
        super().__init__()
        self.config, self.table = SimpleNamespace(d_model=width), nn.Embedding(1000, width)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        return SimpleNamespace(last_hidden_state=x + 0.1 * x.cumsum(1))


T5_TOWER = T5Encoder(Tower(24), Pieces(), T5, masked=False)


def split(prompt):
    return [(tokens(prompt), CLIP), (T5_TOWER.tokens(prompt), T5)]


def both(prompt):
    return joined_tokens(split(prompt))


def edit_of(target, **settings):
    edit = Edit(target, cross_replace_steps={"default_": 0.5, **settings.pop("windows", {})}, **settings)
    return replace(edit, mode=edit.mode or "refine")


class TwoTowers(p2p.Model):
    """The context of each tower beside the others', in columns of its own."""

    @property
    def text_groups(self):
        return [(tower, tower.config.context_length) for tower in self.text_encoders]

    @torch.no_grad()
    def condition(self, prompts, height=None, width=None):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [tower.encode(tower.tokenize(list(prompts)))[0] for tower in self.text_encoders]
        vector = None if self.unet.config.vector_dim is None else torch.zeros(len(prompts), self.unet.config.vector_dim)
        return Conditioning(torch.cat(rows, dim=1), vector)


NET = MMDiTConfig(in_channels=3, out_channels=3, dim=48, heads=2, double=5, context_dim=24, vector_dim=20, table=12)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = TextEncoder(TextConfig(width=24, heads=2, layers=1, context_length=CLIP))
        for p in clip.transformer.parameters():
            p.data.normal_(std=0.2)
        clip.token_embedding.weight.data.normal_()
        net = build(NET)
        for name, p in net.named_parameters():
            p.data.normal_(std=0.05 if "modulation" in name.lower() or "final" in name else 0.3 if p.ndim > 1 else 0.02)
    parts = [part.eval().requires_grad_(False) for part in (net, clip, T5_TOWER)]
    return TwoTowers("two towers", Path("none"), "sd3", parts[0], parts[1:], None, torch.zeros(0), "flow", size=(16, 24),
                     guidance_scale=2.0, steps=3, flow=Flow(shift=3.0, twice=True))


# ------------------------------------------------------------------------------------------------------------------ tables

@pytest.mark.parametrize("mode, target, settings", [
    ("replace", SWAP, {}), ("replace", SWAP, dict(aligner="official")), ("refine", "a big cat on snowy grass", {}),
    ("refine", "a big cat on snowy grass", dict(aligner="official")), ("reweight", SOURCE, dict(equalizer={"cat": 2.0})),
    ("replace", SWAP, dict(equalizer={"schnauzer": -1.0, "grass": 3.0})), ("refine", "a big dog on grass", dict(swap={"cat": "dog"})),
    ("refine", "a big schnauzer on grass", dict(swap={"cat": "schnauzer"}, equalizer={"big": 2.0}, windows={"schnauzer": (0.2, 0.4)})),
    ("replace", SWAP, dict(windows={"schnauzer": 0.2, "on grass": 1.0}))])
def test_tables_are_each_tokenizers_side_by_side(mode, target, settings):
    """As if each group were all the text: the mix in blocks, what is kept one after the other."""
    edit = edit_of(target, **settings)
    whole = tables(both(SOURCE), both(target), edit, mode, 5, L)
    each = [tables(s, t, edit, mode, 5, n) for (s, n), (t, _) in zip(split(SOURCE), split(target))]
    assert torch.equal(whole.mix, torch.stack([torch.block_diag(*pair) for pair in zip(*(t.mix for t in each))]))
    assert torch.equal(whole.keep, torch.cat([t.keep for t in each], dim=1))


def test_a_word_has_pieces_of_each_tokenizer():
    """CLIP splits the new word in two, T5's stand-in in three: each shares out its own column of the old one."""
    m, _ = alignment(both(SOURCE), both(SWAP), Edit(SWAP), "replace", L)
    assert align.word_tokens(both(SWAP), "schnauzer", L) == [2, 3, CLIP + 1, CLIP + 2, CLIP + 3]
    assert m[2, [2, 3]].tolist() == [0.5, 0.5] and m[CLIP + 1, CLIP + 1:CLIP + 4].tolist() == [1 / 3] * 3
    assert m[:CLIP, CLIP:].abs().sum() == 0 == m[CLIP:, :CLIP].abs().sum() and torch.equal(m.sum(1), torch.ones(L).double())


def test_padding_stays_in_its_group():
    m, a = alignment(both(SOURCE), both("a cat"), Edit("a cat"), "refine", L)
    assert a[CLIP - 1] == a[L - 1] == 1 and m[CLIP - 1, CLIP - 1] == m[L - 1, L - 1] == 1


def test_columns_of_no_tokenizer_are_their_own():
    """Stable Diffusion 3 without T5: zeros stand there."""
    first = joined_tokens(split(SOURCE)[:1])
    assert first == tokens(SOURCE)   # one tokenizer: nothing changes
    pair = [p._replace(parts=p.parts[:1]) for p in (both(SOURCE), both(SWAP))]
    m, a = alignment(*pair, Edit(SWAP), "replace", L)
    assert torch.equal(m[CLIP:, CLIP:], torch.eye(T5).double()) and a.all()


def test_a_tower_that_is_not_there_aligns_nothing(model):
    """Its columns are zeros: they stay as they are, name no word, and are no reason of a refusal."""
    without = replace(model, text_encoders=[model.text_encoders[0], NoT5(24, T5)])
    s, t = without.tokens(SOURCE), without.tokens(SWAP)
    m, _ = alignment(s, t, Edit(SWAP), "replace", L)
    assert torch.equal(m[:CLIP, :CLIP], align.replacement(tokens(SOURCE), tokens(SWAP), CLIP))
    assert torch.equal(m[CLIP:, CLIP:], torch.eye(T5).double()) and align.ends(s, L) == ([0], [5])
    assert align.word_tokens(t, "schnauzer", L) == [2, 3] and align.named_words(t) == align.named_words(tokens(SWAP))
    for word, why in (("owl", 'no word "owl" in the prompt "a schnauzer'), ("hat", '"hat" stands beyond token 8')):
        with pytest.raises(UsageError, match=why):
            align.word_tokens(without.tokens(MORE if word == "hat" else SWAP), word, L)
    with pytest.raises(UsageError, match="beyond the 10 tokens"):
        p2p.edit(without, MORE, MORE.replace("hat", "cap"), steps=1)
    weighed = condition(without, ["a (cat:1.5)"], 16, 24).context
    assert weighed.isfinite().all() and not weighed[0, CLIP:].any()
    r = p2p.edit(without, SOURCE, [SOURCE, "a (red:1.2) cat on grass"], steps=2)
    assert (r.latents[1] - r.latents[0]).abs().max() < 1e-4 and without.tokens("").parts


# ------------------------------------------------------------------------------------------------------------------- words

def test_a_word_beyond_one_tower_is_found_in_the_other():
    prompt = both(MORE)
    assert align.word_tokens(prompt, "hat", L)[0] > CLIP and align.word_tokens(prompt, "red", L)[0] == 3
    with pytest.raises(UsageError, match='"owl" in the prompt'):
        align.word_tokens(prompt, "owl", L)
    with pytest.raises(UsageError, match='"end" stands beyond token 22'):   # of T5, which reads further
        align.word_tokens(both("a cat " + "on a big red hat " * 5 + "end"), "end", L)
    assert align.word_tokens(both("a big red cat on a green hat and a cat"), "cat", L)[:2] == [4, CLIP + 3]
    second = align.word_tokens(both("a big red cat on a green hat and a cat"), "cat#2", L)
    assert second == [i for i in align.word_tokens(both("a big red cat on a green hat and a cat"), "cat", L) if i > CLIP + 3]


def test_words_are_named_alike_in_both():
    prompt = both("a cat and a schnauzer’s cat, on a mat")
    named = align.named_words(prompt)
    assert [name for name, _ in named] == ["a#1", "cat#1", "and", "a#2", "schnauzer's", "cat,", "on", "a#3", "mat"]
    for name, columns in named:
        assert align.word_tokens(prompt, name, L) == columns
    assert sorted(i for _, columns in named for i in columns if i < CLIP) == list(range(1, 8))   # its comma is beyond, and so is "cat,"
    assert named[-1][1][0] > CLIP


def test_pieces_within_a_word_are_no_words():
    """T5's pieces end within words, where CLIP's do not: "gol" is none of "goldfish"."""
    for phrase in ("gol", "dfi", "fish", "a gol"):
        with pytest.raises(UsageError, match="no word"):
            align.word_tokens(T5_TOWER.tokens("a goldfish"), phrase, T5)
    assert align.word_tokens(T5_TOWER.tokens("a goldfish's bowl"), "goldfish", T5) == [1, 2, 3]


@pytest.mark.parametrize("target, mode", [(SWAP, "replace"), ("a Cat on grass", "replace"), (SOURCE, "reweight"), (MORE, "refine")])
def test_the_mode_is_chosen_by_words(target, mode):
    assert choose_mode(both(SOURCE), Edit(target), both(target)) == mode


@pytest.mark.parametrize("source, target, settings", [
    (SOURCE, SWAP, {}), (SOURCE, "a big cat on grass", dict(scope="cat")), (SOURCE, SOURCE, dict(equalizer={"grass": 2.0})),
    ("a cat next to a red cat", "a cat next to a red dog", {}), (SOURCE, "a big dog on grass", dict(swap={"cat": "dog"}))])
def test_an_edit_is_about_the_same_words(source, target, settings):
    """As for CLIP alone, where it reads all of both prompts."""
    pairs = [(f(source), f(target), n) for f, n in ((both, L), (tokens, CLIP))]
    found = []
    for s, t, n in pairs:
        edit = Edit(target, **settings)
        mode = choose_mode(s, edit, t)
        found.append((subject(s, t, edit, mode, n), scoped(s, t, edit, mode, n)))
        if edit.scope:
            found[-1] += (left_out(s, t, edit, mode, n),)
    assert found[0] == found[1]


def test_a_word_that_leaves_one_towers_reach_has_not_changed():
    """Words before it were added: CLIP no longer reads the grass, T5 does."""
    old, new = subject(both(SOURCE), both("a very big and very red cat on wet grass"), Edit(""), "refine", L)
    assert old == [] and new == ["very#1", "big", "and", "very#2", "red", "wet"]


# ------------------------------------------------------------------------------------------------------- the whole of a run

def test_blends_read_both_groups(model):
    blend = prepare([p2p.LocalBlend(words=("cat", "schnauzer"))], both(SOURCE), [both(SWAP)], unet=model.unet, steps=3, length=L,
                    size=(16, 24), device=torch.device("cpu"))
    assert [b.nonzero().flatten().tolist() for b in blend.columns[0, 0]] == [[2, CLIP + 1], [2, 3, CLIP + 1, CLIP + 2, CLIP + 3]]
    assert blend.side == (8, 12) and set(blend.sites) < set(model.unet.text_sites())


@pytest.fixture(scope="module")
def run(model):
    targets = [SWAP, Edit(SOURCE), Edit(SWAP, local_blend=p2p.LocalBlend(words=("cat", "schnauzer"), start=0.0, threshold=0.9)),
               Edit(MORE, scope="grass", local_blend=p2p.LocalBlend(threshold=0.9)), Edit(SWAP, self_max_tokens=10), Edit(SWAP, layers={"self": (0.9, 1.0)})]
    return p2p.edit(model, SOURCE, targets, steps=3, seed=1, record=p2p.Record(text=96, before=True))


def test_edits_through_two_groups(model, run):
    """The source is as it is alone, the same prompt gives the same picture, a blend and a scope keep a part of it."""
    alone = p2p.generate(model, SOURCE, steps=3, seed=1).latents[0]
    assert (run.latents[0] - alone).abs().max() < 1e-4 and (run.latents[2] - alone).abs().max() < 1e-4
    assert (run.latents[1] - alone).abs().max() > 1e-2
    for k in (2, 3):
        kept = (run.latents[k + 1] == run.latents[0]).all(0)
        assert (kept | run.masks[k, 0]).all() and 0 < run.masks[k].sum() < kept.numel()
    assert any("self_max_tokens 10 leaves self-attention alone: its smallest maps are of 96" in n for n in run.notes)


def test_every_pixel_borrows_unless_a_limit_is_given(model, run, narrow):
    """32 * 32 in a UNet, as officially; none in a transformer, all of whose layers have the same number."""
    assert p2p.edit(narrow, "a cat", "a dog", steps=1).settings["targets"][0]["self_max_tokens"] == 32 * 32
    assert [t["self_max_tokens"] for t in run.settings["targets"]] == [None] * 4 + [10, None]
    assert (run.latents[5] - run.latents[1]).abs().max() > 1e-3
    assert (run.latents[6] - run.latents[1]).abs().max() > 1e-3


def test_maps_are_named_by_words_of_both_groups(run):
    maps, row = run.maps, 1
    each = dict(maps.each_word(row, ends=True))
    assert list(each) == ["<start>", "a", "schnauzer", "on", "grass", "<end>"]
    mean = maps.mean(row)
    assert torch.allclose(each["schnauzer"], mean[..., [2, 3, CLIP + 1, CLIP + 2, CLIP + 3]].sum(-1))
    assert torch.allclose(each["<start>"], mean[..., 0]) and maps.sides() == [(8, 12)]
    assert torch.allclose(each["<end>"], mean[..., [6, CLIP + 7]].sum(-1))
    assert torch.allclose(maps.word("hat", 4), dict(maps.each_word(4))["hat"]) and mean.sum(-1).max() < 1


def test_leakage_and_reports(run):
    about = set(leakage(run, 4).about)
    assert leakage(run, 1).about == ["cat", "schnauzer"] and {"grass", "grass,"} < about and "hat" not in about
    assert "schnauzer</span>" in report(run)


def test_weights_on_embeddings_are_of_each_group(model):
    """By the rule of one tower, in the columns of each."""
    prompt = "a (schnauzer:1.5) on [grass], with a (hat:0.5)"
    got = condition(model, [prompt, SOURCE], 16, 24).context
    plain = model.condition([read(prompt).text, SOURCE]).context
    clip = token_weights(read(prompt), tokens)
    t5 = [1.0] * T5
    for word, weight in (("schnauzer", 1.5), ("grass", 1 / 1.1), ("hat", 0.5)):
        for i in align.word_tokens(T5_TOWER.tokens(read(prompt).text), word, T5):
            t5[i] = weight
    assert torch.allclose(got[0, :CLIP], weigh(plain[0, :CLIP], clip, [24])) and torch.equal(got[1], plain[1])
    assert torch.allclose(got[0, CLIP:], weigh(plain[0, CLIP:], t5, [24])) and not torch.allclose(got[0], plain[0], atol=1e-3)


def test_what_fills_a_wider_context_weighs_nothing():
    """CLIP's two towers are narrower than T5's: zeros stand beside them."""
    z = torch.cat([torch.rand(5, 3), torch.zeros(5, 2)], dim=1)
    weighed = weigh(z, [1, 2.0, 1], [1, 2])
    assert torch.equal(weighed[:, 3:], z[:, 3:]) and torch.equal(weighed[:, :3], weigh(z[:, :3], [1, 2.0, 1], [1, 2]))


def test_what_a_tower_cuts_off_is_said_by_its_name(model):
    notes = prompt_notes(model, [MORE])
    assert [n for n in notes if "CLIP reads 10" in n and 'cut off ", with a hat"' in n] and not any("T5 reads" in n for n in notes)
    assert any("T5 reads 24" in n for n in prompt_notes(model, [MORE + " and a schnauzer, a hippopotamus and a mat"]))


def test_only_what_no_tower_reads_is_refused(model):
    long = "a cat on " + "wet and " * 20
    with pytest.raises(UsageError, match="lies beyond the 24 tokens"):
        p2p.edit(model, long + "grass", long + "hay", steps=1)
    r = p2p.edit(model, "a cat on wet and green and grey grass", "a cat on wet and green and grey hay", steps=1)
    assert any("mode replace" in n for n in r.notes)


def test_prompts_encoded_beforehand_stand_for_a_tower(model):
    known = EncodedPrompts.encoded_by(T5_TOWER, [SOURCE, SWAP])
    stored = replace(model, text_encoders=[model.text_encoders[0], known])
    assert stored.tokens(SWAP) == model.tokens(SWAP) and torch.equal(stored.text([SWAP]), model.text([SWAP]))
    with pytest.raises(UsageError, match="not among the encoded ones"):
        stored.tokens("a dog")


# ------------------------------------------------------------------------------------------------ what transformers are asked

@pytest.mark.parametrize("config, blocks", [(SD3, range(4, 10)), (SD35_MEDIUM, range(5, 11)), (SD35_LARGE, range(16, 25)),
                                            (FLUX_DEV, range(11, 19)), (NET, [1])])
def test_masks_are_made_of_the_blocks_that_show_words_best(config, blocks):
    """Those that Shin et al. 2025 found, 7 8 5 4 9 of Stable Diffusion 3 medium, 7 9 8 5 10 of 3.5 medium, 18 21 20 24 16 of large,
    18 17 12 14 11 of FLUX's double ones, and what lies between; of others the nearest."""
    with torch.device("meta"):
        net = build(config)
    assert word_sites(net) == [net.parts.double[i].joint.site for i in blocks]


@pytest.mark.slow
def test_masks_of_a_unet_are_of_all_its_layers():
    with torch.device("meta"):
        unet = UNet(replace(SD1, channels=(32, 32, 32, 32), heads=(1, 1, 1, 1)))
    assert word_sites(unet) == unet.text_sites()


def test_plug_and_play_names_what_a_transformer_lacks(model, tmp_path):
    with pytest.raises(UsageError, match="PlugAndPlay: .* residual block .* UNet"):
        p2p.edit(model, SOURCE, SWAP, editor=p2p.PlugAndPlay())
    r = p2p.edit(model, SOURCE, SWAP, editor=p2p.MasaCtrl(start=0.0, layers=0.5), steps=2)
    free = p2p.generate(model, SWAP, steps=2).latents[0]
    assert (r.latents[1] - free).abs().max() > 1e-3


def test_a_traced_source_is_the_source(model):
    traced = p2p.trace(model, SOURCE, steps=2, seed=3)
    assert {k: tuple(v.shape[1:]) for k, v in traced.queries.items()} == {
        f"{site}.{part}": shape for site, qk in qk_shapes(model, 16, 24).items() for part, shape in zip("qk", qk)}
    r, again = (p2p.edit(model, source, SWAP, **how) for source, how in ((SOURCE, dict(steps=2, seed=3)), (traced, {})))
    assert (r.latents - again.latents).abs().max() < 1e-4


def test_jobs_with_and_without_a_level_are_batched(model, tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"id": "a", "source": "a cat", "targets": [{"prompt": "a dog", "local_blend": {"words": ["cat", "dog"]}}, '
                    '{"prompt": "a cow", "local_blend": {"words": ["cat", "cow"], "level": 2}}], "steps": 2}\n')
    assert [len(group) for group in batches(read_jobs(file, model), 4)] == [1]


@pytest.mark.parametrize("before", [False, True])
def test_a_mean_is_that_of_all_maps(model, before):
    """One map a layer, where those of all heads and steps would fill the memory."""
    runs = [p2p.edit(model, SOURCE, SWAP, steps=3, seed=1, record=p2p.Record(text=None, before=before, mean=mean, layers=(0.0, 0.5)))
            for mean in (True, False)]
    mean, every = (r.maps for r in runs)
    assert list(mean.sites) == list(every.sites) == model.unet.text_sites()[:2] + model.unet.text_sites()[2:3]
    assert {m.shape[0] for m in mean.sites.values()} == {m.shape[2] for m in mean.sites.values()} == {1}
    for row in (0, 1):
        assert torch.allclose(mean.mean(row), every.mean(row), atol=1e-4)
    assert not before or torch.allclose(mean.mean(1, before=True), every.mean(1, before=True), atol=1e-4)


def test_usual_maps_are_of_the_layers_that_masks_are_made_of(model):
    assert p2p.Record(text=None).sites(model.unet, 16, 24) == word_sites(model.unet)
    assert p2p.Record(text=96).sites(model.unet, 16, 24) == model.unet.text_sites()
    assert p2p.Record(text=None, layers="blocks.0").sites(model.unet, 16, 24) == model.unet.text_sites()[:1]
    with torch.device("meta"):
        unet = UNet(replace(SD1, channels=(32, 32, 32, 32), heads=(1, 1, 1, 1)))
    assert p2p.Record(text=None).sites(unet, 64, 64) == p2p.Record(text=32 * 32).sites(unet, 64, 64)
    for record in (p2p.Record(mean=True), p2p.Record(layers="up"), p2p.Record(text=None, layers=3)):
        with pytest.raises(UsageError, match="record|layers"):
            record.check()


def test_components_of_a_transformer_are_refused_before_it_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("p2p.cli.commands.generated", None)
    argv = ["maps", "a cat", "--model", "emoji-flow", "--components", "--steps", "2", "-o", str(tmp_path), "--device", "cpu"]
    assert main(argv) == 2 and "no layer of this model attends to pixels alone" in capsys.readouterr().err
    argv = ["maps", "a cat", "--components", "--site", "up", "-o", str(tmp_path), "--device", "cpu"]   # the bundled one has them going down
    assert main(argv) == 2 and "no layer named up attends to pixels alone; those that do: down" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind, t5", [("3.5 medium", True), ("3 medium", False), ("dev", True), ("schnell", True)])
def test_small_models_as_diffusers_saves_them_are_edited(tmp_path, kind, t5):
    """Blends, scopes, weights, maps, leakage and reports; the source is as it is alone, and so is the same prompt."""
    import flow_models  # diffusers and transformers take seconds to import

    flow_models.pipeline(kind, tmp_path / "towers", with_t5=t5).save_pretrained(tmp_path / "model")
    model = p2p.load(tmp_path / "model", device="cpu")
    how = dict(steps=2, seed=1, height=32, width=32)
    targets = ["a dog on grass", Edit("a big red cat on grass", scope="cat"), Edit(SOURCE, self_replace_steps=1.0),
               Edit("a dog on grass", local_blend=p2p.LocalBlend(words=("cat", "dog")), equalizer={"dog": 2.0})]
    r = p2p.edit(model, SOURCE, targets, record=p2p.Record(text=None, mean=True, before=True), **how)
    alone = p2p.generate(model, SOURCE, **how)
    for k in (0, 3):
        assert (r.latents[k] - alone.latents[0]).abs().max() < 1e-4
    assert (r.latents[1] - alone.latents[0]).abs().max() > 1e-3 and leakage(r, 1).about == ["cat", "dog"]
    assert "grass</span>" in report(r) and r.maps.word("dog", 1).shape == (8, 8) and r.latents.isfinite().all()
    assert [n for _, n in model.text_groups] == {"3": [77, 256], "d": [512], "s": [256]}[kind[0]]
    again = p2p.edit(model, p2p.trace(model, SOURCE, **how), targets[0])
    assert (again.latents - r.latents[:2]).abs().max() < 1e-4
