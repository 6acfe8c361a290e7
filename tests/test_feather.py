"""Local blends with soft edges: soft over the feather, the source beyond it, the official arithmetic at 0."""
import json

import pytest
import torch
from PIL import Image

import p2p
from p2p.blend import Blend, feathered, local_blend
from p2p.cli import options
from p2p.cli.parser import main, parsers
from p2p.lists import jobs, work
from p2p.lists.together import edit_together
from p2p.request.settings import from_settings

SOURCE, TARGET = "a cat on grass", "a dog on grass"


def blend_of(mask, *widths):
    n, device = len(widths), mask.device
    zeros = torch.zeros(n, dtype=torch.long, device=device)
    return Blend((0, 0), torch.zeros(n, 2, 2, 77), torch.zeros(n, 2), zeros, torch.ones(n, dtype=torch.bool), mask.expand(n, -1, -1, -1),
                 torch.zeros(n, dtype=torch.bool), zeros, torch.tensor(widths), -int(-max(widths) // 1))


def stairs(side=32, step=4):
    """A diagonal edge in steps, as maps of a quarter of the side make it."""
    i = torch.arange(side) // step
    return (i[:, None] > i)[None, None]


def written_out(mask, width):
    """Every position, the mean of its surroundings by a triangle's weights; edges are repeated."""
    h, w = mask.shape
    reach = -int(-width // 1)
    out = torch.zeros(h, w)
    for y in range(h):
        for x in range(w):
            total = weights = 0.0
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    weight = max(1 - abs(dy) / (width + 1), 0) * max(1 - abs(dx) / (width + 1), 0)
                    weights += weight
                    total += weight * bool(mask[min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)])
            out[y, x] = total / weights
    return out


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0, 2.5, 4.0])
def test_it_is_the_masks_mean_by_a_triangle(width):
    mask = torch.rand(13, 9, generator=torch.Generator().manual_seed(1)) > 0.6
    found = feathered(mask[None, None], blend_of(mask[None, None], width))[0, 0]
    assert (found - written_out(mask, width)).abs().max() < 1e-5
    if width == 0:
        assert torch.equal(found, mask.float())


@pytest.mark.parametrize("width", [1.0, 3.0, 4.0])
def test_beyond_it_stand_the_pictures_themselves(width):
    """Rows with other feathers beside it change nothing of that."""
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 10:20, 12:18] = True
    blend = blend_of(mask, 0.0, width, 2 * width)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out, where = local_blend(x, torch.zeros(3, 2, 2, 0), blend, 0)
    assert torch.equal(out[0], x[0]) and torch.equal(where[0], mask[0])
    assert torch.equal(out[1], torch.where(mask[0], x[1], x[0]))
    reach = int(width)
    grown, shrunk = torch.zeros(32, 32, dtype=torch.bool), torch.zeros(32, 32, dtype=torch.bool)
    grown[10 - reach:20 + reach, 12 - reach:18 + reach] = True
    shrunk[10 + reach:20 - reach, 12 + reach:18 - reach] = True
    assert torch.equal(where[1, 0], grown) and torch.equal(out[2][:, ~grown], x[0][:, ~grown])
    assert not shrunk.any() or (out[2] - x[2])[:, shrunk].abs().max() < 1e-5


def test_there_are_no_steps_of_four():
    """Along the edge of a staircase, the hard mask jumps from 0 to 1; the feathered one falls a little at every position."""
    mask = stairs()
    soft = feathered(mask, blend_of(mask, 4.0))[0, 0]
    assert mask.float().diff(dim=-1).abs().max() == 1 and soft[8:24, 8:24].diff(dim=-1).abs().max() < 0.25
    along = soft.diagonal()[8:24]
    assert along.max() - along.min() < 0.3 < 1 == stairs()[0, 0].float().diagonal(-2).diff().abs().max()


