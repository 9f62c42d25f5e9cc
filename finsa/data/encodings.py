"""Encodings of text files: detected from the bytes, with a note unless they are plain UTF-8."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import TextIO

from finsa.errors import DataError

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
_BLOCK = 1 << 20
_SAMPLE = 20_000  # characters beyond ASCII that decide the encoding
# Characters of Western European text besides letters; within a word only an apostrophe.
_WESTERN = frozenset("€‚„…‘’“”•–—™¡£©«®°±·»¿§½¼¾²³\xa0×ºª\xad")
_LOST = "rows with damaged characters are left out"
_NAMES = {"gb18030": "GB18030", "big5hkscs": "Big5", "cp1252": "cp1252 (Western European)"}
# Lead bytes of punctuation and of the common characters (level 1) of each encoding.
_COMMON = {
    "gb18030": frozenset((0xA1, 0xA3, *range(0xB0, 0xD8))),
    "big5hkscs": frozenset((0xA1, 0xA2, *range(0xA4, 0xC7))),
}


def open_text(file: Path, codec: str | None = None) -> tuple[TextIO, list[str]]:
    """Open a file as text, after its byte order mark; line ends are left unchanged.

    Args:
        file: any text file.
        codec: its encoding; None: detected.

    Returns:
        The stream, in which bytes that cannot be decoded are U+FFFD; and a note unless plain UTF-8 was detected.

    Raises:
        DataError: if the encoding cannot be detected.
    """
    codec, note = (codec, None) if codec is not None else encoding(file)
    stream = file.open(encoding=codec, errors="replace", newline="")
    if stream.read(1) != "\ufeff":
        stream.seek(0)
    return stream, [note] if note else []


def encoding(file: Path) -> tuple[str, str | None]:
    """Detect the encoding: by the byte order mark, or UTF-16, UTF-8, GB18030 (a superset of GBK), Big5 or cp1252.

    Returns:
        The codec, and a note unless it is plain UTF-8.

    Raises:
        DataError: if none of these is certain.
    """
    with file.open("rb") as stream:
        start = stream.read(1 << 16)
    for mark, codec in _MARKS.items():
        if start.startswith(mark):
            return codec, f"{file.name}: begins with a byte order mark, read as {codec.upper()}"
    wide = _utf16(start)
    if wide:
        return wide, f"{file.name}: has zero bytes at every other place, read as {wide.upper()}"
    bad = _first_bad_byte(file, "utf-8")
    if bad is None:
        return "utf-8", None
    as_utf8 = _beyond_ascii(file, "utf-8")
    if as_utf8.count("\ufffd") <= 0.5 * len(as_utf8) or file.stat().st_size - bad < 4:
        return "utf-8", f"{file.name}: is damaged UTF-8 (byte {bad:,}); {_LOST}"
    found = _national(file)
    if found is None:
        raise DataError(
            f"data.files: {file} is not UTF-8 (byte {bad:,}), and whether GB18030, Big5 or cp1252 is not certain. Set "
            "data.csv.encoding to what it is, such as gb18030, big5, cp1252, cp1251 or shift_jis"
        )
    worse = _first_bad_byte(file, found)
    also = "" if worse is None else f", and damaged (byte {worse:,}); {_LOST}"
    return found, f"{file.name}: is not UTF-8 (byte {bad:,}), read as {_NAMES[found]}{also}"


def is_utf8(file: Path) -> bool:
    """Whether all of a file is UTF-8."""
    return _first_bad_byte(file, "utf-8") is None


def _utf16(start: bytes) -> str | None:
    """UTF-16 without a mark: the zero bytes of characters below 256 are all at odd places or all at even ones."""
    zeros = [start[0::2].count(0), start[1::2].count(0)]
    if min(zeros) > 0 or max(zeros) < 4:
        return None
    codec = "utf-16-le" if zeros[1] else "utf-16-be"
    text = start[: len(start) // 2 * 2].decode(codec, "replace")
    return codec if "\n" in text and text.count("\ufffd") <= 1 else None


def _national(file: Path) -> str | None:
    """Detect the encoding of a file that is not UTF-8; None if it is not certain.

    Chinese text decoded with the wrong encoding gives rare characters, and so does Western text, whose bytes beyond
    ASCII are single ones between letters.
    """
    shares = dict[str, float]()  # of the characters beyond ASCII that are common in an encoding
    for codec, leads in _COMMON.items():
        text = _beyond_ascii(file, codec)
        coded = [sign.encode(codec, "ignore") for sign in text]
        shares[codec] = sum(len(sign) == 2 and sign[0] in leads for sign in coded) / max(1, len(text))
    best, other = sorted(shares, key=lambda codec: -shares[codec])
    if shares[best] > 0.65 and shares[best] > shares[other] + 0.2:
        return best
    return "cp1252" if _is_western(file) else None


def _is_western(file: Path) -> bool:
    with file.open("rb") as stream:
        content = stream.read(_BLOCK)
    text = content.decode("cp1252", "replace")
    runs = re.findall(r"[^\x00-\x7f]+", text)
    signs = "".join(runs)
    if not all(sign.isalpha() or sign in _WESTERN for sign in signs):
        return False
    within = re.findall(r"(?<=[a-z])[^\x00-\x7f](?=[a-z])", text)
    odd = [sign for sign in within if not (sign.isalpha() or sign in "’·\xad")]
    return not odd and sum(len(run) < 3 for run in runs) >= 0.9 * len(runs) and len(signs) < 0.2 * len(text)


def _first_bad_byte(file: Path, codec: str) -> int | None:
    """Number of the first byte, from 0, that does not belong to the codec."""
    decoder, at = codecs.getincrementaldecoder(codec)(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block has split
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return at - pending + error.start
            at += len(block)
    pending = len(decoder.getstate()[0])
    return at - pending if pending else None


def _beyond_ascii(file: Path, codec: str) -> str:
    """The first characters of a file that are not ASCII."""
    decoder, found = codecs.getincrementaldecoder(codec)("replace"), ""
    with file.open("rb") as stream:
        while len(found) < _SAMPLE and (block := stream.read(_BLOCK)):
            found += "".join(sign for sign in decoder.decode(block) if ord(sign) > 127)
    return found[:_SAMPLE]
