"""What an edit costs: against the same network without an edit, against diffusers, and against the official way of editing.

    python -m benchmarks.speed [FILE.json] [--sizes nano-32,nano-64,mid,full] [--repeats 5] [--threads 2] [--device cpu]

All sides run in one process on the same weights, in turn, after their results were compared; figures are ratios of medians.
On a GPU the networks run in bfloat16, and a compiled one joins them.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import p2p
from benchmarks.peers import KINDS, SIZES, TOKENS, as_edit, diffusers_on, formula, inputs, official, ours
from p2p.blend import Blend, local_blend, word_maps
from p2p.lists.batch import Batch, run
from p2p.models.attention import QK, Attention, AttentionEdit
from p2p.models.maps import site_maps
from p2p.models.unet import Time, UNet

SOURCE = "a cat on grass"
SWAP = p2p.Edit("a dog on grass")
WINDOWS = [p2p.Edit("a dog on grass", cross_replace_steps=(0.1, 0.9), self_replace_steps=(0.2, 0.3)),
           p2p.Edit("a big red cat on grass", cross_replace_steps={"default_": 0.5, "cat": (0.2, 1.0)}),
           p2p.Edit(SOURCE, equalizer={"cat": 2.0}, self_replace_steps=0.0)]
COLD = """
import p2p
p2p.edit(p2p.load("emoji", device="cpu"), "a cat on grass", "a dog on grass", steps=1)
"""
AROUND = {"blend": ("LocalBlend / none", 1.02), "recorded": ("16 x 16 maps recorded / not", 1.05),
          "traced": ("second edit / first, queries and keys cached", 0.55),
          "latents": ("second edit / first, latents alone", 0.78)}
Row = tuple[str, float, float | None]   # what, measured, goal (at most)


def in_turn(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, after one call that is not counted; every round runs each once."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, call in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


@torch.no_grad()
def steps(name: str, repeats: int, device: torch.device) -> list[Row]:
    """One step of a source and a target, with guidance: four rows; figures of an edit are the mean of its kinds."""
    size, gpu = SIZES[name], device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    net = ours(size.width, device, dtype)
    theirs = diffusers_on(net)
    x, t, context = inputs(size, device, dtype)
    text = net.read(context)
    at = net.times(t.reshape(1), text, dtype)[0]
    peers, sides = {}, {"diffusers": lambda: theirs(x, t, context).sample, "plain": lambda: net(x, at, text)[0]}
    same = {"diffusers": (sides["plain"](), sides["diffusers"]())}
    for kind in KINDS:
        f = formula(kind, device, dtype)
        edit, way = as_edit(kind, f), official(theirs, kind, f)
        sides[kind] = lambda edit=edit: net(x, at, text, edit=edit)[0]
        peers[f"official {kind}"] = lambda way=way: way(x, t, context)
        same[kind] = sides[kind](), peers[f"official {kind}"]()
    for what, (a, b) in same.items():
        off = ((a - b).abs().max() / b.std()).item()
        if not off < (0.3 if gpu else 1e-3):
            raise SystemExit(f"{name}, {what}: the results differ by {off:.1e} of their standard deviation")
    if gpu:
        compiled = torch.compile(net)
        sides["compiled"] = lambda: compiled(x, at, text, edit=edit)[0]
    if name != "full":
        sides |= around(net, x, at, context, edit)
    m = in_turn(peers | sides, repeats, device)   # what follows the official way waits for the memory that it gave back
    print(f"{name}: " + ", ".join(f"{k} {v:.3f} s" for k, v in m.items()), flush=True)
    one, way = (statistics.mean(m[prefix + k] for k in KINDS) for prefix in ("", "official "))
    rows = [(f"{name}: edit / plain step", one / m["plain"], 1.03),
            (f"{name}: edit / diffusers' plain step", one / m["diffusers"], 0.95 if name == "mid" else None),
            (f"{name}: edit / official way", one / way, None if name == "nano-32" or name == "mid" else 0.40 if gpu else 0.52)]
    rows += [(f"{name}: {what}", m[side] / m[KINDS[-1]], goal) for side, (what, goal) in AROUND.items() if side in m]
    return rows + ([(f"{name}: compiled edit / diffusers' plain step", m["compiled"] / m["diffusers"], 0.75)] if gpu else [])


def around(net: UNet, x: Tensor, at: Time, context: Tensor, edit: AttentionEdit) -> dict[str, Callable[[], object]]:
    """The same step of an edit with more asked of it, and with more known of its source: see AROUND."""
    def step(rows: list[int], edit: AttentionEdit, watch: Sequence[str] = ()) -> Callable[[], tuple[Tensor, dict[str, QK]]]:
        given, read = x[rows], net.read(context[rows])
        return lambda: net(given, at, read, edit=edit, watch=watch)

    def source_at(row: int, last: int) -> AttentionEdit:
        source = torch.full_like(edit.source, row)
        return edit._replace(source=source, pixels=torch.stack([source, source, torch.full_like(source, last)]))

    sites = tuple(site for site in net.text_sites() if net.site_pixels(*x.shape[2:])[site] == 16 * 16)
    small = [site for site in net.text_sites() if net.site_pixels(*x.shape[2:])[site] <= 16 * 16]
    columns = torch.zeros(1, 2, 2, TOKENS, device=x.device)
    columns[:, 0, :, 2] = 1                                                          # a word of each prompt
    blend = Blend((16, 16), columns, torch.full((1, 2), 0.3, device=x.device), torch.zeros(1, device=x.device),
                  torch.zeros(1, dtype=torch.bool, device=x.device), torch.ones_like(x[:1, :1], dtype=torch.bool),
                  torch.zeros(1, dtype=torch.bool, device=x.device), torch.zeros(1, dtype=torch.long, device=x.device),
                  torch.zeros(1, device=x.device), 0, sites)
    everyone, shown = [0, 1, 2, 3], torch.tensor([2, 3], device=x.device)
    reading, recording = step(everyone, edit, sites), step(everyone, edit, small)
    traced = source_at(2, 1)._replace(cached=net(x[2:3], at, context[2:3], watch=[m.site for m in net.layers(Attention)])[1])

    def recorded() -> list[Tensor]:
        return [site_maps(net.get_submodule(site), qk, edit, shown)[1] for site, qk in recording()[1].items()]

    return {"recorded": recorded, "blend": lambda: local_blend(x[2:], word_maps(net, reading()[1], edit, shown, blend), blend, 0),
            "traced": step([1, 3], traced), "latents": step([1, 2, 3], source_at(1, 2))}


def loops(repeats: int, device: torch.device) -> list[Row]:
    """Whole edits by the bundled model, 20 steps, and a source that was traced."""
    model = p2p.load("emoji", device=device)
    common = dict(steps=20, seed=1)
    blend = p2p.Edit(SWAP.prompt, local_blend=p2p.LocalBlend(words=("cat", "dog")))
    traced, latents = (p2p.trace(model, SOURCE, latents_only=only, **common) for only in (False, True))
    m = in_turn({
        "edit": lambda: p2p.edit(model, SOURCE, SWAP, **common), "blend": lambda: p2p.edit(model, SOURCE, blend, **common),
        "recorded": lambda: p2p.edit(model, SOURCE, SWAP, record=p2p.Record(text=16 * 16), **common),
        "traced": lambda: p2p.edit(model, traced, SWAP), "latents": lambda: p2p.edit(model, latents, SWAP),
    }, repeats, device)
    print("loops: " + ", ".join(f"{k} {v:.3f} s" for k, v in m.items()), flush=True)
    return [(f"bundled model, 20 steps: {what}", m[side] / m["edit"], goal) for side, (what, goal) in AROUND.items()]


def counted(device: torch.device) -> list[Row]:
    """Rows of the network over 50 steps, and what torch.compile and a GPU would stumble over in three edits."""
    model = p2p.load("emoji", device=device)
    inverted = p2p.invert(model, torch.zeros(1, 3, 64, 64), SOURCE, method="direct", steps=50)
    first = inverted.rows + p2p.edit(model, inverted, SWAP).rows
    traced = p2p.trace(model, inverted)
    again = p2p.edit(model, traced, SWAP).rows
    return [("direct inversion and edit / published 650 rows", first / 650, 0.31),
            ("the same, a further edit", again / 650, 0.16), *graphs(device)]


def lists(repeats: int, device: torch.device) -> list[Row]:
    """A list of 16 edits against a script that makes the same ones in a loop, both from loading to the last file; eight targets
    of one source against eight edits."""
    swaps = ("cat", "dog"), ("car", "boat"), ("house", "castle"), ("tree", "flower")
    places = "on grass", "on the beach", "in the snow", "at night"
    prompts = [(f"a {a} {place}", f"a {b} {place}") for a, b in swaps for place in places]
    targets = [f"a {thing} on grass" for thing in ("dog", "bear", "bird", "car", "boat", "house", "castle", "tree")]
    model = p2p.load("emoji", device=device)
    with tempfile.TemporaryDirectory() as made:
        jobs = Path(made) / "jobs.jsonl"
        asked = [{"source": a, "targets": [b], "steps": 20, "seed": i} for i, (a, b) in enumerate(prompts)]
        jobs.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")

        def listed() -> None:
            run(Batch(jobs, Path(tempfile.mkdtemp(dir=made)), {"source": "emoji"}, str(device), quiet=True))

        def looped() -> None:
            out, own = Path(tempfile.mkdtemp(dir=made)), p2p.load("emoji", device=device)
            for i, (a, b) in enumerate(prompts):
                for k, image in enumerate(p2p.edit(own, a, b, steps=20, seed=i).images):
                    image.save(out / f"{i}-{k}.png")

        m = in_turn({"list": listed, "loop": looped,
                     "eight": lambda: p2p.edit(model, SOURCE, targets, steps=20, seed=1),
                     "singles": lambda: [p2p.edit(model, SOURCE, t, steps=20, seed=1) for t in targets]}, repeats, device)
    print("lists: " + ", ".join(f"{k} {v:.3f} s" for k, v in m.items()), flush=True)
    return [("a list of 16 edits / a loop over them (0.9 of its pictures a second)", m["list"] / m["loop"], 1 / 0.9),
            ("eight targets at once / eight edits", m["eight"] / m["singles"], 0.62)]


class _Reads(TorchDispatchMode):
    """Counts what takes a number out of a tensor, or a size from its values: each would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def graphs(device: torch.device) -> list[Row]:
    from torch._dynamo.utils import counters

    model = p2p.load("emoji", device=device)

    def edits(steps: int) -> None:
        for e in WINDOWS:
            p2p.edit(model, SOURCE, e, steps=steps, seed=1)

    seen = []
    for count in (10, 50):   # what begins and ends an edit may read: its prompts' tables, the pictures
        with _Reads() as reads:
            edits(count)
        seen.append(sum(reads.seen.values()))
    torch._dynamo.reset()
    counters.clear()
    model = replace(model, compiled=True)
    model.unet.compile(backend="eager")
    edits(50)
    breaks = sum(counters["graph_break"].values())
    return [("graphs beyond the first, over 3 edits of 50 steps with other windows", counters["stats"]["unique_graphs"] - 1, 0),
            ("graph breaks", breaks, 0), ("values that the loop reads back", seen[1] - seen[0], 0)]


