"""The output of a command: a new numbered folder for every run, filled aside and moved into place
atomically."""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from p2p.errors import UsageError
from p2p.show.pictures import save_png, slug
from p2p.weights.aside import aside, settle, sweep


class Output:
    """Files of one run, gathered in memory; no file is ever overwritten, and none stays half-written."""

    def __init__(self, parent: Path, title: str):
        """Raises UsageError if the folder cannot be written, before minutes of sampling."""
        self.parent = parent
        self.slug = slug(title) or "run"
        self.files: dict[str, Callable[[Path], None]] = {}
        self.listed: list[str] = []
        created = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent)
            with aside(parent):
                pass
            for folder in created:  # a failed run leaves nothing; another run may have written there
                with suppress(OSError):
                    folder.rmdir()
        except OSError as error:
            raise UsageError(f"--out {parent}: cannot be written ({error.strerror})") from None

    def add(self, name: str, write: Callable[[Path], None], listed: bool = True) -> None:
        """Adds a file. write: writes it to a path. listed: its path is printed."""
        self.files[name] = write
        self.listed += [name] * listed

    def picture(self, name: str, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
        self.add(f"{name}.png", lambda path: save_png(path, image, settings))

    def json(self, name: str, value: Any, listed: bool = False) -> None:
        text = json.dumps(value, indent=2) + "\n"
        self.add(name, lambda path: path.write_text(text, encoding="utf-8"), listed)

    def write(self, quiet: bool = False) -> Path:
        """Writes all files and prints their paths.  -> the new folder. Raises UsageError."""
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            with aside(self.parent) as temporary:
                files = temporary / self.slug
                files.mkdir()
                for name, write in self.files.items():
                    write(files / name)
                folder = self._move(files)
        except (OSError, SafetensorError) as error:   # safetensors raises its own on a full disk
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"--out {self.parent}: cannot be written ({why})") from None
        if not quiet:
            for name in self.listed:
                print(folder / name)
        return folder

    def _move(self, files: Path) -> Path:
        taken = [int(m.group(1)) for p in self.parent.iterdir() if (m := re.match(r"(\d+)-", p.name))]
        number = max(taken, default=0) + 1
        while True:
            folder = self.parent / f"{number:04}-{self.slug}"
            try:
                settle(files, folder)
            except FileExistsError:   # another run took the number meanwhile
                number += 1
                continue
            return folder
