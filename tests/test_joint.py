"""Joint attention: rows of pixels are edited in their columns of text, those of text are each row's own (float64)."""
import pytest
import torch
from test_attention import KINDS, controller, ingredients

from p2p.edits import mix_keep
from p2p.models.attention import AttentionEdit, HybridAttention, JointAttention, attend_probs, edited_probs
from p2p.models.maps import site_maps

B, N, L, HEADS, D = 4, 9, 11, 2, 8   # rows 2 and 3 are edited from row 1


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def split(x):
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


class Site:
    """A layer and its inputs, pixels before text."""

    def __init__(self):
        self.layer = JointAttention(HEADS)
        self.q, self.k, self.v = (rand(B, N + L, HEADS * D, seed=i) for i in range(3))

    def __call__(self, edit=None, rows=(0, 1, 2, 3), seen=None):
        return self.layer(*(x[list(rows)] for x in (self.q, self.k, self.v)), N, edit, seen)

    def qk(self, edit=None, rows=(0, 1, 2, 3)):
        seen = {"": None}
        self(edit, rows, seen)
        return seen[""]

    def probs(self):
        return attend_probs(split(self.q), split(self.k))                         # (B, h, N + L, N + L)


def an_edit(mix=None, keep=None, pixels=None, limit=None, source=(1, 1), **more):
    mix = rand(2, L, L) if mix is None else mix
    keep = rand(2, L) if keep is None else keep
    chosen = None if pixels is None else torch.tensor(pixels)
    return AttentionEdit(torch.tensor(source), mix, keep, pixels=chosen,
                         max_pixels=None if limit is None else torch.tensor([limit, limit]), **more)


QK_OF_SOURCE = [(1, 1), (1, 1), (2, 3)]   # values stay the rows' own


def close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_explicit(kind):
    """Every row of the table in p2p/edits.py, as the official controllers have it, on explicit maps."""
    site, (alpha, c, m, a) = Site(), ingredients(kind)
    mix, keep = mix_keep(kind.split(",")[0], alpha, c, m, a)
    p, v = site.probs(), split(site.v)
    pixels, text = p[:, :, :N], p[:, :, N:]
    edited = controller(kind, pixels[[1, 1]][..., N:], pixels[2:][..., N:], alpha[0], c, m, a)
    wanted = torch.cat([pixels[:2], torch.cat([pixels[2:][..., :N], edited], dim=-1)])
    out = site(an_edit(mix.expand(2, -1, -1), keep.expand(2, -1)))
    close(out, joined(torch.cat([wanted, text], dim=2) @ v))
    close(site(), joined(p @ v))


def test_two_tokenizers_are_two_groups_of_columns():
    """CLIP's and T5's tokens, each aligned for itself: one mix, of two blocks."""
    site, sizes = Site(), (4, 7)
    mixes, keeps = [rand(2, n, n) for n in sizes], [rand(2, n) for n in sizes]
    whole = torch.stack([torch.block_diag(*(m[i] for m in mixes)) for i in range(2)])
    p, start, groups = site.probs()[:, :, :N], N, []
    for n, mix, keep in zip(sizes, mixes, keeps):
        own = p[..., start:start + n]
        groups.append(edited_probs(own[2:], own[[1, 1]], mix, keep))
        start += n
    wanted = torch.cat([p[2:, ..., :N], *groups], dim=-1) @ split(site.v)[2:]
    close(site(an_edit(whole, torch.cat(keeps, dim=1)))[2:, :N], joined(wanted))


def test_refinement_is_reflexs_rule():
    """On FLUX's order, text before pixels: the source's columns by the mapper where a word has a counterpart, the
    target's times a factor where it has none; after the softmax, and no row is normalised again."""
    site, factor = Site(), 4.0
    mapper = torch.tensor([0, 1, 2, 2, 3, 4, 6, 5, 8, 9, 10])
    known = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1]).double()
    q, k, v = (split(torch.cat([x[:, N:], x[:, :N]], dim=1)) for x in (site.q, site.k, site.v))
    p = attend_probs(q, k)
    source, target = p[1, :, L:, :L], p[2:, :, L:, :L]
    new = source[..., mapper] * known + target * (1 - known) * factor
    pixels = p[2:, :, L:, L:] @ v[2:, :, L:] + new @ v[2:, :, :L]
    wanted = torch.cat([pixels, p[2:, :, :L] @ v[2:]], dim=2)
    mix = (torch.eye(L).double()[:, mapper] * known).expand(2, -1, -1)
    close(site(an_edit(mix, ((1 - known) * factor).expand(2, -1)))[2:], joined(wanted))


def test_borrowed_pixels_are_the_rule_of_exploring_mmdit():
    """Its "q_i k_i": in the whole attention, text's rows too, the pixels' queries and keys are the source's."""
    site = Site()
    q, k = site.q.clone(), site.k.clone()
    q[2:, :N], k[2:, :N] = q[1, :N], k[1, :N]
    wanted = joined(attend_probs(split(q), split(k)) @ split(site.v))
    edit = an_edit(pixels=QK_OF_SOURCE)._replace(mix=None, keep=None)
    close(site(edit), wanted)
    close(site(edit._replace(max_pixels=torch.tensor([N, N - 1])))[2], wanted[2])
    close(site(edit._replace(max_pixels=torch.tensor([N, N - 1])))[3], site()[3])


def test_values_can_be_borrowed_too():
    site = Site()
    site.q[:, N:], site.k[:, N:], site.v[:, N:] = site.q[1, N:], site.k[1, N:], site.v[1, N:]
    out = site(an_edit(pixels=[(1, 1)] * 3)._replace(mix=None, keep=None))
    close(out[2:], out[[1, 1]])
    assert (site()[2:] - out[2:]).abs().max() > 1e-2


