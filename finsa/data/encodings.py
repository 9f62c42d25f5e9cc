"""How a text file is encoded: found out from its bytes, and said where it is not plain UTF-8."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TextIO

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
_BLOCK = 1 << 20
_SAMPLE = 20_000  # characters beyond ASCII that decide whether a file is Chinese


def open_text(file: Path) -> tuple[TextIO, list[str]]:
    """Open a file as text, behind its byte order mark; line ends stay as they are.

    Returns:
        The stream, in which bytes that cannot be decoded are U+FFFD; and a note where it is not plain UTF-8.
    """
    codec, note = encoding(file)
    stream = file.open(encoding=codec, errors="replace", newline="")
    if stream.read(1) != "\ufeff":
        stream.seek(0)
    return stream, [note] if note else []


def encoding(file: Path) -> tuple[str, str | None]:
    """Detect the encoding: the byte order mark, else strict UTF-8, else GB18030 (holds GBK) where that gives Chinese.

    Returns:
        The codec, and a note where it is not plain UTF-8.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    for mark, codec in _MARKS.items():
        if start.startswith(mark):
            return codec, f"{file.name}: begins with a byte order mark, read as {codec.upper()}"
    bad = _first_bad_byte(file, "utf-8")
    if bad is None:
        return "utf-8", None
    lost = "rows with damaged characters are left out"
    if not _is_chinese(file):
        return "utf-8", f"{file.name}: is neither UTF-8 nor GB18030 (byte {bad:,}); {lost}"
    worse = _first_bad_byte(file, "gb18030")
    also = "" if worse is None else f", and damaged (byte {worse:,}); {lost}"
    return "gb18030", f"{file.name}: is not UTF-8 (byte {bad:,}), read as GB18030{also}"


def _first_bad_byte(file: Path, codec: str) -> int | None:
    """Number of the first byte, from 0, that does not belong to the codec."""
    decoder, at = codecs.getincrementaldecoder(codec)(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            begun = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return at - begun + error.start
            at += len(block)
    begun = len(decoder.getstate()[0])
    return at - begun if begun else None


def _is_chinese(file: Path) -> bool:
    """Whether a file that is not UTF-8 is Chinese in GB18030, which decodes almost anything, but to rare characters.

    Damaged UTF-8 is told by its many whole characters, Western text by the few common ones that GB18030 gives.
    """
    as_utf8 = _beyond_ascii(file, "utf-8")
    if as_utf8.count("\ufffd") <= 0.5 * len(as_utf8):
        return False
    as_gb18030 = _beyond_ascii(file, "gb18030")
    return len(as_gb18030.encode("gb2312", "ignore")) / 2 > 0.6 * len(as_gb18030)


def _beyond_ascii(file: Path, codec: str) -> str:
    """The first characters of a file that are not ASCII."""
    decoder, found = codecs.getincrementaldecoder(codec)("replace"), ""
    with file.open("rb") as stream:
        while len(found) < _SAMPLE and (block := stream.read(_BLOCK)):
            found += "".join(sign for sign in decoder.decode(block) if ord(sign) > 127)
    return found[:_SAMPLE]
