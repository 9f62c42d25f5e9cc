"""Characters are the same in every encoding of a text file, and encodings other than UTF-8 are noted."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finsa.data.encodings import encoding, open_text
from finsa.errors import DataError

NEWS = "text,label\n净利润同比增长12.5%，股价大涨。,利好\n公司被立案调查，股价跌停。,利空\n"
LIGHT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _file(folder: Path, content: bytes) -> Path:
    file = folder / "news.csv"
    file.write_bytes(content)
    return file


def _read(file: Path) -> tuple[str, list[str]]:
    stream, notes = open_text(file)
    with stream:
        return stream.read(), notes


@pytest.mark.parametrize("codec", ["gbk", "gb18030", "gb2312"])
def test_chinese_in_a_national_encoding(tmp_path: Path, codec: str) -> None:
    file = _file(tmp_path, NEWS.encode(codec))
    first = NEWS.encode(codec).index("净".encode(codec))
    assert _read(file) == (NEWS, [f"news.csv: is not UTF-8 (byte {first}), read as GB18030"])


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        ("\ufeff".encode("gb18030"), "gb18030"),
    ],
)
def test_a_byte_order_mark_determines_the_encoding_and_is_not_text(tmp_path: Path, mark: bytes, codec: str) -> None:
    file = _file(tmp_path, mark + NEWS.encode(codec))
    assert _read(file) == (NEWS, [f"news.csv: begins with a byte order mark, read as {codec.upper()}"])


@LIGHT
@given(text=st.text(max_size=60))
def test_utf8_is_read_without_a_note(tmp_path: Path, text: str) -> None:
    if not text.startswith("\ufeff"):
        assert _read(_file(tmp_path, text.encode())) == (text, [])


def test_line_ends_stay(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, b"a\r\nb\rc\n"))[0] == "a\r\nb\rc\n"


def test_damaged_utf8_is_not_mistaken_for_another_encoding(tmp_path: Path) -> None:
    """Chinese UTF-8 decodes as GB18030 as well, to rare characters: a whole file of nonsense for one bad byte."""
    content = NEWS.encode().replace("大".encode(), "大".encode()[:2])
    assert content.decode("gb18030", errors="replace") != NEWS
    text, notes = _read(_file(tmp_path, content))
    assert text == NEWS.replace("大", "\ufffd")
    bad = content.index("大".encode()[:2])
    assert notes == [f"news.csv: is damaged UTF-8 (byte {bad}); rows with damaged characters are left out"]


def test_western_text_is_not_mistaken_for_chinese(tmp_path: Path) -> None:
    """A curly apostrophe of Windows and the letter after it are a valid, rare character of GB18030."""
    text, notes = _read(_file(tmp_path, "Company didn’t pay".encode("cp1252")))
    assert text == "Company didn’t pay"
    assert notes == ["news.csv: is not UTF-8 (byte 12), read as cp1252 (Western European)"]


TRADITIONAL = (
    "text,label\n公司公告稱，實際控制人被立案調查，股價跌停,利空\n上半年淨利潤同比增長三成，超出市場預期,利好\n"
)


@pytest.mark.parametrize(
    ("text", "codec", "named"),
    [
        (TRADITIONAL, "big5", "Big5"),
        (TRADITIONAL, "gbk", "GB18030"),
        ("Café chain, Orléans: “übertrifft” – €5\n", "cp1252", "cp1252 (Western European)"),
        ("El año pasado ¿qué pasó? La acción subió\n", "latin-1", "cp1252 (Western European)"),
    ],
)
def test_encodings_that_are_certain(tmp_path: Path, text: str, codec: str, named: str) -> None:
    content = text.encode(codec)
    first = next(at for at, byte in enumerate(content) if byte > 127)
    assert _read(_file(tmp_path, content)) == (text, [f"news.csv: is not UTF-8 (byte {first}), read as {named}"])


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(tmp_path: Path, codec: str) -> None:
    assert _read(_file(tmp_path, NEWS.encode(codec)))[0] == NEWS


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("Прибыль компании выросла, цена упала\n", "cp1251"),
        ("Spółka złożyła wniosek o upadłość, zysk wzrósł\n", "cp1250"),
        ("株価は大幅に上昇した。決算は予想を上回った\n", "shift_jis"),
    ],
)
def test_an_ambiguous_encoding_must_be_configured(tmp_path: Path, text: str, codec: str) -> None:
    file = _file(tmp_path, text.encode(codec))
    with pytest.raises(DataError, match=r"news\.csv is not UTF-8 .* Set data\.csv\.encoding to what it is, such as"):
        open_text(file)
    stream, notes = open_text(file, codec)
    with stream:
        assert (stream.read(), notes) == (text, [])


def test_damaged_gb18030_is_read_with_a_note(tmp_path: Path) -> None:
    content = NEWS.encode("gb18030").replace(",利空".encode("gb18030"), b"\xff,\xc0\xfb\xbf\xd5")
    text, notes = _read(_file(tmp_path, content))
    assert text == NEWS.replace(",利空", "\ufffd,利空")
    assert notes[0].endswith(
        f"read as GB18030, and damaged (byte {content.index(0xFF)}); rows with damaged characters are left out"
    )


@pytest.mark.parametrize("place", [2, (1 << 20) - 1, (1 << 20), (1 << 20) + 1, (1 << 21) - 1])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe5\xa4", b"\xe5"])
def test_the_reported_position_of_a_bad_byte_is_correct(tmp_path: Path, place: int, bad: bytes) -> None:
    """Also if a block of the file ends inside a character."""
    start = "大".encode() * (place // 3) + b"x" * (place % 3)
    codec, note = encoding(_file(tmp_path, start + bad + b"xx" + "大".encode()))
    assert codec == "utf-8"
    assert f"(byte {place:,})" in str(note)


def test_a_truncated_character_at_the_end_of_the_file(tmp_path: Path) -> None:
    _, note = encoding(_file(tmp_path, b"abc" + "大".encode()[:2]))
    assert "(byte 3)" in str(note)