@pytest.mark.parametrize("pixels", [None, QK_OF_SOURCE], ids=["text", "text and pixels"])
def test_both_edits_at_once(pixels):
    """The rows' own map is that of the borrowed pixels; the source's columns are its own."""
    site, edit = Site(), an_edit(pixels=pixels)
    q, k = site.q.clone(), site.k.clone()
    if pixels:
        q[2:, :N], k[2:, :N] = q[1, :N], k[1, :N]
    p = attend_probs(split(q), split(k))
    p[2:, :, :N] = edited_probs(p[2:, :, :N], p[[1, 1], :, :N], edit.mix, edit.keep)
    close(site(edit), joined(p @ split(site.v)))


@pytest.mark.parametrize("pixels", [None, QK_OF_SOURCE], ids=["text", "text and pixels"])
def test_equal_prompts_give_equal_rows(pixels):
    """Whatever share is borrowed, of a row that is the same."""
    site, share = Site(), torch.rand(2, L, generator=torch.Generator().manual_seed(0)).double()
    for x in (site.q, site.k, site.v):
        x[2:] = x[1]
    out = site(an_edit(torch.diag_embed(share), 1 - share, pixels))
    close(out[2:], out[[1, 1]])
    close(out, site())


@pytest.mark.parametrize("pixels", [None, QK_OF_SOURCE], ids=["text", "text and pixels"])
def test_the_source_is_as_it_is_alone(pixels):
    site = Site()
    out = site(an_edit(pixels=pixels))
    close(out[1], site(rows=[1])[0])
    close(out[:2], site()[:2])


def test_text_reads_as_if_there_were_no_edit_of_its_columns():
    site = Site()
    edited, plain = site(an_edit()), site()
    assert torch.equal(edited[:, N:], plain[:, N:]) and (edited[2:, :N] - plain[2:, :N]).abs().min() > 1e-9


def test_text_whose_rows_nothing_reads_is_left_out():
    """The last block of Stable Diffusion 3 has queries of pixels alone."""
    site, edit = Site(), an_edit(pixels=QK_OF_SOURCE)
    close(site.layer(site.q[:, :N], site.k, site.v, N, edit), site(edit)[:, :N])


def test_renormalised_rows_sum_to_one():
    """With values of ones the output is the row sums."""
    site, edit = Site(), an_edit(rand(2, L, L).abs(), rand(2, L).abs())
    site.v = torch.ones_like(site.v)
    assert (site(edit)[2:, :N] - 1).abs().max() > 1e-2
    out = site(edit._replace(renormalise=torch.tensor([True, False])))
    close(out[2, :N], torch.ones(N, HEADS * D).double())
    close(out[3], site(edit)[3])


@pytest.mark.parametrize("pixels", [None, [(3, 3), (3, 3), (1, 2)]], ids=["text", "text and pixels"])
def test_cached_rows_are_rows_of_the_batch(pixels):
    """The source's queries and keys beside the batch, numbered after its last row."""
    site = Site()
    wanted = site(an_edit(pixels=pixels and QK_OF_SOURCE))[2:]
    lent = tuple(x[1:2] for x in site.qk())
    edit = an_edit(pixels=pixels, source=(3, 3), cached={"": lent})
    close(site(edit, rows=(0, 2, 3))[1:], wanted)


def test_pixels_in_hybrid_attention_are_borrowed_of_cached_rows():
    """There too the keys of pixels stand before those of the text."""
    torch.manual_seed(0)
    layer, x, context = HybridAttention(16, 12, HEADS, D).double(), rand(B, N, 16), rand(B, L, 12)
    rows, seen = [0, 2, 3], {"": None}
    wanted = layer(x, {"": layer.text(context)}, an_edit(pixels=QK_OF_SOURCE), seen)[2:]
    lent = tuple(y[1:2] for y in seen[""])
    edit = an_edit(pixels=[(3, 3), (3, 3), (1, 2)], source=(3, 3), cached={"": lent})
    close(layer(x[rows], {"": layer.text(context[rows])}, edit)[1:], wanted)


@pytest.mark.parametrize("pixels", [None, QK_OF_SOURCE], ids=["text", "text and pixels"])
def test_maps_are_those_used(pixels):
    """Formed outside, of queries and keys: the columns of text in the pixels' rows, after the edit."""
    site, edit = Site(), an_edit(pixels=pixels)
    qk = site.qk(edit)
    assert [tuple(x.shape) for x in qk] == [(B, N, HEADS * D), (B, N + L, HEADS * D)]
    after = site_maps(site.layer, qk, edit, torch.arange(B))[1]
    site.v[:, :N] = 0                                                             # what the columns of text bring
    close(joined(after @ split(site.v)[:, :, N:]), site(edit)[:, :N])


def test_edits_by_site_are_of_their_sites_alone():
    site, edit = Site(), an_edit()
    assert torch.equal(site({"": edit}), site(edit)) and torch.equal(site({"other": edit}), site())


@pytest.mark.slow
def test_edit_is_one_graph_for_all_steps():
    import torch._dynamo as dynamo

    graphs, site = [], Site()
    dynamo.reset()
    compiled = torch.compile(site.layer, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True, dynamic=False)
    compiled(site.q, site.k, site.v, N)
    for i in range(4):
        edit = an_edit(rand(2, L, L, seed=i), rand(2, L, seed=i), QK_OF_SOURCE)
        close(compiled(site.q, site.k, site.v, N, edit), site(edit))
    assert len(graphs) == 2
