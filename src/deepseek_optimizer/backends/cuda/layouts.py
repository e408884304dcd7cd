"""How the tiles of each weight format are laid out, as kernels read them. Kernels are compiled for one `TileLayout`.

The tiles are those of `quant/`: `tiles.py` there describes most formats, `blocks.py` those with superblocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...quant import FORMATS
from ...quant.base import TILE_COLS, TILE_ROWS


@dataclass(frozen=True)
class TileLayout:
    """The layout of a format.

    Attributes:
        words: words of a row in a tile, of the plane with the lowest bits of its codes.
        codes: what a code stands for: "fp32", "bf16", "e4m3" (its bytes in the order of `quant.fp8`), "e2m1" (twice its
            value), "iq4" (a value of `quant.blocks.IQ4_VALUES`), "trellis" (two bits and the path around them choose among
            `quant.trellis.VALUES`), or "integer".
        tile_words: words of a whole tile, of a superblock an eighth.
        bits: of an integer code in the first plane.
        high: of an integer code in the second plane, which follows the first, or of the path; 0: there is none.
        offset: subtracted from integer codes.
        group: columns that share a scale, 16 or 32.
        scale: how scales are stored, after the codes: "" (none), "fp32" (one for all rows), "fp16", "upper" (a byte b for the
            fp16 number with bits b << 7), "power" (a byte e for 2^(e - 128)), "int8" or "nibbles" (4 bits, and 4 of the
            minimum). For the last two, the fp16 factors of a superblock of 8 tiles come before its first tile.
        minimum: whether a minimum is added to the scaled code, stored like the scale, behind it.
        narrow: whether products on tensor cores read rows and weights as bf16; otherwise everything is fp32.
        coded: whether they read both as E4M3 instead, rows with a scale for each 128 columns (`kernels/coded_rows.py`).
    """

    words: int
    codes: str
    tile_words: int
    bits: int = 0
    high: int = 0
    offset: int = 0
    group: int = TILE_COLS
    scale: str = ""
    minimum: bool = False
    narrow: bool = True
    coded: bool = False

    @property
    def per_word(self) -> int:
        """Columns in a word of the first plane."""
        return TILE_COLS // self.words

    @property
    def code_words(self) -> int:
        """Words of all codes of a tile."""
        return TILE_ROWS * (self.words + self.high)

    @property
    def head_words(self) -> int:
        """Words before the first tile of a superblock; 0: the format has no superblocks."""
        return (TILE_ROWS // 2 * (2 if self.minimum else 1)) if self.scale in ("int8", "nibbles") else 0


def _integer(name: str, bits: int, **fields: object) -> TileLayout:
    return TileLayout(bits, "integer", _tile_words(name), bits, **fields)  # type: ignore[arg-type]


def _tile_words(name: str) -> int:
    return FORMATS[name].tile_bytes // 4


LAYOUTS = {
    "fp32": TileLayout(32, "fp32", _tile_words("fp32"), narrow=False),
    "bf16": TileLayout(16, "bf16", _tile_words("bf16")),
    "int8": _integer("int8", 8, offset=128, scale="fp16"),
    "int4": _integer("int4", 4, offset=8, scale="fp16"),
    "q4_1": _integer("q4_1", 4, scale="fp16", minimum=True),
    "fp8": TileLayout(8, "e4m3", _tile_words("fp8"), scale="fp32"),
    "q2_k": _integer("q2_k", 2, group=16, scale="nibbles", minimum=True),
    "q3_k": _integer("q3_k", 2, high=1, offset=4, group=16, scale="int8"),
    "q4_k": _integer("q4_k", 4, scale="int8", minimum=True),
    "q5_k": _integer("q5_k", 4, high=1, scale="int8", minimum=True),
    "q6_k": _integer("q6_k", 4, high=2, offset=32, group=16, scale="int8"),
    "iq4_xs": TileLayout(4, "iq4", _tile_words("iq4_xs"), 4, scale="int8"),
    "iq4_nl": TileLayout(4, "iq4", _tile_words("iq4_nl"), 4, scale="fp16"),
    "q5_0": _integer("q5_0", 4, high=1, offset=16, scale="fp16"),
    "q5_1": _integer("q5_1", 4, high=1, scale="fp16", minimum=True),
    "int3": TileLayout(2, "trellis", _tile_words("int3"), 2, high=1, scale="upper"),
    "mxfp4": TileLayout(4, "e2m1", _tile_words("mxfp4"), 4, scale="power"),
}
CODED = replace(LAYOUTS["fp8"], coded=True)
