"""T5: recognises it in folders and in single files, and loads it; prompts that were encoded beforehand."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2p.models.t5 import EncodedPrompts, T5Encoder
from p2p.models.text import Tokens
from p2p.weights import fields, sealed
from p2p.weights.detect import Part, count
from p2p.weights.errors import CheckpointError
from p2p.weights.files import Renamed, TensorFile, open_file
from p2p.weights.fill import Made, lies_on, put, read_tensors
from p2p.weights.folder import weights_file
from p2p.weights.keys import Source
from p2p.weights.sizes import read_json
from p2p.weights.untrusted import parse_json

# in transformers 4 and 5
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
PADDING_READ = "its T5 read the padding, as for Stable Diffusion 3 and FLUX"
PADDING_MASKED = "its T5 did not read the padding, as for DeepFloyd IF"
BUCKETS = 32   # of relative positions, in every released T5
MISSING = ("T5 is read by transformers, which is not installed: pip install -e '.[deepfloyd]' in the clone. "
           "(A run may take a file of encoded prompts in its place, as --text.)")
# fields of transformers' config that decide what it computes
DECISIVE = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn",
            "is_gated_act", "relative_attention_num_buckets", "relative_attention_max_distance",
            "layer_norm_epsilon")
SHARED, EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"


def save_prompts(encoded: EncodedPrompts, path: Path) -> None:
    """Writes a .safetensors file. Raises OSError."""
    tokens = [encoded.split[p][:3] for p in encoded.prompts]
    metadata = {"prompts": json.dumps(encoded.prompts), "tokens": json.dumps(tokens)}
    metadata |= {} if encoded.config.masked else {"padding": "read"}
    sealed.save({"prompt_embeds": encoded.embeddings}, path, metadata)


def load_prompts(path: Path) -> EncodedPrompts:
    """The inverse of `save_prompts`. Raises CheckpointError."""
    file = open_file(path)
    try:
        prompts, listed = parse_json(file.metadata["prompts"]), parse_json(file.metadata["tokens"])
        tokens = [Tokens(text, ids, [(a, b) for a, b in spans]) for text, ids, spans in listed]
        embeddings = file["prompt_embeds"]
        sealed.check({"prompt_embeds": embeddings}, file.metadata, ("prompts", "tokens", "padding", "format"))
        _check_prompts(prompts, tokens, embeddings)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a file of encoded prompts ({error}); `p2p encode` writes one."
                              ) from None
    return EncodedPrompts(prompts, tokens, embeddings, file.metadata.get("padding") != "read")


def _check_prompts(prompts: list[str], tokens: list[Tokens], embeddings: Tensor) -> None:
    """Raises ValueError or TypeError."""
    wide = embeddings.is_floating_point() and embeddings.dtype.itemsize > 1   # no fp8
    if embeddings.ndim != 3 or not wide or not embeddings.numel():
        raise ValueError(f"its embeddings are {embeddings.dtype} of the shape {list(embeddings.shape)}")
    if not len(prompts) == len(tokens) == len(embeddings):
        raise ValueError(f"{len(prompts)} prompts, {len(tokens)} splits and {len(embeddings)} embeddings")
    if not torch.stack(embeddings.aminmax()).isfinite().all():
        raise ValueError("its embeddings are not finite")
    texts = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
    if not texts or len(set(prompts)) < len(prompts):
        raise ValueError("its prompts are not texts, each there once")
    if not all(isinstance(t.text, str) for t in tokens):
        raise TypeError("its tokens are of no text")
    for prompt, (text, ids, spans, _) in zip(prompts, tokens):
        valid = all(type(n) is int and n >= 0 for n in (*ids, *(n for span in spans for n in span)))
        if not valid or len(ids) != len(spans) or not all(a <= b <= len(text) for a, b in spans):
            raise ValueError(f"the tokens of {prompt[:80]!r} do not fit their text")


# -------------------------------------------------------------------------------------- T5 and its tokenizer

def in_folder(folder: Path) -> str | None:
    """The end of the names of T5's folders in that of a model: "" (text_encoder, tokenizer), "_2" or "_3";
    None where there is no T5. Raises CheckpointError."""
    for suffix in ("", "_2", "_3"):
        config = folder / f"text_encoder{suffix}" / "config.json"
        if config.exists() and str(read_json(config).get("model_type", "t5")) == "t5":
            return suffix
    return None


def has_tokenizer(folder: Path, suffix: str) -> bool:
    """Whether there is one, and not CLIP's."""
    where = folder / f"tokenizer{suffix}"
    return any((where / name).exists() for name in ("tokenizer.json", "spiece.model")) \
        and not (where / "merges.txt").exists()


