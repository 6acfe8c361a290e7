"""The identity: P' V = attend(q_src, k_src, mix V) + attend(q, k, keep V), for every row of the table."""
import pytest
import torch

from p2p.edits import mix_keep
from p2p.models.attention import (
    AttentionEdit,
    CrossAttention,
    HybridAttention,
    SelfAttention,
    attend,
    attend_probs,
    edited_attend,
    edited_probs,
)
from p2p.models.maps import site_maps

E, HEADS, N, L, D = 3, 2, 20, 11, 8
PIXELS = 7
EVERY = torch.arange(4)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def ingredients(kind):
    """alpha (1, L) with a window of its own for every token, c, M or G, a; as the official controllers have them."""
    g = torch.Generator().manual_seed(1)
    alpha = (torch.rand(1, L, generator=g) < 0.6).double()
    c = torch.ones(L, dtype=torch.float64)
    if "reweight" in kind:
        c = c + 6 * (torch.rand(L, generator=g, dtype=torch.float64) - 0.5)
    a, m = torch.ones(L, dtype=torch.float64), torch.eye(L, dtype=torch.float64)
    if kind.startswith("replace"):
        m = torch.rand(L, L, generator=g, dtype=torch.float64)
    if kind.startswith("refine"):
        a = (torch.rand(L, generator=g) < 0.7).double()
        m = m[:, torch.randint(L, (L,), generator=g)]
    return alpha, c, m, a


def controller(kind, p_src, p, alpha, c, m, a):
    """The official controllers on explicit maps (B, h, N, L): Replace, Refine, Reweight, windows last."""
    r = p_src
    if kind.startswith("replace"):
        r = torch.einsum("bhnw,wl->bhnl", p_src, m)
    if kind.startswith("refine"):
        r = (p_src @ m) * a + p * (1 - a)
    if "reweight" in kind:
        r = r * c
    return r * alpha + p * (1 - alpha)


KINDS = ["replace", "refine", "reweight", "replace, reweight", "refine, reweight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", [0, PIXELS], ids=["cross", "hybrid"])
def test_fused_is_explicit(kind, pixels):
    """Rows of the table in p2p/edits.py, cross and hybrid (pixels stand before the text and stay the row's own)."""
    alpha, c, m, a = ingredients(kind)
    mix, keep = mix_keep(kind.split(",")[0], alpha, c, m, a)
    mix, keep = mix.expand(E, -1, -1), keep.expand(E, -1)
    q, k, v, q_src, k_src = (rand(E, HEADS, n, D, seed=i) for i, n in enumerate((N, pixels + L, pixels + L, N, pixels + L)))
    p, p_src = attend_probs(q, k), attend_probs(q_src, k_src)
    text = controller(kind, p_src[..., pixels:], p[..., pixels:], alpha[0], c, m, a)
    wanted = torch.cat([p[..., :pixels], text], dim=-1)
    assert (edited_probs(p, p_src, mix, keep) - wanted).abs().max() < 1e-12
    assert (edited_attend(q, k, v, q_src, k_src, mix, keep) - wanted @ v).abs().max() < 1e-12


def test_rows_before_the_edited_ones_are_their_own():
    q, k, v = (rand(4, HEADS, n, D, seed=i) for i, n in enumerate((N, L, L)))
    out = edited_attend(q, k, v, q[:2], k[:2], rand(2, L, L), rand(2, L))
    assert torch.equal(out[:2], attend(q, k, v)[:2]) and (out[2:] - attend(q, k, v)[2:]).abs().max() > 1e-3


def test_attend_is_probs_times_values():
    q, k, v = rand(E, HEADS, N, D), rand(E, HEADS, L, D, seed=1), rand(E, HEADS, L, D, seed=2)
    assert (attend(q, k, v) - attend_probs(q, k) @ v).abs().max() < 1e-12
    assert (attend_probs(q, k).sum(-1) - 1).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------ the modules

MODULES = [SelfAttention, CrossAttention, HybridAttention]


