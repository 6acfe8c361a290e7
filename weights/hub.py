"""Downloads models from the Hugging Face Hub: only the files that are needed, and never code."""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from p2p.weights.errors import CheckpointError
from p2p.weights.files import PICKLES, weight_map
from p2p.weights.folder import AVERAGED, candidates
from p2p.weights.tokenizer import CONFIGS, VOCABULARIES

COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# read where they exist
BESIDE = ("scheduler/scheduler_config.json", "image_noising_scheduler/scheduler_config.json",
          f"{AVERAGED}/config.json",
          *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2", "tokenizer_3")
            for name in (*CONFIGS, *VOCABULARIES, "spiece.model")))   # the last one is T5's
_ID = re.compile(r"[a-z0-9][\w.-]*/[\w.-]+", re.ASCII | re.I)
_NO_ID = re.compile(r"--|\.\.|/[-.]|[-.](/|$)|\.git$")   # nor do the Hub's names hold these


def cached_name(path: Path) -> str | None:
    """The folder of the repository, in the Hub's cache, that a path lies in, which says its name."""
    return next((p.name for p in (path, *path.parents) if p.name.startswith("models--")), None)


def is_id(source: str) -> bool:
    """"org/name", and not what looks like the path of a file that is not there."""
    a_file = source.lower().endswith((".safetensors", *PICKLES))
    return bool(_ID.fullmatch(source)) and not _NO_ID.search(source) and not a_file


def download(repo: str, ema: bool = False) -> Path:
    """The folder (or single file) of a model in the local cache, completed from the Hub where it can be
    reached. ema: of a folder the averaged UNet, in place of the plain one.

    Respects HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN. Raises CheckpointError for models that are
    gated, missing, or neither reachable nor cached.
    """
    return _download(repo, partial(_fetch, ema=ema))


def download_vae(repo: str) -> Path:
    """The folder (or single file) of an autoencoder, as `download`: from its own repository, or only that
    part of a model's."""
    return _download(repo, _fetch_vae)


def _download(repo: str, fetch: Callable[[str, list[str]], Path]) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    gated = CheckpointError(f"{repo}: gated. Accept its licence on its page on the Hub, then log in (`hf "
                            "auth login`, or HF_TOKEN).")
    try:
        # list_repo_files retries for 20 s
        names = [f.rfilename for f in HfApi().model_info(repo, timeout=10).siblings]
    except GatedRepoError:
        raise gated from None
    except RepositoryNotFoundError:   # removed, renamed or private, it may be here from before
        if (cached := _cached(repo)) is not None:
            return cached
        raise CheckpointError(f"{repo}: no such model on the Hub, or a private one (then log in); and no "
                              "such folder here.") from None
    except Exception as error:   # offline; the exceptions vary from release to release
        if (cached := _cached(repo)) is not None:
            return cached
        raise CheckpointError(f"{repo}: the Hub cannot be reached ({_reason(error)}) and the model is "
                              "not in the local cache.") from None
    try:
        return fetch(repo, names)
    except GatedRepoError:
        raise gated from None
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{repo}: the download failed ({_reason(error)}). Try again; "
                              "what was complete is kept.") from None


def _cached(repo: str) -> Path | None:
    """What the local cache has of a model: parts that are not needed may be absent, as of one that another
    program fetched; what is needed and is not there is named when it is read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _one_file(Path(snapshot_download(repo, local_files_only=True)))
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)
        return None if incomplete is None else _one_file(Path(incomplete))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no details').splitlines()[0]}"


def _fetch(repo: str, names: list[str], ema: bool) -> Path:
    if "model_index.json" not in names:
        return _get(repo, _only_file(repo, names))
    root = _get(repo, "model_index.json").parent
    for name in BESIDE:
        if name in names:
            _get(repo, name)
    for part in (AVERAGED if ema and name == "unet" else name for name in COMPONENTS):
        if f"{part}/config.json" in names:
            _component(repo, names, f"{part}/")
    return root


def _fetch_vae(repo: str, names: list[str]) -> Path:
    part = next((p for p in ("", "vae/") if f"{p}config.json" in names
                 and any(p + n in names for n in candidates())), None)
    return _get(repo, _only_file(repo, names)) if part is None else _component(repo, names, part)


def _get(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name))


def _only_file(repo: str, names: list[str]) -> str:
    files = [n for n in names if "/" not in n and n.endswith(".safetensors")]
    if len(files) != 1:
        listing = ", ".join(sorted(files)[:5]) or "none"
        raise CheckpointError(f"{repo}: no diffusers folder (model_index.json), and not exactly one "
                              f".safetensors file at its top (found: {listing}). Download the file that you "
                              "want and give its path.")
    return files[0]


def _component(repo: str, names: list[str], part: str) -> Path:
    """The folder of a part ("unet/", or "" for the top), its config and weights in it."""
    config = _get(repo, f"{part}config.json")
    chosen = next((n for n in candidates() if part + n in names), None)
    if chosen is None:
        raise CheckpointError(f"{repo}: no weights of its {part.strip('/') or 'model'} found.")
    path = _get(repo, part + chosen)
    if chosen.endswith(".json"):
        for shard in sorted(weight_map(path)):
            _get(repo, part + shard)
    return config.parent


def _one_file(folder: Path) -> Path:
    """The only file of a snapshot without a folder layout, else the snapshot itself."""
    files = list(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 and not (folder / "model_index.json").exists() else folder


