"""Peak memory of a step: an edit against plain sampling, diffusers' plain step, and the official way of editing.

    python -m benchmarks.memory [FILE.json] [--size full] [--device cpu]

Source and target with guidance, four rows; every side in a process of its own, weights counted in, on a CPU
without what the interpreter and its imports hold.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.peers import SIZES, as_edit, diffusers_on, formula, inputs, official, ours

SIDES = ("plain", "edit", "edit, weights in half", "diffusers", "official")


def resident() -> int:
    """Bytes, the most so far in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def peak(side: str, name: str, device: torch.device) -> int:
    """Bytes, after two steps in this process."""
    size, gpu = SIZES[name], device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    peer = side in ("diffusers", "official")
    if peer:
        import diffusers  # noqa: F401
    before = 0 if gpu else resident()
    net = ours(size.width, device, dtype, torch.float16 if side.endswith("half") else dtype)
    x, t, context = inputs(size, device, dtype)
    f = formula("swap", device, dtype)
    edit = as_edit("swap", f) if side.startswith("edit") else None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if peer:
        theirs = diffusers_on(net)
        step = official(theirs, "swap", f) if side == "official" else lambda *given: theirs(*given).sample
    else:
        text = net.read(context)
        step = lambda x, t, _: net(x, t, text, edit=edit)[0]  # noqa: E731
    for _ in range(2):
        step(x, t, context)
    return torch.cuda.max_memory_allocated() if gpu else resident() - before


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    ap.add_argument("file", nargs="?", type=Path)
    ap.add_argument("--size", choices=SIZES, default="full")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)   # a side, in this process: prints its bytes
    a = ap.parse_args(argv)
    if a.one:
        print(peak(a.one, a.size, torch.device(a.device)))
        return
    bytes_ = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", side, "--size", a.size, "--device", a.device]
        bytes_[side] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        print(f"{side}: {bytes_[side] / 1e9:.2f} GB", flush=True)
    rows = [("edit / official way", bytes_["edit"] / bytes_["official"], 0.45 if a.size == "full" else None),
            ("edit / diffusers' plain step", bytes_["edit"] / bytes_["diffusers"], None),
            ("edit / own plain step", bytes_["edit"] / bytes_["plain"], 1.03),
            ("edit with weights in half / edit", bytes_["edit, weights in half"] / bytes_["edit"], None)]
    print("\n| peak memory | measured | goal |\n|---|---|---|")
    for what, value, goal in rows:
        print(f"| {what} | {value:.3f} | {'' if goal is None else goal} |")
    if a.file:
        said = {"size": a.size, "device": a.device, "torch": torch.__version__, "bytes": bytes_}
        a.file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