class Site:
    """A layer and its inputs: rows 2 and 3 of four are edited from row 1."""

    def __init__(self, kind, dtype=torch.float64):
        torch.manual_seed(0)
        self.layer = (kind(16, HEADS, D) if kind is SelfAttention else kind(16, 12, HEADS, D)).to(dtype)
        self.x, self.context = rand(4, N, 16).to(dtype), rand(4, L, 12).to(dtype)

    def __call__(self, edit=None, rows=EVERY, seen=None):
        x = self.x[rows]
        if isinstance(self.layer, SelfAttention):
            return self.layer(x, edit, seen)
        return self.layer(x, {"": self.layer.text(self.context[rows])}, edit, seen)

    def qk(self, edit=None, rows=EVERY):
        seen = {"": None}
        self(edit, rows, seen)
        return seen[""]

    def maps(self, edit=None, rows=EVERY, mean=False):
        return site_maps(self.layer, self.qk(edit), edit, rows, mean)


def an_edit(mix=None, keep=None, pixels=(1, 1), limit=N, dtype=torch.float64, **more):
    mix = torch.zeros(2, L, L, dtype=dtype) if mix is None else mix
    keep = torch.ones(2, L, dtype=dtype) if keep is None else keep
    return AttentionEdit(torch.tensor([1, 1]), mix, keep, pixels=torch.tensor([pixels, pixels, (2, 3)]),
                         max_pixels=torch.tensor([limit, limit]), **more)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_edit_is_no_edit(kind, dtype):
    """mix = 0, keep = 1 and the own row change nothing; nor do the own maps, injected; and absent fields are no edit."""
    site, tol = Site(kind, dtype), 1e-6 if dtype == torch.float32 else 1e-14
    assert (site(an_edit(pixels=(2, 3), dtype=dtype)) - site()).abs().max() < tol
    assert torch.equal(site(AttentionEdit(torch.tensor([1, 1]))), site())
    rows, eye = torch.tensor([0, 1, 1, 1]), torch.eye(L, dtype=dtype).expand(2, -1, -1)
    own = site(an_edit(mix=eye, keep=torch.zeros(2, L, dtype=dtype), dtype=dtype), rows)
    assert (own - site(rows=rows)).abs().max() < tol


@pytest.mark.parametrize("kind", MODULES)
def test_unedited_rows_do_not_see_the_edit(kind):
    site = Site(kind)
    edited, plain = site(an_edit(mix=rand(2, L, L), keep=rand(2, L))), site()
    assert (edited[:2] - plain[:2]).abs().max() < 1e-14
    assert (edited[2:] - plain[2:]).abs().min(dim=-1).values.max() > 1e-6


@pytest.mark.parametrize("kind", MODULES)
def test_edits_by_site_are_of_their_sites_alone(kind):
    site, edit = Site(kind), an_edit(mix=rand(2, L, L), keep=rand(2, L))
    assert torch.equal(site({"": edit}), site(edit)) and torch.equal(site({"other": edit}), site())


@pytest.mark.parametrize("kind", MODULES)
def test_cached_rows_are_rows_of_the_batch(kind):
    """The source's queries and keys beside the batch, numbered after its last row, edit as the source in it does."""
    site, mix, keep = Site(kind), rand(2, L, L), rand(2, L)
    wanted, rows = site(an_edit(mix=mix, keep=keep))[2:], torch.tensor([0, 2, 3])
    lent = tuple(x[1:2] for x in site.qk())
    edit = AttentionEdit(torch.tensor([3, 3]), mix, keep, pixels=torch.tensor([(3, 3), (3, 3), (1, 2)]),
                         max_pixels=torch.tensor([N, N]), cached={"": lent})
    assert (site(edit, rows)[1:] - wanted).abs().max() < 1e-14
    before, after = site_maps(site.layer, site.qk(edit, rows), edit, torch.tensor([3, 1, 2]))
    for got, want in zip((before, after), site.maps(an_edit(mix=mix, keep=keep), torch.tensor([1, 2, 3]))):
        assert (got - want).abs().max() < 1e-14


