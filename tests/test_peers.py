"""The speed benchmark's other sides compute what ours does: diffusers' UNet, and the official controllers rewritten on it."""
import pytest
import torch

from benchmarks import peers

SIZE = peers.Size(32, 33)   # 1,089 positions on the first level: above 32 x 32, whose self-attention is not injected


@pytest.fixture(scope="module")
def nets():
    """One thread: several share the sums of a row out by the number of rows, and an edit takes its rows apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = peers.ours(32, torch.device("cpu"), torch.float64)
    theirs, given = peers.diffusers_on(net), peers.inputs(SIZE, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        plain, again = net(*given)[0], theirs(*given).sample
    yield net, theirs, given, plain, again
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_diffusers_on_the_same_weights_gives_our_step(nets):
    *_, plain, again = nets
    assert (plain - again).abs().max() < 1e-6 * plain.std()


@pytest.mark.slow
@pytest.mark.parametrize("kind", peers.KINDS)
def test_the_official_way_gives_our_edit(nets, kind):
    net, theirs, (x, t, context), plain, _ = nets
    f = peers.formula(kind, torch.device("cpu"), torch.float64)
    edit = peers.as_edit(kind, f)
    with torch.no_grad():
        edited = net(x, t, net.read(context), edit=edit)[0]
        official = peers.official(theirs, kind, f)(x, t, context)
    assert (edited - official).abs().max() < 1e-6 * plain.std() and (edited - plain)[3].abs().max() > 0.01 * plain.std()
    assert torch.equal(edited[:3], plain[:3])                        # the same operations on as many rows: the same bits