def in_file(file: TensorFile, prefix: str) -> Part | None:
    """T5 under transformers' names in a file, with its config by shapes; its heads are those of its
    positions. Raises CheckpointError."""
    layers = count(file.shapes, f"{prefix}encoder.block.")
    if not layers:
        return None
    attention, feed = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."

    def matrix(name: str, needed: str = "a matrix", rows: int | None = None) -> tuple[int, ...]:
        shape = file.shapes.get(prefix + name)
        if shape is None or len(shape) != 2 or not all(shape) or rows not in (None, shape[0]):
            found = "missing" if shape is None else list(shape)
            raise CheckpointError(f"{file.path}: T5's {prefix}{name} is {found}; expected: {needed}.")
        return shape

    embedding = next((name for name in (SHARED, EMBEDDING) if prefix + name in file.shapes), SHARED)
    words = matrix(embedding, "a row for each word")[0]
    # no other tensor tells how many positions there should be
    heads = matrix(f"{attention}relative_attention_bias.weight", f"{BUCKETS} positions of each head",
                   BUCKETS)[1]
    inner, width = matrix(f"{attention}q.weight", f"a row for each channel of {heads} heads")
    if inner % heads:
        raise CheckpointError(f"{file.path}: T5's {prefix}{attention}q.weight has {inner} rows, for {heads} "
                              "heads.")
    gated = prefix + f"{feed}wi.weight" not in file.shapes   # if neither is there, too
    config = {"vocab_size": words, "d_model": width, "d_kv": inner // heads, "num_heads": heads,
              "d_ff": matrix(f"{feed}{'wi_0' if gated else 'wi'}.weight")[0], "num_layers": layers,
              "relative_attention_num_buckets": BUCKETS,
              "feed_forward_proj": "gated-gelu" if gated else "relu"}
    return Part(file, prefix, "own", config)


def find_t5(folder: Path, suffix: str, notes: list[str],
            opened: Callable[[Path, list[str]], TensorFile] = weights_file) -> Part:
    """T5 in the folder of a model, with its config as transformers reads it. opened: gives its weights.
    Raises CheckpointError."""
    return Part(opened(folder / f"text_encoder{suffix}", notes), "", "own", _config(folder, suffix))


def load_t5(folder: Path, device: torch.device, dtype: torch.dtype, length: int = 77,
            masked: bool = True) -> T5Encoder:
    """Loads T5 from the folder of a model: transformers' network and tokenizer, our reader. length, masked:
    see `T5Encoder`. Raises CheckpointError."""
    suffix, config = in_folder(folder) or "", folder / "text_encoder" / "config.json"
    clip = config.exists() and str(read_json(config).get("model_type", "")).startswith("clip")
    if not suffix and (clip or not config.parent.is_dir()):
        raise CheckpointError(f"{folder}: " + ("no T5 there (text_encoder, _2 or _3)." if folder.exists()
                                               else "no such folder."))
    part = find_t5(folder, suffix, [])
    return load_part(part, tokenizer_of(part, folder, suffix), device, dtype, length, masked)


def load_part(part: Part, tokenizer: Any, device: torch.device, dtype: torch.dtype, length: int,
              masked: bool) -> T5Encoder:
    """Loads T5 from a part. tokenizer: see `tokenizer_of`. Raises CheckpointError."""
    tower = empty_network(part)
    _fill(tower, part, device, dtype)
    return T5Encoder(tower.eval(), tokenizer, length, masked)


def tokenizer_of(part: Part, folder: Path, suffix: str) -> Any:
    """The tokenizer of a part, from the folder of a model. Raises CheckpointError."""
    return read_tokenizer(folder, suffix, empty_network(part).config.vocab_size)


