"""Build the font of the figures: the 3,755 most frequent Chinese characters (GB 2312, level 1) of Noto Sans CJK SC.

    python docs/font.py NotoSansCJK-Regular.ttc

The source is the font of https://github.com/notofonts/noto-cjk (Debian: fonts-noto-cjk). Its license, the SIL Open Font
License, allows redistribution of a subset under the same license and another name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection

FONT = Path(__file__).parents[1] / "finsa" / "evaluation" / "fonts" / "FinsaSansSC.otf"
NAME = "Finsa Sans SC"
SOURCE = "Noto Sans CJK SC"
DROPPED_TABLES = (
    "GSUB",
    "GPOS",
    "BASE",
    "VORG",
    "vhea",
    "vmtx",
    "gasp",
)  # for advanced typesetting, which figures do not need


def characters() -> set[int]:
    """Printable ASCII and Latin-1, punctuation and symbols of GB 2312, and its first level of characters."""
    codes = {*range(0x20, 0x7F), *range(0xA0, 0x100)}
    for row in (*range(0xA1, 0xA4), *range(0xB0, 0xD8)):
        codes |= {ord(bytes((row, cell)).decode("gb2312", "ignore") or " ") for cell in range(0xA1, 0xFF)}
    return codes


def main(source: Path) -> None:
    """Write the font."""
    (font,) = (one for one in TTCollection(source).fonts if one["name"].getDebugName(1) == SOURCE)
    options = subset.Options(hinting=False, layout_features=[], name_IDs=[0, 1, 2, 4, 6, 13, 14], notdef_outline=True)
    options.drop_tables += DROPPED_TABLES
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=characters())
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 4, 6):
            record.string = NAME.replace(" ", "") if record.nameID == 6 else NAME
    font["CFF "].cff.fontNames = [NAME.replace(" ", "")]
    font.save(FONT, reorderTables=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python docs/font.py NotoSansCJK-Regular.ttc")
    main(Path(sys.argv[1]))
