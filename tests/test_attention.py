"""The identity: P' V = attend(q_src, k_src, mix V) + attend(q, k, keep V), for every row of the table."""
import pytest
import torch

from p2p.edits import mix_keep
from p2p.models.attention import (
    AttentionEdit,
    CrossAttention,
    HybridAttention,
    Record,
    SelfAttention,
    TextKV,
    attend,
    attend_probs,
    edited_attend,
    edited_probs,
)

E, HEADS, N, L, D = 3, 2, 20, 11, 8
PIXELS = 7


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


def test_fork_of_the_readme(monkeypatch):
    """Maps formed, edited and multiplied by the values: what an edit that is not linear needs, here with a linear one."""
    class Explicit(HybridAttention):
        def _attend(self, q, k, v, text, edit, record):
            source = self._split(*self._source(edit, q, k))
            q, k, v = self._split(q, k, v)
            p, e = attend_probs(q, k), len(edit.source)
            p = torch.cat([p[:-e], edited_probs(p[-e:], attend_probs(*source), edit.mix, edit.keep)])
            return self._out(p @ v, q.dtype), None

    fused, own = HybridAttention(16, 12, HEADS, D).double(), torch.tensor([2, 3])
    forked = Explicit(16, 12, HEADS, D).double()
    forked.load_state_dict(fused.state_dict())
    edit = AttentionEdit(own - 1, rand(2, L, L), rand(2, L), own, torch.zeros_like(own))
    x, context = rand(4, N, 16), rand(4, L, 12)
    wanted = fused(x, context, edit)[0]
    assert (wanted - fused(x, context)[0])[-2:].abs().min(dim=-1).values.max() > 1e-3
    monkeypatch.setattr(TextKV, "under", lambda self, edit: self)
    assert (forked(x, context, edit)[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", [0, PIXELS], ids=["cross", "hybrid"])
def test_fused_is_explicit(kind, pixels):
    """Rows of the table in DESIGN, cross and hybrid (pixels stand before the text and stay the row's own)."""
    alpha, c, m, a = ingredients(kind)
    mix, keep = mix_keep(kind.split(",")[0], alpha, c, m, a)
    mix, keep = mix.expand(E, -1, -1), keep.expand(E, -1)
    q, k, v, q_src, k_src = (rand(E, HEADS, n, D, seed=i) for i, n in enumerate((N, pixels + L, pixels + L, N, pixels + L)))
    p, p_src = attend_probs(q, k), attend_probs(q_src, k_src)
    text = controller(kind, p_src[..., pixels:], p[..., pixels:], alpha[0], c, m, a)
    wanted = torch.cat([p[..., :pixels], text], dim=-1)
    assert (edited_probs(p, p_src, mix, keep) - wanted).abs().max() < 1e-12
    assert (edited_attend(q, k, v, q_src, k_src, mix, keep) - wanted @ v).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [CrossAttention, HybridAttention])
def test_renormalised_rows_sum_to_one(kind):
    """Asked for by row: the row that is asked is P' divided by its sums, the other stays as it was."""
    module, x, context = module_and_inputs(kind)
    edit = an_edit(mix=rand(2, L, L).abs(), keep=rand(2, L).abs())
    one = edit._replace(renormalise=torch.tensor([True, False]))
    out, maps = module(x, context, one, Record(text=N))
    plain, before = module(x, context, edit, Record(text=N))
    assert torch.equal(out[[0, 1, 3]], plain[[0, 1, 3]]) and torch.equal(maps[[0, 1, 3]], before[[0, 1, 3]])
    if kind is CrossAttention:
        assert (maps[2].sum(-1) - 1).abs().max() < 1e-12
        v = module.to_v(context).unflatten(-1, (HEADS, D)).transpose(1, 2)
        assert (out - module.to_out((maps @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-12
    else:
        scale = plain[2] - module.to_out[0].bias
        assert (scale / (out[2] - module.to_out[0].bias)).std() > 1e-3 and not torch.equal(out[2], plain[2])


def test_renormalising_negative_weights_divides_by_the_sum_of_sizes():
    """Row sums of P' may pass through 0; those of P_src |mix| + P diag(|keep|) cannot, and are the same without signs."""
    module, x, context = module_and_inputs(CrossAttention)
    mix = torch.diag_embed(rand(2, L))               # a reweighting of both signs
    edit = an_edit(mix=mix, keep=torch.zeros(2, L, dtype=mix.dtype))._replace(renormalise=torch.tensor([True, True]))
    out, maps = module(x, context, edit, Record(text=N))
    assert (maps[2:].abs().sum(-1) - 1).abs().max() < 1e-12
    v = module.to_v(context).unflatten(-1, (HEADS, D)).transpose(1, 2)
    assert (out - module.to_out((maps @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_attend_is_probs_times_values():
    q, k, v = rand(E, HEADS, N, D), rand(E, HEADS, L, D, seed=1), rand(E, HEADS, L, D, seed=2)
    assert (attend(q, k, v) - attend_probs(q, k) @ v).abs().max() < 1e-12
    assert (attend_probs(q, k).sum(-1) - 1).abs().max() < 1e-12


MODULES = [SelfAttention, CrossAttention, HybridAttention]


def module_and_inputs(kind, dtype=torch.float64):
    torch.manual_seed(0)
    module = kind(16, 12, HEADS, D).to(dtype)
    return module, rand(4, N, 16).to(dtype), rand(4, L, 12).to(dtype)


def an_edit(mix=None, keep=None, self_source=(1, 1), limit=N, dtype=torch.float64):
    """Rows 2 and 3 of four are edited from row 1."""
    mix = torch.zeros(2, L, L, dtype=dtype) if mix is None else mix
    keep = torch.ones(2, L, dtype=dtype) if keep is None else keep
    return AttentionEdit(torch.tensor([1, 1]), mix, keep, torch.tensor(self_source), torch.tensor([limit, limit]))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_edit_is_no_edit(kind, dtype):
    """mix = 0, keep = 1 and the own row change nothing; nor do the own maps, injected."""
    module, x, context = module_and_inputs(kind, dtype)
    plain, _ = module(x, context)
    same, _ = module(x, context, an_edit(self_source=(2, 3), dtype=dtype))
    assert (same - plain).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)
    eye = torch.eye(L, dtype=dtype).expand(2, -1, -1)
    x, context = x[[0, 1, 1, 1]], context[[0, 1, 1, 1]]
    plain, _ = module(x, context)
    own, _ = module(x, context, an_edit(mix=eye, keep=torch.zeros(2, L, dtype=dtype), dtype=dtype))
    assert (own - plain).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("kind", MODULES)
def test_unedited_rows_do_not_see_the_edit(kind):
    module, x, context = module_and_inputs(kind)
    edited, _ = module(x, context, an_edit(mix=rand(2, L, L), keep=rand(2, L)))
    plain, _ = module(x, context)
    assert (edited[:2] - plain[:2]).abs().max() < 1e-14
    assert (edited[2:] - plain[2:]).abs().min(dim=-1).values.max() > 1e-6


@pytest.mark.parametrize("kind", MODULES)
def test_recorded_maps_are_those_used(kind):
    """Output = maps . values: the returned maps are the ones after the edit, and recording changes no output."""
    module, x, context = module_and_inputs(kind)
    edit = an_edit(mix=rand(2, L, L), keep=rand(2, L))
    out, maps = module(x, context, edit, Record(text=N, pixels=N))
    assert torch.equal(out, module(x, context, edit)[0])
    if kind is HybridAttention:   # only the text columns come back: compare them with the explicit form
        split = lambda y: y.unflatten(-1, (HEADS, D)).transpose(1, 2)  # noqa: E731
        q, k = split(module.to_q(x)), split(torch.cat([module.to_k(x), module.add_k_proj(context)], dim=1))
        p = attend_probs(q, k)
        wanted = torch.cat([p[:2], edited_probs(p[2:], p[[1, 1]], edit.mix, edit.keep)])[..., -L:]
        assert (maps - wanted).abs().max() < 1e-12
        return
    v = module.to_v(x if kind is SelfAttention else context).unflatten(-1, (HEADS, D)).transpose(1, 2)
    wanted = module.to_out((maps @ v).transpose(1, 2).flatten(2))
    assert (out - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("kind", MODULES)
def test_maps_before_the_edit(kind):
    """The edited rows' own maps come after all others, and those are what they are without an edit."""
    module, x, context = module_and_inputs(kind)
    edit = an_edit(mix=rand(2, L, L), keep=rand(2, L))
    _, after = module(x, context, edit, Record(text=N, pixels=N))
    _, both = module(x, context, edit, Record(text=N, pixels=N, before=True))
    _, plain = module(x, context, None, Record(text=N, pixels=N, before=True))
    assert torch.equal(both[:4], after) and (both[4:] - plain[2:]).abs().max() < 1e-14


TABLES = {"source": (rand(2, L, L), torch.zeros(2, L, dtype=torch.float64)),
          "own": (torch.zeros(2, L, L, dtype=torch.float64), torch.ones(2, L, dtype=torch.float64))}


def known_or_not(only, injected, cached=None):
    """The same edit, said beforehand to be what it is, and not."""
    lent = 4 if cached else 1
    edit = an_edit(*TABLES[only], self_source=(lent, lent) if injected else (2, 3))._replace(cached=cached and {"": cached})
    return edit._replace(only=only, injected=N if injected else 0), edit


@pytest.mark.parametrize("lent", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("only, injected", [("source", True), ("source", False), ("own", True), ("own", False)])
@pytest.mark.parametrize("kind", MODULES)
def test_what_is_known_beforehand_changes_no_result(kind, only, injected, lent):
    module, x, context = module_and_inputs(kind)
    other = module(rand(1, N, 16, seed=5), rand(1, L, 12, seed=6), record=Record(queries=True))[1] if lent else None
    sure, unsure = known_or_not(only, injected, other)
    assert ((module(x, context, unsure)[0] - module(x, context)[0]).abs().max() > 1e-3) == (
        injected if kind is SelfAttention else only == "source")
    for record in (Record(), Record(queries=True), Record(text=N, pixels=N), Record(text=N, pixels=N, before=True, rows=3, mean=True)):
        for renormalise in (None, torch.tensor([True, False])):
            a, b = (module(x, context, edit._replace(renormalise=renormalise), record) for edit in (sure, unsure))
            assert (a[0] - b[0]).abs().max() < 1e-14 and type(a[1]) is type(b[1])
            for m, n in zip(*(y[1] if record.queries else [y[1]] for y in (a, b) if y[1] is not None)):
                assert m.shape == n.shape and (m - n).abs().max() < 1e-14
    smaller = sure._replace(injected=N - 1, self_max_tokens=torch.tensor([N - 1, N - 1]))   # this site is too large
    assert torch.equal(module(x, context, smaller)[0], module(x, context, smaller._replace(injected=None, only=None))[0])


@pytest.mark.parametrize("kind, only, rows", [(CrossAttention, "source", [4]), (CrossAttention, "own", [4]), (CrossAttention, None, [4, 2]),
                                              (HybridAttention, "source", [4, 2]), (HybridAttention, "own", [4])])
def test_maps_that_nobody_reads_are_not_attended_to(kind, only, rows, monkeypatch):
    module, x, context = module_and_inputs(kind)
    sure, _ = known_or_not(only or "source", True)
    seen = []
    monkeypatch.setattr("p2p.models.attention.attend", lambda q, k, v: seen.append(len(q)) or attend(q, k, v))
    module(x, context, sure._replace(only=only))
    assert seen == rows


@pytest.mark.parametrize("injected, rows", [(N, 2), (0, 4), (None, 4)])
def test_queries_and_keys_that_nobody_reads_are_not_computed(injected, rows):
    module, x, context = module_and_inputs(SelfAttention)
    seen = []
    for f in (module.to_q, module.to_k):
        f.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    module(x, context, known_or_not("own", injected != 0)[0]._replace(injected=injected))
    assert seen == [rows, rows]


@pytest.mark.parametrize("renormalise", [None, torch.tensor([True, False])], ids=["", "renormalised"])
@pytest.mark.parametrize("kind", [CrossAttention, HybridAttention])
def test_edits_of_the_mean_are_the_mean_of_edits(kind, renormalise):
    """P' is linear in the maps; a row sum is not, so that edits which divide by it are read head by head."""
    module, x, context = module_and_inputs(kind)
    lent = module(x[1:2], context[1:2], record=Record(queries=True))[1]
    for edit in (an_edit(mix=rand(2, L, L), keep=rand(2, L)), an_edit(mix=rand(2, L, L), keep=rand(2, L))._replace(cached={"": lent})):
        edit = edit._replace(renormalise=renormalise)
        for asked in (Record(text=N, before=True), Record(text=N, rows=3)):
            out, heads = module(x, context, edit, asked)
            same, mean = module(x, context, edit, asked._replace(mean=True))
            assert torch.equal(out, same) and mean.shape[1] == (1 if renormalise is None else HEADS)
            assert (mean.mean(1) - heads.mean(1)).abs().max() < 1e-14 and heads.mean(1).std() > 1e-3


def test_record_is_by_size():
    module, x, context = module_and_inputs(CrossAttention)
    assert module(x, context, None, Record(text=N - 1))[1] is None
    assert module(x, context, None, Record(text=N))[1].shape == (4, HEADS, N, L)
    assert module(x, context, None, Record(pixels=N))[1] is None


def test_self_injection_takes_the_source_rows_map():
    """P_src V: queries and keys of row 1, values of the row itself; not at sites with more pixels than allowed."""
    module, x, context = module_and_inputs(SelfAttention)
    _, maps = module(x, context, an_edit(), Record(pixels=N))
    assert torch.equal(maps[2], maps[1]) and torch.equal(maps[3], maps[1]) and not torch.equal(maps[0], maps[1])
    large, _ = module(x, context, an_edit(limit=N - 1))
    assert (large - module(x, context)[0]).abs().max() < 1e-14


def test_hybrid_attention_is_one_softmax_over_pixels_and_text():
    module, x, context = module_and_inputs(HybridAttention)
    split = lambda y: y.unflatten(-1, (HEADS, D)).transpose(1, 2)  # noqa: E731
    scores = torch.cat([split(module.to_q(x)) @ split(module.to_k(x)).mT,
                        split(module.to_q(x)) @ split(module.add_k_proj(context)).mT], dim=-1) * D**-0.5
    values = torch.cat([split(module.to_v(x)), split(module.add_v_proj(context))], dim=-2)
    wanted = module.to_out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    assert (module(x, context)[0] - wanted).abs().max() < 1e-12


def test_edit_is_one_graph_for_all_steps():
    """Only tensors change from step to step, so a compiled module is traced once without and once with an edit."""
    import torch._dynamo as dynamo

    graphs = []
    module, x, context = module_and_inputs(CrossAttention)
    dynamo.reset()
    compiled = torch.compile(module, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True, dynamic=False)
    compiled(x, context)
    for i in range(5):
        compiled(x, context, an_edit(mix=rand(2, L, L, seed=i), keep=rand(2, L, seed=i)))
    assert len(graphs) == 2
