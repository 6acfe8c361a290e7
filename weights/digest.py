"""sha256 of files: computed once, then stored in the user's cache by path, size, times and inode."""
from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# seconds since the last change before a digest is cached: more than a tick of any kernel's clock
SETTLED = 0.1


def sha256(path: Path) -> str:
    """The digest of one file. Raises OSError."""
    before = _state(path)
    entry = _cache() / hashlib.sha256(before.encode()).hexdigest()
    if (known := _recalled(entry)) is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    result = digest.hexdigest()
    status = path.stat()
    if _state(path) == before and time.time() - max(status.st_mtime, status.st_ctime) > SETTLED:
        _remember(entry, result)
    return result


def together(files: Mapping[str, Path]) -> str | None:
    """The digest of named files: of one its own, of several one over names and contents. None if one is
    gone."""
    try:
        each = sorted((name, sha256(path)) for name, path in files.items())
    except OSError:
        return None
    return each[0][1] if len(each) == 1 else hashlib.sha256(json.dumps(each).encode()).hexdigest()


def _state(path: Path) -> str:
    """A key that changes whenever the content does (ctime: even if mtime was reset)."""
    s = path.stat()
    return json.dumps([str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2p" / "sha256"


def _recalled(entry: Path) -> str | None:
    """The cached digest; None where the entry cannot be read, or is damaged."""
    try:
        text = entry.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _remember(entry: Path, digest: str) -> None:
    """Writes an entry atomically: other processes may write or read it at the same time."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, encoding="ascii") as f:
            f.write(digest)
            f.flush()
            os.link(f.name, entry)   # fails where another has put it there
    except OSError:
        pass