@pytest.mark.parametrize("kind", MODULES)
def test_maps_are_those_used(kind):
    """Output = maps . values: maps that are formed outside, of queries and keys, are the ones after the edit."""
    site = Site(kind)
    edit = an_edit(mix=rand(2, L, L), keep=rand(2, L))
    before, after = site.maps(edit)
    assert (before - site.maps()[0]).abs().max() < 1e-14
    layer, split = site.layer, lambda y: y.unflatten(-1, (HEADS, D)).transpose(1, 2)
    if kind is HybridAttention:   # only the text columns come back: compare them with the explicit form
        q, k = split(layer.to_q(site.x)), split(torch.cat([layer.to_k(site.x), layer.add_k_proj(site.context)], dim=1))
        p = attend_probs(q, k)
        wanted = torch.cat([p[:2], edited_probs(p[2:], p[[1, 1]], edit.mix, edit.keep)])[..., -L:]
        assert (after - wanted).abs().max() < 1e-12
        return
    v = split(layer.to_v(site.x if kind is SelfAttention else site.context))
    assert (site(edit) - layer.to_out((after @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [CrossAttention, HybridAttention])
def test_renormalised_rows_sum_to_one(kind):
    """Asked for by row: the row that is asked is P' divided by its sums, the other stays as it was."""
    site, edit = Site(kind), an_edit(mix=rand(2, L, L).abs(), keep=rand(2, L).abs())
    one = edit._replace(renormalise=torch.tensor([True, False]))
    out, plain, maps, before = site(one), site(edit), site.maps(one)[1], site.maps(edit)[1]
    assert torch.equal(out[[0, 1, 3]], plain[[0, 1, 3]]) and torch.equal(maps[[0, 1, 3]], before[[0, 1, 3]])
    if kind is CrossAttention:
        assert (maps[2].sum(-1) - 1).abs().max() < 1e-12
        v = site.layer.to_v(site.context).unflatten(-1, (HEADS, D)).transpose(1, 2)
        assert (out - site.layer.to_out((maps @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-12
    else:
        layer, split = site.layer, lambda x: x.unflatten(-1, (HEADS, D)).transpose(1, 2)
        k, v = (split(torch.cat([of_pixels(site.x), of_text(site.context)], dim=1))
                for of_pixels, of_text in ((layer.to_k, layer.add_k_proj), (layer.to_v, layer.add_v_proj)))
        p = attend_probs(split(layer.to_q(site.x)), k)
        edited = edited_probs(p[2:3], p[edit.source[0]][None], edit.mix[:1], edit.keep[:1])
        edited = edited / edited.sum(-1, keepdim=True)
        assert (maps[2] - edited[0, ..., -L:]).abs().max() < 1e-12
        assert (out[2] - layer.to_out((edited @ v[2:3]).transpose(1, 2).flatten(2))[0]).abs().max() < 1e-12


def test_renormalising_negative_weights_divides_by_the_sum_of_sizes():
    """Row sums of P' may pass through 0; those of P_src |mix| + P diag(|keep|) cannot, and are the same without signs."""
    site, mix = Site(CrossAttention), torch.diag_embed(rand(2, L))               # a reweighting of both signs
    edit = an_edit(mix=mix, keep=torch.zeros(2, L, dtype=mix.dtype), renormalise=torch.tensor([True, True]))
    maps = site.maps(edit)[1]
    assert (maps[2:].abs().sum(-1) - 1).abs().max() < 1e-12
    v = site.layer.to_v(site.context).unflatten(-1, (HEADS, D)).transpose(1, 2)
    assert (site(edit) - site.layer.to_out((maps @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-12


@pytest.mark.parametrize("renormalise", [None, torch.tensor([True, False])], ids=["", "renormalised"])
@pytest.mark.parametrize("kind", [CrossAttention, HybridAttention])
def test_edits_of_the_mean_are_the_mean_of_edits(kind, renormalise):
    """P' is linear in the maps; a row sum is not, so that edits which divide by it are read head by head."""
    site, edit = Site(kind), an_edit(mix=rand(2, L, L), keep=rand(2, L), renormalise=renormalise)
    heads, mean = site.maps(edit)[1], site.maps(edit, mean=True)[1]
    assert mean.shape[1] == (1 if renormalise is None else HEADS)
    assert (mean.mean(1) - heads.mean(1)).abs().max() < 1e-14 and heads.mean(1).std() > 1e-3


def test_self_injection_takes_the_source_rows_map():
    """P_src V: queries and keys of row 1, values of the row itself; not at sites with more pixels than allowed."""
    site = Site(SelfAttention)
    maps = site.maps(an_edit())[1]
    assert torch.equal(maps[2], maps[1]) and torch.equal(maps[3], maps[1]) and not torch.equal(maps[0], maps[1])
    assert (site(an_edit(limit=N - 1)) - site()).abs().max() < 1e-14
    one = an_edit()._replace(max_pixels=torch.tensor([N, N - 1]))
    assert (site(one)[3] - site()[3]).abs().max() < 1e-14 and (site(one)[2] - site()[2]).abs().max() > 1e-3


@pytest.mark.parametrize("everywhere", [True, False])
def test_pixels_in_hybrid_attention_are_borrowed_where_there_is_no_limit(everywhere):
    """Prompt-to-Prompt leaves them alone there; editors that name their sites do not."""
    site = Site(HybridAttention)
    edit = an_edit()._replace(mix=None, keep=None, max_pixels=None if everywhere else torch.tensor([N, N]))
    assert torch.equal(site(edit), site()) != everywhere and torch.equal(site(edit)[:2], site()[:2])


def test_hybrid_attention_is_one_softmax_over_pixels_and_text():
    site = Site(HybridAttention)
    m, x, context, split = site.layer, site.x, site.context, lambda y: y.unflatten(-1, (HEADS, D)).transpose(1, 2)
    scores = torch.cat([split(m.to_q(x)) @ split(m.to_k(x)).mT, split(m.to_q(x)) @ split(m.add_k_proj(context)).mT], dim=-1) * D**-0.5
    values = torch.cat([split(m.to_v(x)), split(m.add_v_proj(context))], dim=-2)
    wanted = m.to_out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    assert (site() - wanted).abs().max() < 1e-12


@pytest.mark.slow
def test_edit_is_one_graph_for_all_steps():
    """Only tensors change from step to step, so a compiled module is traced once without and once with an edit."""
    import torch._dynamo as dynamo

    graphs, site = [], Site(CrossAttention)
    dynamo.reset()
    compiled = torch.compile(site.layer, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True, dynamic=False)
    texts = {"": site.layer.text(site.context)}
    compiled(site.x, texts)
    for i in range(5):
        compiled(site.x, texts, an_edit(mix=rand(2, L, L, seed=i), keep=rand(2, L, seed=i)))
    assert len(graphs) == 2


def test_maps_of_half_precision_are_computed_in_single():
    """Fused attention keeps its logits so: a map that is rounded before its softmax is not what was attended to."""
    layer = CrossAttention(64, 32, heads=2, head_dim=32)
    layer.site = "x"
    g = torch.Generator().manual_seed(0)
    q, k = (4 * torch.randn(2, n, 64, generator=g).bfloat16() for n in (16, 8))
    half, single = (site_maps(layer, pair, None, torch.arange(2))[0] for pair in ((q, k), (q.float(), k.float())))
    assert half.dtype == torch.float32 and torch.equal(half, single)
    pixels = SelfAttention(64, 2, 32)
    assert torch.equal(site_maps(pixels, (q, q), None, torch.arange(2))[0], site_maps(pixels, (q.float(), q.float()), None, torch.arange(2))[0])
