"""Shared models: the bundled one, and a small Stable Diffusion 1 checkpoint made from the names of its tensors."""
import json
import math
import resource
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import p2p
from p2p.weights.convert import convert
from p2p.weights.load import find

GOLDEN = Path(__file__).with_name("golden") / "sd1_small"


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


@pytest.fixture(scope="session")
def emoji():
    return p2p.load("emoji", device="cpu")


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def made(request, tmp_path_factory):
    """(family, its parts by diffusers, their folder): small, with random weights."""
    import families  # diffusers and transformers take seconds to import

    parts = families.build(request.param)
    return request.param, parts, families.save(parts, tmp_path_factory.mktemp(request.param) / "folder", request.param)


@pytest.fixture(scope="session")
def single(made, tmp_path_factory):
    """The same model as a single file."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    convert(find(made[2]), path)
    return path


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
