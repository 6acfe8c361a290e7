"""The plan of an edit, for tests that drive the network themselves."""
from p2p.denoise import Batch
from p2p.edits import decided, plan
from p2p.edits import tables as decided_tables
from p2p.request.layers import for_network


def tables(source, target, edit, mode, steps, length, schedule_steps=None):
    """The tables of an edit in this mode, with the usual windows in place of those that it leaves open."""
    return decided_tables(source, target, decided(source, target, edit, mode, length), steps, length, schedule_steps)


def planned(model, prompts, edits, steps, batch=None):
    """The plan of an edit of a source and its targets, guided, and that batch."""
    split = [model.tokens(p) for p in prompts]
    made = [tables(split[0], t, for_network(e, model.unet), e.mode, steps, model.length) for e, t in zip(edits, split[1:])]
    batch = batch or Batch(1, len(edits))
    return plan(made, batch, model.device, model.dtype), batch
