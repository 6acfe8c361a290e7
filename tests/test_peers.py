"""The speed benchmark's other sides compute what ours does: diffusers' UNet, and the official controllers rewritten on it."""
import pytest
import torch

from benchmarks import peers


@pytest.fixture(scope="module")
def nets():
    """One thread: several share the sums of a row out by the number of rows, and an edit takes its rows apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net = peers.ours(32, torch.device("cpu"), torch.float64)
    yield net, peers.diffusers_on(net)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", peers.KINDS)
def test_the_official_way_gives_our_edit(nets, kind):
    net, theirs = nets
    size = peers.Size(32, 40)   # 1,600 positions on the first level: above 32 x 32, whose self-attention is not injected
    x, t, context = peers.inputs(size, torch.device("cpu"), torch.float64)
    f = peers.formula(kind, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        plain = net(x, t, context)[0]
        edited = net(x, t, net.read(context), edit=peers.as_edit(kind, f))[0]
        official = peers.official(theirs, kind, f)(x, t, context)
        again = theirs(x, t, context).sample
    assert (plain - again).abs().max() < 1e-6 * plain.std()
    assert (edited - official).abs().max() < 1e-6 * plain.std() and (edited - plain)[3].abs().max() > 0.01 * plain.std()
    assert torch.equal(edited[:3], plain[:3])