def cold(repeats: int) -> list[Row]:
    """A new process: import, load, first step."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD], check=True)
        seconds.append(time.perf_counter() - began)
    return [("cold process to the first step of an edit, s", statistics.median(seconds), 6.0)]


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    ap.add_argument("file", nargs="?", type=Path)
    ap.add_argument("--sizes", default=",".join(SIZES), help="of steps; empty: none")
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--only", default="steps,loops,lists,counted,cold")
    a = ap.parse_args(argv)
    torch.set_num_threads(a.threads)
    device, only = torch.device(a.device), a.only.split(",")
    rows: list[Row] = []
    for name in filter(None, a.sizes.split(",") if "steps" in only else ()):
        rows += steps(name, max(1, a.repeats // 2) if name == "full" else a.repeats, device)
    rows += loops(a.repeats, device) if "loops" in only else []
    rows += lists(a.repeats, device) if "lists" in only else []
    rows += counted(device) if "counted" in only else []
    rows += cold(a.repeats) if "cold" in only else []
    print("\n| measure | measured | goal |\n|---|---|---|")
    for what, value, goal in rows:
        print(f"| {what} | {value:.3g} | {'' if goal is None else f'{goal:g}'} |")
    if a.file:
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"{a.threads} CPU threads"
        a.file.write_text(json.dumps({"where": where, "torch": torch.__version__, "repeats": a.repeats,
                                      "rows": [dict(zip(("measure", "measured", "goal"), r)) for r in rows]}, indent=1) + "\n",
                          encoding="utf-8")


if __name__ == "__main__":
    main()
