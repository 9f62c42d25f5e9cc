"""How a text file is encoded: found out from its bytes, and said where it is not plain UTF-8."""

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
_SAMPLE = 20_000  # characters beyond ASCII that decide
# What Western European text has besides letters; within a word only an apostrophe.
_WESTERN = frozenset("€‚„…‘’“”•–—™¡£©«®°±·»¿§½¼¾²³\xa0×ºª\xad")
_LOST = "rows with damaged characters are left out"


def open_text(file: Path, codec: str | None = None) -> tuple[TextIO, list[str]]:
    """Open a file as text, behind its byte order mark; line ends stay as they are.

    Args:
        file: any text file.
        codec: how it is encoded; None: detected.

    Returns:
        The stream, in which bytes that cannot be decoded are U+FFFD; and a note where UTF-8 was not what was detected.

    Raises:
        DataError: where the encoding cannot be detected.
    """
    codec, note = (codec, None) if codec is not None else encoding(file)
    stream = file.open(encoding=codec, errors="replace", newline="")
    if stream.read(1) != "\ufeff":
        stream.seek(0)
    return stream, [note] if note else []


def encoding(file: Path) -> tuple[str, str | None]:
    """Detect the encoding: by the byte order mark, or UTF-16, UTF-8, GB18030 (a superset of GBK), Big5 or cp1252.

    Returns:
        The codec, and a note where it is not plain UTF-8.

    Raises:
        DataError: where it is none of these for certain.
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


_NAMES = {"gb18030": "GB18030", "big5hkscs": "Big5", "cp1252": "cp1252 (Western European)"}


def is_utf8(file: Path) -> bool:
    """Whether all of a file is UTF-8."""
    return _first_bad_byte(file, "utf-8") is None


def _utf16(start: bytes) -> str | None:
    """UTF-16 without a mark: zero bytes, from characters below 256, all at odd places or all at even ones."""
    zeros = [start[0::2].count(0), start[1::2].count(0)]
    if min(zeros) > 0 or max(zeros) < 4:
        return None
    codec = "utf-16-le" if zeros[1] else "utf-16-be"
    text = start[: len(start) // 2 * 2].decode(codec, "replace")
    return codec if "\n" in text and text.count("\ufffd") <= 1 else None


def _national(file: Path) -> str | None:
    """What a file that is not UTF-8 is encoded in; None where that is not certain.

    Bytes of Chinese text in the wrong encoding give rare characters, and so does Western text, whose bytes beyond ASCII
    stand alone between letters.
    """
    shares = {codec: _common(file, codec, leads) for codec, leads in _COMMON.items()}
    best, other = sorted(shares, key=lambda codec: -shares[codec])
    if shares[best] > 0.65 and shares[best] > shares[other] + 0.2:
        return best
    return "cp1252" if _is_western(file) else None


# Lead bytes of punctuation and of the common characters (level 1) of each encoding.
_COMMON = {
    "gb18030": frozenset((0xA1, 0xA3, *range(0xB0, 0xD8))),
    "big5hkscs": frozenset((0xA1, 0xA2, *range(0xA4, 0xC7))),
}


def _common(file: Path, codec: str, leads: frozenset[int]) -> float:
    """Share of a file's characters beyond ASCII that are common in an encoding; its first 20,000 decide."""
    text = _beyond_ascii(file, codec)
    coded = [sign.encode(codec, "ignore") for sign in text]
    return sum(len(sign) == 2 and sign[0] in leads for sign in coded) / max(1, len(text))


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
            begun = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return at - begun + error.start
            at += len(block)
    begun = len(decoder.getstate()[0])
    return at - begun if begun else None


def _beyond_ascii(file: Path, codec: str) -> str:
    """The first characters of a file that are not ASCII."""
    decoder, found = codecs.getincrementaldecoder(codec)("replace"), ""
    with file.open("rb") as stream:
        while len(found) < _SAMPLE and (block := stream.read(_BLOCK)):
            found += "".join(sign for sign in decoder.decode(block) if ord(sign) > 127)
    return found[:_SAMPLE]
