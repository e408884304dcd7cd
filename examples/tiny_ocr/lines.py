"""Lines of text and pictures of them: short passages of the corpus and random characters, in fonts of fixed width."""

from __future__ import annotations

import random
import re
import shutil
import string
import subprocess
from collections.abc import Sequence
from typing import Any

FAMILIES = ("DejaVu Sans Mono", "Liberation Mono")
BUILT_IN = "pillow"  # names the font that comes with Pillow
CHARACTERS = "".join(c for c in string.printable if c.isprintable())  # ASCII
_RANDOM = 0.3  # share of lines of random characters, so that rare ones are learned, and guessing from context is not
_MARGIN = 2  # most pixels before a line
_NOISE = 10.0  # most of a picture's noise, as a standard deviation in gray levels


class Texts:
    """Lines of text to draw, none of which repeats a passage on purpose.

    Args:
        texts: documents from which passages are taken.
        seed: of the choice.
    """

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        words = " ".join(texts).split()
        self._text = " ".join(word for word in words if word.isascii() and word.isprintable() and len(word) < 30)
        self._random = random.Random(seed)

    def line(self, shortest: int, longest: int) -> str:
        """A line of so many characters; it neither begins nor ends with a space, and has no two in a row."""
        length = self._random.randint(shortest, longest)
        while True:
            if self._random.random() < _RANDOM:
                drawn = "".join(self._random.choices(CHARACTERS, k=length))
            else:
                begin = self._text.find(" ", self._random.randrange(len(self._text) - longest - 40)) + 1
                drawn = self._text[begin : begin + length]
            line = re.sub(" +", " ", drawn.strip())
            if len(line) >= shortest:
                return line


def find_fonts(families: Sequence[str] = FAMILIES) -> list[str]:
    """The files of these font families, as fontconfig knows them.

    Raises:
        SystemExit: fontconfig or a family is not installed.
    """
    if shutil.which("fc-match") is None:
        raise SystemExit("fontconfig is not installed (its fc-match finds fonts); install it, or name fonts: --font FILE")
    found = []
    for family in families:
        command = ["fc-match", "--format", "%{family}\t%{file}", f"{family}:style=Regular:style=Book"]
        name, _, file = subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\t")
        if family not in name.split(","):
            raise SystemExit(f"the font {family} is not installed (Debian: fonts-dejavu-core, fonts-liberation)")
        found.append(file)
    return found


class Drawing:
    """Draws lines of text, dark on light.

    Args:
        fonts: files of fonts of fixed width, or `BUILT_IN`.
        cell: width of a character in pixels; a picture is two cells high.
        cells: width of a picture, in cells.
        seed: of fonts, places, grays and noise.
    """

    def __init__(self, fonts: Sequence[str], cell: int, cells: int, seed: int) -> None:
        import numpy as np

        self._fonts = [_font(font, cell) for font in fonts]
        self._size = cells * cell, 2 * cell
        self._random, self._noise = random.Random(seed), np.random.default_rng(seed)

    def picture(self, text: str) -> Any:
        """A picture in RGB of a line."""
        import numpy as np
        from PIL import Image, ImageDraw

        draw = self._random
        font = draw.choice(self._fonts)
        image = Image.new("L", self._size, 0)
        room = self._size[1] - sum(font.getmetrics())  # above and below the tallest and the deepest letters
        at = draw.randint(0, _MARGIN), draw.randint(min(-1, room), max(1, room))
        ImageDraw.Draw(image).text(at, text, fill=255, font=font)
        ink, paper = draw.randint(0, 80), draw.randint(190, 255)
        gray = paper + np.asarray(image, np.float32) * ((ink - paper) / 255)
        gray += self._noise.standard_normal(gray.shape, np.float32) * draw.uniform(0, _NOISE)
        return Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).convert("RGB")


def _font(file: str, width: int) -> Any:
    """The font in the size in which its characters are so many pixels wide."""
    from PIL import ImageFont

    def sized(size: float) -> Any:
        return ImageFont.load_default(size) if file == BUILT_IN else ImageFont.truetype(file, size)

    return sized(100 * width / sized(100).getlength("0"))


def errors(read: str, written: str) -> int:
    """How many characters must be inserted, removed or replaced to make one text of the other."""
    row = list(range(len(written) + 1))
    for i, a in enumerate(read, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(written, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
