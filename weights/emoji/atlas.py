"""Draws the sprite atlas from Noto Color Emoji; needed once, the atlas itself ships with the package.

    python -m p2p.weights.emoji.atlas NotoColorEmoji.ttf
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from p2p.weights.emoji.world import ATLAS, OBJECTS, SPRITE


def draw(font_file: str) -> Image.Image:
    """One row of square sprites, RGBA, each scaled to touch the edges of its square and standing on its
    bottom."""
    font = ImageFont.truetype(font_file, 109)   # the one size that the bitmap font holds
    sheet = Image.new("RGBA", (SPRITE * len(OBJECTS), SPRITE))
    for i, thing in enumerate(OBJECTS.values()):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), thing.glyph, font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        scale = SPRITE / max(glyph.size)
        glyph = glyph.resize([max(1, round(s * scale)) for s in glyph.size], Image.LANCZOS)
        sheet.paste(glyph, (SPRITE * i + (SPRITE - glyph.width) // 2, SPRITE - glyph.height))
    return sheet


if __name__ == "__main__":
    draw(sys.argv[1]).save(Path(ATLAS), optimize=True)