def read_tokenizer(folder: Path, suffix: str, known: int) -> Any:
    """transformers' (fast) tokenizer in a model's folder. known: words of the network. Raises
    CheckpointError."""
    _check_code(folder, suffix)
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}", use_fast=True,
                                                  trust_remote_code=False, local_files_only=True)
        _check_tokenizer(tokenizer, known)
    except ImportError:
        raise CheckpointError(f"{folder}: {MISSING}") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:   # of transformers or tokenizers, whose panics are no Exceptions
        raise CheckpointError(f"{folder}: T5's tokenizer cannot be read ({type(error).__name__}: {error})."
                              ) from None
    return tokenizer


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of the T5 in a model's folder. Raises CheckpointError."""
    if (suffix := in_folder(folder)) is None or not has_tokenizer(folder, suffix):
        raise CheckpointError(f"{folder}: no T5 with a tokenizer there (text_encoder, _2 or _3).")
    return read_tokenizer(folder, suffix, _config(folder, suffix).get("vocab_size", 32128))


def _check_code(folder: Path, suffix: str) -> None:
    """Raises CheckpointError where a config asks for other code."""
    for where in (folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"):
        for file in where.glob("*config.json"):
            other = read_json(file)
            if "auto_map" in other or other.get("tokenizer_class") not in (None, *TOKENIZERS):
                raise CheckpointError(f"{file}: asks for code that is not T5's; only classes of transformers "
                                      f"are used: {', '.join(TOKENIZERS)}, and no auto_map.")


def _config(folder: Path, suffix: str) -> dict[str, Any]:
    """The config of the network in a folder. Raises CheckpointError."""
    path = folder / f"text_encoder{suffix}" / "config.json"
    config = read_json(path)
    _check_code(folder, suffix)
    fields.check(path, config, fields.T5)
    buckets = config.get("relative_attention_num_buckets", 32)
    farthest = config.get("relative_attention_max_distance", 128)
    # half of them are for each direction, half of these for single positions
    if not (isinstance(buckets, int) and isinstance(farthest, int) and 4 <= buckets < 4 * farthest):
        raise CheckpointError(f"{path}: no T5 has {fields.short(buckets)} buckets for positions of which "
                              f"{fields.short(farthest)} is the farthest.")
    return config


def _check_tokenizer(tokenizer: Any, known: int) -> None:
    """Raises ValueError unless the tokenizer has what `T5Encoder` reads, and the network knows all of its
    tokens."""
    if not tokenizer.is_fast:
        raise ValueError("it does not say where tokens stand in their text; a fast one is needed")
    if None in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        raise ValueError("it has no token for padding, or none for what is unknown")
    if (most := max(tokenizer.get_vocab().values())) >= known:
        raise ValueError(f"it has the token {most}, of a network that knows {known}")


def empty_network(part: Part) -> nn.Module:
    """transformers' network of a part's config, without memory. Raises CheckpointError."""
    where = part.file.path
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError:
        raise CheckpointError(f"{where}: {MISSING}") from None
    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config.from_dict(part.config))
    except Exception as error:   # of transformers; they vary from release to release
        raise CheckpointError(f"{where}: no T5 has its config ({type(error).__name__}: {error}).") from None


def encoder_tensors(part: Part, tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the encoder under transformers' names, one at a time, the words' embedding among them.
    Raises CheckpointError naming what does not fit."""
    # the embedding is one tensor, under either name or both
    names = {k.removeprefix(part.prefix): k for k in part.file.shapes if k.startswith(part.prefix)}
    if SHARED in names:
        names[EMBEDDING] = names[SHARED]
    encoder = Part(Renamed(part.file, names), "encoder.", "own", None)
    for name, tensor in read_tensors(encoder, lambda _: tower.encoder, "T5"):
        yield f"encoder.{name}", tensor


def _fill(tower: nn.Module, part: Part, device: torch.device, dtype: torch.dtype) -> None:
    """Puts every tensor of the encoder in its place; those that are in use elsewhere stay the same memory, as
    in `fill`. Raises CheckpointError."""
    state, made = {}, {}
    for name, tensor in encoder_tensors(part, tower):
        # transformers keeps these in float32 too: their outputs overflow float16
        keep_float32 = dtype == torch.float16 and name.endswith(".wo.weight")
        wanted = torch.float32 if keep_float32 else dtype
        for place in (name, SHARED) if name == EMBEDDING else (name,):
            if part.file.shared and lies_on(tensor, device) and tensor.dtype.itemsize < wanted.itemsize:
                made[place] = Made([tensor], Source((name,)), tensor.shape, wanted)
            else:
                state[place] = tensor.to(device, wanted)
    put(tower, state, made)
    if EMBEDDING in state:
        tower.tie_weights()
