"""Inversions from files: what was changed in them is named before anything is computed."""

import base64
import io
import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import p2p
from p2p import UsageError
from p2p.cli.output import Output
from p2p.request.source import METHODS, Inversion
from p2p.weights import sealed

T, C, H, W = 3, 3, 8, 8
PICTURE = Image.new("RGB", (W, H), "red")


CALLS = {"rf-solver": 2 * T, "fireflow": T + 1}   # where an edit does not ask the network once a step
OWN = {"rf-inversion": {"gamma": 0.5, "control": 0.9, "control_steps": 0.25}, "flow-edit": {"n_avg": 1, "n_min": 0}}
OFFSET = ("edit-friendly", "flow-edit", "ddcm", "turbo-edit")


def inversion(method="edit-friendly", **changed):
    """A small one, complete, of a model that maps pixels to pixels."""
    n = CALLS.get(method, T)
    return replace(
        Inversion(
            "a cat",
            method,
            torch.randn(n + 1, C, H, W),
            4,
            1,
            7.5,
            1.0,
            None,
            1.0 if method in ("edit-friendly", "turbo-edit") else 0.0,
            0,
            "emoji",
            "x0",
            "0" * 64,
            7,
            torch.randn(T, 77, 5) if method == "null-text" else None,
            torch.randn(T, C, H, W) if method in OFFSET else None,
            PICTURE,
        ),
        **(OWN.get(method, {}) | changed),
    )


def read(path):
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["inversion"]), {k: f.get_tensor(k) for k in f.keys()}


