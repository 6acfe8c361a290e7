"""What an edit through joint attention costs, in a double and a single block of FLUX at its own width.

1,024 tokens of the picture and 512 of text; a source and a target (distilled guidance: no unconditional rows).

    python -m benchmarks.joint [FILE.json] [--repeats 5] [--threads 2] [--device cpu]

Seconds are medians of all sides in turn in one process; bytes are without the weights.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import in_turn
from p2p.models.attention import AttentionEdit
from p2p.models.mmdit import FLUX_SCHNELL, Flux

SIDE, TEXT = 64, 512   # of the latents, whose patches are of 2 x 2; tokens of T5
TIME = {"text columns": 1.25, "q_i k_i": 1.03, "both": None}   # edit / plain, at most
MEMORY = 1.1


def edits(device: torch.device) -> dict[str, AttentionEdit | None]:
    """The target borrows the source's text columns, one of them weighted; its q and k of the pixels; or both."""
    source = torch.tensor([0], device=device)
    mix, keep = torch.eye(TEXT, device=device)[None], torch.zeros(1, TEXT, device=device)
    mix[:, 2] *= 2
    text = AttentionEdit(source, mix, keep)
    pixels = torch.stack([source, source, source + 1])
    return {"plain": None, "text columns": text, "q_i k_i": AttentionEdit(source, pixels=pixels),
            "both": text._replace(pixels=pixels)}


@torch.no_grad()
def steps(device: torch.device) -> dict[str, Callable[[], object]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = replace(FLUX_SCHNELL, double=1, single=1)
    with torch.device("meta"):
        net = Flux(config)
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=g).mul_(0.7 / max(1, p[0].numel()) ** 0.5).to(device, dtype)
             for name, p in net.state_dict().items()}
    net.load_state_dict(state, strict=True, assign=True)
    net.eval().requires_grad_(False)
    x, text, vector = (torch.randn(2, *shape, generator=g).to(device, dtype) for shape in (
        (config.in_channels, SIDE, SIDE), (TEXT, config.context_dim), (config.vector_dim,)))
    read = net.read(text)
    at = net.times(torch.tensor([500.0], device=device), read, dtype, vector)[0]
    return {name: lambda edit=edit: net(x, at, read, edit=edit)[0] for name, edit in edits(device).items()}


@torch.no_grad()
def peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that a step holds at most beyond its weights and inputs, as the allocator counts them."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(e.nbytes() for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())))


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.joint", description=__doc__.splitlines()[0])
    ap.add_argument("file", nargs="?", type=Path)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args(argv)
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    with torch.no_grad():
        sides = steps(device)
        seconds, bytes_ = in_turn(sides, a.repeats, device), {side: peak(step, device) for side, step in sides.items()}
    print("\n".join(f"{side}: {s:.3f} s, {bytes_[side] / 1e9:.3f} GB" for side, s in seconds.items()))
    rows = [(f"edit step / plain step, {side}", seconds[side] / seconds["plain"], goal) for side, goal in TIME.items()]
    rows += [(f"peak memory, edit / plain, {side}", bytes_[side] / bytes_["plain"], MEMORY) for side in TIME]
    print("\n| measure | measured | goal |\n|---|---|---|")
    for what, value, goal in rows:
        print(f"| {what} | {value:.3f} | {'' if goal is None else goal} |")
    if a.file:
        said = {"device": a.device, "torch": torch.__version__, "seconds": seconds, "bytes": bytes_}
        a.file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
