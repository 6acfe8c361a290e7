"""Pickled checkpoints that are what they seem: the tensors are those that torch loads, whatever their kind."""
import pickle
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from p2p.weights.files import open_file


def tensors():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=g)
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.uint16,
    )
    return {
        "base": base,
        "view": base[1:3],
        "turned": base.T,
        "strided": base[:, ::2],
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "repeated": torch.arange(7).expand(3, 7),
        "parameter": torch.nn.Parameter(base.clone()),
        "module": torch.nn.Linear(3, 2).state_dict()["weight"],
        **{str(k): base.abs().to(k) for k in kinds},
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_tensors_are_those_that_torch_loads(tmp_path, new, protocol):
    path, want = tmp_path / "m.ckpt", tensors()
    torch.save(
        {"global_step": 875000, "state_dict": want},
        path,
        _use_new_zipfile_serialization=new,
        pickle_protocol=protocol,
    )
    file = open_file(path)
    assert file.metadata == {"global_step": "875000"} and file.shapes == {
        k: tuple(v.shape) for k, v in want.items()
    }
    for key, value in want.items():
        got = file[key]
        assert got.dtype == value.dtype and got.data_ptr() % got.element_size() == 0
        assert torch.equal(*(x.detach().contiguous().flatten().view(torch.uint8) for x in (got, value)))


@pytest.mark.parametrize("new, protocol, numpy_1", [
    *((new, protocol, False) for new in (True, False) for protocol in (2, 3, 4, 5)), (False, 2, True), (False, 3, True)])
def test_what_training_leaves_beside_the_weights_is_passed_over(tmp_path, new, protocol, numpy_1):
    left = {"metric": np.float64(0.5), "step": np.int64(7), "half": np.float16(1), "array": np.arange(3.0), "set": {1, 2},
            "frozen": frozenset({3}), "bytes": b"ab", "none": b"", "more": bytearray(b"c"), "device": torch.device("cpu"),
            "dtype": torch.float16, "size": torch.Size([2, 3]), "complex": 1j, "counted": Counter("aab"), "big": 10**30,
            "lists": defaultdict(list, a=[1]), "nested": OrderedDict(x=(1, [2.5, None, True], {3: "y"}))}
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"a": torch.arange(3)}, **left}, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    if numpy_1:   # its name for the same; an archive would have to be written anew
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert open_file(path)["a"].tolist() == [0, 1, 2]


def test_pytorchs_own_unpickler_is_never_asked(tmp_path, monkeypatch):
    torch.save({"a": torch.arange(3)}, tmp_path / "m.ckpt")
    for owner, function in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch._C, "PyTorchFileReader"),
    ):
        monkeypatch.setattr(owner, function, None)
    assert open_file(tmp_path / "m.ckpt")["a"].tolist() == [0, 1, 2]
