"""What a command leaves on disk: a new numbered folder for every run, filled aside and moved into place whole."""
from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from p2p.errors import UsageError
from p2p.image import save_png


def names(pictures: int) -> list[str]:
    """Of the pictures of an edit, the source first."""
    return ["source", "edit"] if pictures == 2 else ["source", *(f"edit-{k}" for k in range(1, pictures))]


def write(file: Path, text: str) -> None:
    """In one step: readers see the old file or the new one. Raises UsageError."""
    aside = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        aside.write_text(text + "\n")
        os.replace(aside, file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from None


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to be filled aside, which is there in one step at the end; of its own name, for a worker that outlived its run
    may be at the same one. A killed run leaves it as .part-NAME-..."""
    aside = folder.with_name(f".part-{folder.name}-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        yield aside
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class Output:
    """Files of one run, gathered in memory; nothing is ever overwritten, and nothing half-written stays."""

    def __init__(self, parent: Path, title: str):
        """Raises UsageError if the folder cannot be written: before minutes of sampling, not after."""
        self.parent = parent
        self.slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48] or "run"
        self.files: dict[str, Callable[[Path], None]] = {}
        self.listed: list[str] = []
        made = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=parent):
                pass
            for folder in made:   # a run that fails leaves nothing; one beside it may have put something there
                with suppress(OSError):
                    folder.rmdir()
        except OSError as error:
            raise UsageError(f"--out {parent}: cannot be written ({error.strerror})") from None

    def add(self, name: str, write: Callable[[Path], None], listed: bool = True) -> None:
        """`write` makes the file at the path it is given."""
        self.files[name] = write
        self.listed += [name] * listed

    def picture(self, name: str, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
        self.add(f"{name}.png", lambda path: save_png(path, image, settings))

    def json(self, name: str, value: Any, listed: bool = False) -> None:
        self.add(name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"), listed)

    def write(self, quiet: bool = False) -> Path:
        """Writes all of it and prints the paths.  -> the new folder. Raises UsageError."""
        aside = None
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".p2p-", dir=self.parent))
            for name, write in self.files.items():
                write(aside / name)
            aside.chmod(0o755)
            folder = self._move(aside)
        except OSError as error:
            raise UsageError(f"--out {self.parent}: cannot be written ({error.strerror})") from None
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
        if not quiet:
            for name in self.listed:
                print(folder / name)
        return folder

    def _move(self, aside: Path) -> Path:
        taken = [int(m.group(1)) for p in self.parent.iterdir() if (m := re.match(r"(\d+)-", p.name))]
        number = max(taken, default=0) + 1
        while True:
            folder = self.parent / f"{number:04}-{self.slug}"
            try:
                folder.mkdir()               # fails if another run took the number meanwhile
            except FileExistsError:
                number += 1
                continue
            os.replace(aside, folder)        # an empty folder is replaced in one step
            return folder
