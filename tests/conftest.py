"""Shared models: the bundled one, and a small Stable Diffusion 1 checkpoint made from the names of its tensors."""
import gc
import json
import math
import os
import resource
import signal
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import p2p
from p2p.models.mmdit import Flux
from p2p.models.unet import UNet
from p2p.weights.convert import convert
from p2p.weights.emoji.world import render, sample
from p2p.weights.load import BUNDLED, find

GOLDEN = Path(__file__).with_name("golden") / "sd1_small"


# ------------------------------------------------------------------------------------------------------------ how tests run

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
with suppress(OSError, ValueError):   # of a container, which may have a share of a machine
    quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    CORES = min(CORES, max(1, quota // period))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist, all tests (no single files) run on all cores, a file to a worker; `-n 0`: in one process."""
    if not hasattr(config.option, "numprocesses") or hasattr(config, "workerinput"):   # a worker starts no others
        return
    if config.option.numprocesses is None and not config.option.usepdb and CORES > 1 and all(map(os.path.isdir, config.args)):
        config.option.numprocesses = min(4, CORES)   # a worker takes up to 2 GB
    if config.option.numprocesses:   # malloc keeps the memory of large tensors, where it would fetch it anew for each
        os.environ.update({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)})
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_configure(config):
    if hasattr(config, "workerinput"):   # workers share the cores, and so do the processes that they start
        share = max(1, CORES // config.workerinput["workercount"])
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)


def pytest_collection_finish():
    """What the imports made stays: the collector need not look through it hundreds of times."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first, so that no worker is left with one when the others are done."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def made_weight(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """The weight that the golden numbers were made with: integers drawn from the tensor's name."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1000003 * seed)
    u = torch.randint(-2048, 2049, tuple(shape), generator=g).float() / 2048
    if len(shape) < 2:
        return (1 + 0.1 * u if name.endswith(".weight") else 0.05 * u).half()
    gain = 1.0
    if "attn2.to_q" in name or "attn2.to_k" in name:
        gain = 3.0
    elif name == "model.diffusion_model.out.2.weight":
        gain = 0.5
    elif "embedding" in name:
        gain = 4.0
    return (u * (gain * math.sqrt(3 * shape[0] / math.prod(shape)))).half()


@pytest.fixture(scope="session")
def golden():
    """(settings, tensors) made by the original code; see tests/golden/README.md."""
    return json.loads(GOLDEN.with_suffix(".json").read_text()), load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="session")
def sd1_tensors(golden):
    meta, _ = golden
    return {n: made_weight(n, s, meta["seed"]) for n, s in meta["shapes"].items()}


@pytest.fixture(scope="session")
def sd1_file(sd1_tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd1") / "small.safetensors"
    save_file(sd1_tensors, path)
    return path


@pytest.fixture(scope="session")
def sd1(sd1_file):
    return p2p.load(sd1_file, family="sd1", device="cpu", dtype=torch.float32)


@pytest.fixture
def undecoded(monkeypatch):
    """For tests of latents alone: no autoencoder makes pictures of them."""
    monkeypatch.setattr(p2p.Model, "decode", lambda model, latents: torch.zeros(len(latents), 3, 8, 8))


@pytest.fixture(scope="session")
def emoji():
    return p2p.load("emoji", device="cpu")


@pytest.fixture(scope="session")
def narrow(emoji):
    """The bundled model with an untrained network, several times as fast: for what holds of any weights. Its maps are about as
    sharp as trained ones, so that an edit changes as much of the picture, and words select a part of it."""
    return replace(emoji, unet=untrained(replace(emoji.unet.config, channels=(32, 32, 32), heads=(1, 2, 2), temb_dim=32)))


@pytest.fixture(scope="session")
def shallow(narrow):
    """The same with two levels: for what takes as long as there are layers."""
    return replace(narrow, unet=untrained(replace(narrow.unet.config, channels=(32, 32), heads=(1, 2), depth=(1, 1),
                                                  down_attention=(None, "cross"), up_attention=(None, "hybrid"))))


def untrained(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config).requires_grad_(False)
    for name, p in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            p *= 3
    return unet.eval()


@pytest.fixture(scope="session")
def models(shallow):
    """Small random networks, for tests of both: of noise, on DDPM's levels, and of a flow's velocity."""
    torch.manual_seed(1)
    flow = p2p.load("emoji-flow", device="cpu")
    net = Flux(replace(flow.unet.config, dim=32, heads=2, double=1, single=1, axes=(4, 6, 6), says="velocity"))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return {"eps": replace(shallow, prediction="eps", clip=None), "flow": replace(flow, unet=net.requires_grad_(False).eval())}


@pytest.fixture(scope="session")
def picture():
    """A small one of the emoji world."""
    return render(sample(1, 5, "held out"), 16)[0]


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """(stage I of DeepFloyd IF, its upscaler), small, as diffusers folders."""
    from deepfloyd_models import saved

    return saved(tmp_path_factory.mktemp("if"))


loaded = cache(p2p.load)


@pytest.fixture(scope="session")
def load_once(narrow):
    """p2p.load, which loads a bundled model once for all tests, that of pictures with the narrow network, and a file every time."""
    real = p2p.load

    def load(source="emoji", *more, **asked):
        if not isinstance(source, str) or source not in BUNDLED:
            return real(source, *more, **asked)
        model = loaded(source, *more, **asked)
        return replace(model, unet=narrow.unet) if source == "emoji" and model.dtype == narrow.dtype else model

    return load


@pytest.fixture
def once(monkeypatch, load_once):
    """For commands."""
    for place in ("p2p.load", "p2p.lists.batch.load", "p2p.lists.work.load"):
        monkeypatch.setattr(place, load_once)


_KEPT = {}


def kept(make, *key):
    """`make()`, once for all files: pytest lets a fixture with parameters go when another one is asked for."""
    if (make.__qualname__, key) not in _KEPT:
        _KEPT[make.__qualname__, key] = make()
    return _KEPT[make.__qualname__, key]


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def made(request, tmp_path_factory):
    """(family, its parts by diffusers, their folder): small, with random weights."""
    def build():
        import families  # diffusers and transformers take seconds to import

        parts = families.build(request.param)
        return request.param, parts, families.save(parts, tmp_path_factory.mktemp(request.param) / "folder", request.param)
    return kept(build, request.param)


@pytest.fixture(scope="session")
def single(made, tmp_path_factory):
    """The same model as a single file."""
    def write():
        path = tmp_path_factory.mktemp("single") / "model.safetensors"
        convert(find(made[2]), path)
        return path
    return kept(write, made[2])


@pytest.fixture(scope="session")
def plain(single):
    """The model of the single file, for tests that only look at it."""
    def read():
        return p2p.load(single, device="cpu", dtype=torch.float32)
    return kept(read, single)


@pytest.fixture
def attended():
    """Signals act as at a terminal, on this process and on those that it starts: `nohup` and a shell's & have some ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_files():
    """A context in which no file grows beyond 100 kB, as on a disk that is full."""
    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited()


@pytest.fixture
def session(narrow):
    """A visit of the page."""
    from p2p.web.session import Session
    from p2p.web.sources import Sources
    return Session(narrow, Sources(narrow))