@pytest.mark.slow
def test_an_edit_with_a_feather(emoji):
    """The source's pixels beyond it, to the bit; 0 is the hard mask."""
    mask = torch.zeros(64, 64)
    mask[20:44, 20:44] = 1
    edits = [p2p.Edit(TARGET, local_blend=p2p.LocalBlend(mask=mask, **given)) for given in ({}, {"feather": 0}, {"feather": 4})]
    r = p2p.edit(emoji, SOURCE, edits, steps=3)
    alone = p2p.edit(emoji, SOURCE, edits[0], steps=3)
    beyond = torch.ones(64, 64, dtype=torch.bool)
    beyond[16:48, 16:48] = False
    assert r.masks.dtype == torch.bool and torch.equal(~r.masks[2, 0], beyond) and torch.equal(r.masks[:1], alone.masks)
    assert torch.equal(r.latents[3][:, beyond], r.latents[0][:, beyond]) and torch.equal(r.latents[1], r.latents[2])
    assert not torch.equal(r.latents[3], r.latents[1])
    assert (r.latents[1] - alone.latents[1]).abs().max() < 1e-3 * alone.latents.std()
    again = p2p.edit(emoji, SOURCE, from_settings(json.loads(json.dumps(r.settings))), steps=3)
    assert torch.equal(again.latents, r.latents) and [t["local_blend"]["feather"] for t in r.settings["targets"]] == [0, 0, 4]


def test_settings_of_older_versions_are_hard(narrow):
    r = p2p.edit(narrow, SOURCE, TARGET, local_blend=p2p.LocalBlend(words=("cat", "dog")), steps=1)
    said = json.loads(json.dumps(r.settings))
    del said["targets"][0]["local_blend"]["feather"]
    assert from_settings(said)[0].local_blend.feather == 0


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_from_the_command_line_a_list_and_again(narrow, tmp_path, capsys):
    short = ["--steps", "1", "--seed", "1", "-o", str(tmp_path)]
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    for told, wanted in ((["--blend", "cat:dog"], 2), (["--scope", "cat"], 2), (["--blend", "cat:dog", "--blend-feather", "0"], 0),
                         (["--blend-mask", str(tmp_path / "mask.png")], 0), (["--scope", "cat", "--blend-feather", "1"], 1)):
        args = parsers()[1]["edit"].parse_args([SOURCE, TARGET, *told])
        assert options.targets(args, [TARGET])[0].local_blend.feather == wanted, told
    assert main(["edit", SOURCE, TARGET, "--blend", "cat:dog", "--blend-feather", "3", *short]) == 0
    made = capsys.readouterr().out.split()[1]
    wanted = p2p.edit(narrow, SOURCE, TARGET, steps=1, seed=1, local_blend=p2p.LocalBlend(words=("cat", "dog"), feather=3))
    assert Image.open(made).tobytes() == wanted.images[1].tobytes()
    assert main(["edit", "--from", made, "-o", str(tmp_path)]) == 0
    assert Image.open(capsys.readouterr().out.split()[1]).tobytes() == wanted.images[1].tobytes()
    assert main(["edit", "--from", made, "--blend-feather", "0", "-o", str(tmp_path)]) == 0
    assert Image.open(capsys.readouterr().out.split()[1]).tobytes() != wanted.images[1].tobytes()
    lines = [{"source": SOURCE, "targets": [TARGET], "steps": 1, "seed": 1, "local_blend": {"words": ["cat", "dog"], **more}}
             for more in ({"feather": 3}, {}, {"feather": 1.5})]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = jobs.read(tmp_path / "x.jsonl", narrow)
    assert len({job.id for job in read}) == 3
    assert [work._ready(narrow, job).edits[0].local_blend.feather for job in read] == [3, 0, 1.5]


@pytest.mark.slow
def test_sources_in_one_batch_feather_each_in_its_own_way(narrow):
    blends = [p2p.LocalBlend(words=("cat", "dog"), start=0.0, feather=width) for width in (0, 2, 4)]
    asked = [dict(source=SOURCE, targets=TARGET, seed=k, local_blend=b, steps=2) for k, b in enumerate([*blends, None])]
    for job, both in zip(asked, edit_together(narrow, asked)):
        alone = p2p.edit(narrow, **job)
        assert (both.latents - alone.latents).abs().max() < 1e-4
        assert alone.masks is None or torch.equal(both.masks, alone.masks)


@pytest.mark.parametrize("feather", [-1, float("nan"), float("inf"), 2000, "4", None, True])
def test_what_is_no_feather_is_said(narrow, feather):
    with pytest.raises(p2p.UsageError, match="feather"):
        p2p.edit(narrow, SOURCE, TARGET, local_blend=p2p.LocalBlend(words=("cat", "dog"), feather=feather), steps=1)