def refused(path, said):
    began = time.process_time()
    with pytest.raises(UsageError, match=said) as error:
        Inversion.load(path)
    message = str(error.value)
    assert (
        str(path) in message
        and len(message) < 800
        and message.isprintable()
        and time.process_time() - began < 5
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_loaded(tmp_path, method):
    want = inversion(method)
    want.save(tmp_path / "i.safetensors")
    got = Inversion.load(tmp_path / "i.safetensors")
    assert got.settings() == want.settings() and torch.equal(got.latents, want.latents)
    assert got.picture.tobytes() == PICTURE.tobytes()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 7   # of a letter: another letter
    path.write_bytes(data)


@pytest.mark.parametrize("method", ["ddim", "null-text", "edit-friendly"])
def test_one_bit_that_flips_anywhere_in_an_inversion_is_noticed(tmp_path, method):
    path, want = tmp_path / "i.safetensors", inversion(method)
    want.save(path)
    size, head = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes().index(b"a cat")
    for at in {text, head, size - 1, *range(head, size, size // 40)}:
        flip(path, at)
        refused(path, "changed or damaged after it was saved")
        flip(path, at)
    name = path.read_bytes().index(b'"seal":')
    for at in range(name + 1, name + 5):
        flip(path, at)
        refused(path, "its metadata hold '.*', which no such file has")
        flip(path, at)
    assert Inversion.load(path).settings() == want.settings()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_seal_covers_names_types_shapes_values_and_metadata(tmp_path, dtype):
    sealed.save({"a": torch.ones(2, 3, dtype=dtype)}, tmp_path / "s.safetensors", {"k": "v"})
    with safe_open(tmp_path / "s.safetensors", "pt") as f:
        said, a = f.metadata(), f.get_tensor("a")
    sealed.check({"a": a}, said, ("k",))
    sealed.check({"a": a + 1}, {"k": "v"}, ("k",))   # of another program: no seal
    for tensors, metadata in (({"b": a}, said), ({"a": a.mT}, said), ({"a": a + 1}, said), ({"a": a.int()}, said),
                              ({"a": a, "b": a}, said), ({"a": a}, said | {"k": "w"}), ({}, said)):
        with pytest.raises(ValueError, match="changed or damaged"):
            sealed.check(tensors, metadata, ("k",))


FIELDS = {
    "prompt": [3, None, ["a"], {"a": 1}],
    "method": ["magic", 3, None, ["ddim"], "noise", "null-text", "direct", "ddim"],
    "steps": [0, -4, 4.0, "4", None, True, 5, 10**30, [4]],
    "skip": [0, 2, 4, -1, 0.5, "1", None, True],
    "guidance_scale": ["7", None, [7], True, 10**400],
    "inversion_guidance": ["x", None],
    "inner_steps": [0, -1, 1.5, "3", []],
    "eta": [0.0, 2, -1, "1", None],
    "seed": [0.5, "x", 2**64, [0]], "final_alpha": [0, 1.5, "1", [1]],
    "family": [1, None],
    "prediction": [None, []],
    "sha256": [3, [1]],
    "rows": [-1, 0.5, None],
    "picture": [3, "", "no base64!", "AAAA", ["x"], {"a": 1}],
    "colour": ["red"],
    "latents": [[1, 2]],
    "notes": ["x"],
    "bad\x1b[2Jname": [1],
}


@pytest.mark.parametrize(
    "field, value", [(k, v) for k, vs in FIELDS.items() for v in vs], ids=lambda x: repr(x)[:20]
)
def test_fields_that_somebody_changed(tmp_path, field, value):
    inversion().save(tmp_path / "i.safetensors")
    said, tensors = read(tmp_path / "i.safetensors")
    save_file(tensors, tmp_path / "i.safetensors", {"inversion": json.dumps(said | {field: value})})
    refused(tmp_path / "i.safetensors", "not an inversion|its picture is damaged")


@pytest.mark.parametrize("field", ["prompt", "method", "steps", "skip", "guidance_scale", "seed", "eta"])
def test_fields_that_somebody_left_out(tmp_path, field):
    inversion().save(tmp_path / "i.safetensors")
    said, tensors = read(tmp_path / "i.safetensors")
    del said[field]
    save_file(tensors, tmp_path / "i.safetensors", {"inversion": json.dumps(said)})
    refused(tmp_path / "i.safetensors", f"not an inversion.*{field}")


def nan(x):
    return x.clone().index_fill_(0, torch.tensor(1), float("nan"))


TENSORS = {  # method, what somebody did to its tensors, what is said
    "latents cut": (
        "ddim",
        lambda t: t.update(latents=t["latents"][:2]),
        r"latents are float32 of \(2, 3, 8, 8\)",
    ),
    "latents without steps": ("ddim", lambda t: t.update(latents=t["latents"][:0].clone()), "latents are"),
    "flat latents": ("ddim", lambda t: t.update(latents=t["latents"].flatten()), "latents are"),
    "latents of integers": ("ddim", lambda t: t.update(latents=t["latents"].long()), "latents are int64"),
    "latents of halves": ("ddim", lambda t: t.update(latents=t["latents"].half()), "latents are float16"),
    "latents of complex numbers": (
        "ddim",
        lambda t: t.update(latents=t["latents"].to(torch.complex64)),
        "latents are complex64",
    ),
    "latents of NaN": (
        "ddim",
        lambda t: t.update(latents=nan(t["latents"])),
        "latents: values that are not finite",
    ),
    "infinite latents": (
        "ddim",
        lambda t: t.update(latents=t["latents"] / 0),
        "latents: values that are not finite",
    ),
    "no latents": ("ddim", lambda t: t.update(other=t.pop("latents")), "other belongs to none"),
    "latents of another size": (
        "edit-friendly",
        lambda t: t.update(latents=torch.zeros(T + 1, C, H, 16)),
        "offsets are",
    ),
    "latents of no width": (
        "noise",
        lambda t: t.update(latents=torch.zeros(T + 1, C, H, 0)),
        "picture is damaged",
    ),
    "another picture's latents": (
        "noise",
        lambda t: t.update(latents=torch.zeros(T + 1, C, 5, 7)),
        "picture is damaged",
    ),
    "no offsets": ("edit-friendly", lambda t: t.pop("offsets"), "offsets: missing"),
    "offsets cut": ("edit-friendly", lambda t: t.update(offsets=t["offsets"][1:]), "offsets are"),
    "offsets to be broadcast": (
        "edit-friendly",
        lambda t: t.update(offsets=torch.zeros(T, 1, 1, 1)),
        "offsets are",
    ),
    "offsets of integers": (
        "edit-friendly",
        lambda t: t.update(offsets=t["offsets"].int()),
        "offsets are int32",
    ),
    "offsets of NaN": (
        "edit-friendly",
        lambda t: t.update(offsets=nan(t["offsets"])),
        "offsets: values that are not finite",
    ),
    "strange offsets": ("direct", lambda t: t.update(offsets=torch.zeros(T, C, H, W)), "offsets: there"),
    "no null context": ("null-text", lambda t: t.pop("null_context"), "null_context: missing"),
    "null context cut": (
        "null-text",
        lambda t: t.update(null_context=t["null_context"][:1]),
        "null_context are",
    ),
    "flat null context": (
        "null-text",
        lambda t: t.update(null_context=t["null_context"][:, 0].clone()),
        "null_context are",
    ),
    "null context of NaN": (
        "null-text",
        lambda t: t.update(null_context=nan(t["null_context"])),
        "null_context: values",
    ),
    "strange null context": (
        "negative-prompt",
        lambda t: t.update(null_context=torch.zeros(T, 7, 5)),
        "null_context: there",
    ),
    "a traced sampler": ("ddim", lambda t: t.update({"queries.a.q": torch.zeros(T, 4, 4)}), "it is traced"),
    "queries cut": (
        "direct",
        lambda t: t.update({"queries.a.q": torch.zeros(T - 1, 4, 4)}),
        "a.q is float32",
    ),
    "flat queries": ("direct", lambda t: t.update({"queries.a.q": torch.zeros(T)}), "a.q is float32"),
    "queries of integers": (
        "direct",
        lambda t: t.update({"queries.a.q": torch.zeros(T, 4, 4).int()}),
        "a.q is int32",
    ),
    "queries of NaN": (
        "direct",
        lambda t: t.update({"queries.a.q": nan(torch.zeros(T, 4, 4))}),
        "a.q: values",
    ),
    "another tensor": ("direct", lambda t: t.update({"\x1b[2Jevil": torch.zeros(1)}), "evil belongs to none"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_somebody_changed(tmp_path, case):
    method, change, said = TENSORS[case]
    inversion(method).save(tmp_path / "i.safetensors")
    settings, tensors = read(tmp_path / "i.safetensors")
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        tmp_path / "i.safetensors",
        {"inversion": json.dumps(settings)},
    )
    refused(tmp_path / "i.safetensors", said)


def other_picture(size=(W, H), form="PNG"):
    out = io.BytesIO()
    Image.new("RGB", size).save(out, form)
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
    "picture",
    [
        other_picture((16, 8)),
        other_picture((9, 9)),
        other_picture((2000, 2000)),
        other_picture(form="BMP"),
        other_picture(form="GIF"),
        other_picture()[:60],
        base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n").decode(),
    ],
)
def test_pictures_that_somebody_changed(tmp_path, picture):
    inversion("ddim").save(tmp_path / "i.safetensors")
    said, tensors = read(tmp_path / "i.safetensors")
    save_file(tensors, tmp_path / "i.safetensors", {"inversion": json.dumps(said | {"picture": picture})})
    refused(tmp_path / "i.safetensors", "its picture is damaged")


@pytest.mark.slow
def test_what_fits_no_model_is_refused_with_one(emoji, tmp_path):
    made = p2p.invert(emoji, torch.zeros(1, 3, 16, 16), "a cat", method="null-text", steps=2, inner_steps=1)
    for field, value, said in (
        ("null_context", torch.zeros(2, 4, 4), "null_context is .* this model's text has"),
        ("latents", torch.zeros(3, 4, 16, 16), "latents have the shape"),
        ("latents", torch.zeros(3, 3, 15, 16), "must be a positive multiple"),
    ):
        with pytest.raises(UsageError, match=said):
            p2p.edit(emoji, replace(made, **{field: value}), "a dog")
    traced = p2p.trace(emoji, p2p.invert(emoji, torch.zeros(1, 3, 16, 16), "a cat", method="direct", steps=2))
    first = next(iter(traced.queries))
    for queries in (
        {k: v for k, v in traced.queries.items() if k != first},
        traced.queries | {"x.q": torch.zeros(2, 4, 4)},
        traced.queries | {first: traced.queries[first][:, :1]},
        traced.queries | {first: traced.queries[first][..., :1]},
    ):
        with pytest.raises(UsageError, match="its queries are not those of this model at its size"):
            p2p.edit(emoji, replace(traced, queries=queries), "a dog")


def test_a_full_disk_is_the_folders_fault(tmp_path, monkeypatch, small_files):
    """safetensors raises an error of its own: the one that `Output` knows is made of it."""
    out = Output(tmp_path, "x")
    out.add("inversion.safetensors", inversion(latents=torch.zeros(T + 1, C, 128, 128)).save)
    with small_files, pytest.raises(UsageError, match="cannot be written .*File too large"):
        out.write()
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_file(narrow, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("p2p.weights.sealed.save_file", full)
    inverted = p2p.invert(narrow, torch.zeros(1, 3, 64, 64), "a cat", method="noise", steps=1)
    with pytest.raises(OSError, match="No space left"):
        inverted.save(tmp_path / "i.safetensors")
    assert not any(tmp_path.iterdir())
