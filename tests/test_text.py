"""The text tower and the tokenizer are open_clip's, without what the import of open_clip brings along."""
from dataclasses import replace

import open_clip
import pytest
import torch

from p2p.models import text
from p2p.models.text import CLIP_L, OPENCLIP_G, TextEncoder

SMALL = dict(width=64, heads=4, layers=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [replace(CLIP_L, **SMALL), replace(OPENCLIP_G, **SMALL, pooled_dim=48)], ids=["CLIP-L", "OpenCLIP-G"])
def test_the_tower_is_that_of_open_clip_to_the_bit(config, dtype):
    ours = TextEncoder(config)
    act = open_clip.transformer.QuickGELU if config.quick_gelu else torch.nn.GELU
    theirs = open_clip.transformer.TextTransformer(**SMALL, output_dim=config.pooled_dim or 0, act_layer=act)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    ids = ours.tokenize(["a cat riding a bicycle", ""])
    with torch.no_grad():
        context, pooled = ours.encode(ids)
        found = theirs.forward_intermediates(ids, indices=[2 - config.skip], normalize_intermediates=config.final_norm, output_fmt="NLC")
    assert torch.equal(context, found["text_intermediates"][0])
    assert config.pooled_dim is None or torch.equal(pooled, found["text_features"])


@pytest.mark.slow
def test_the_tokenizer_is_that_of_open_clip(monkeypatch):
    """Also where its file does not stand alone."""
    ours, theirs = text.tokenizer(), open_clip.tokenizer.SimpleTokenizer()
    assert type(ours) is not type(theirs) and ours.encoder == theirs.encoder and ours.bpe_ranks == theirs.bpe_ranks
    for prompt in ("A cat, riding a bicycle!", "don’t &amp; naïve  猫", ""):
        assert ours.encode(prompt) == theirs.encode(prompt)

    def nested(self, module):
        raise ImportError("attempted relative import with no known parent package")

    monkeypatch.setattr(text.SourceFileLoader, "exec_module", nested)
    assert type(text.tokenizer.__wrapped__()) is type(theirs)
