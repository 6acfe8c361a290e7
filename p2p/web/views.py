"""What the page shows, and the pictures that a visit keeps."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from p2p.show.pictures import save_png, slug
from p2p.web.asked import Asked


@dataclass(frozen=True)
class Word:
    name: str                   # "cat", or of several "cat#2"
    weight: float
    map: Image.Image | None


@dataclass(frozen=True)
class View:
    """What the page shows."""

    source: Image.Image | None
    edit: Image.Image | None = None
    words: tuple[Word, ...] = ()         # of the prompt that the faders act on
    notes: tuple[str, ...] = ()
    done: bool = True
    seconds: float = 0.0

    @property
    def said(self) -> str:
        if self.source is None:
            return "no picture"
        if not self.done:
            return "a preview" if self.edit else "the edit is coming"
        return f"done in {self.seconds:.1f} s" if self.seconds else "your picture"


@dataclass(frozen=True)
class Item:
    """A picture of the visit, with all that makes it again."""

    number: int
    image: Image.Image
    caption: str
    settings: dict[str, Any]
    asked: Asked
    picture: Image.Image | None

    def shown(self, folder: Path) -> Path:
        """Writes a PNG of the pixels, unless it is there."""
        file = self._pixels(folder)
        if not file.exists():
            save_png(file, self.image)
        return file

    def put_away(self, folder: Path) -> None:
        """Removes what `shown` wrote."""
        self._pixels(folder).unlink(missing_ok=True)

    def _pixels(self, folder: Path) -> Path:
        return folder / f"{self.number}.png"

    def save(self, folder: Path) -> Path:
        """Writes the PNG, its settings inside."""
        file = folder / f"{self.number:03}-{slug(self.caption) or 'picture'}.png"
        save_png(file, self.image, self.settings)
        return file
