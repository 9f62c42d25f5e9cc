"""One normalisation of texts: training strips columns, prediction and service single texts."""

from __future__ import annotations

import polars as pl

from finsa.data import cleaning, texts
from finsa.data.readers import FATE


def test_columns_and_single_texts_lose_the_same_characters() -> None:
    every = [chr(number) for number in range(0x10000) if not 0xD800 <= number < 0xE000]
    around = [f"{sign}涨 了{sign}" for sign in every]
    frame = pl.DataFrame({"text": around, FATE: pl.Series([None] * len(every), dtype=pl.String)})
    wanted = [texts.normalize(text) for text in around]
    assert cleaning.texts(frame)["text"].to_list() == wanted
    assert [sign for sign, text in zip(every, wanted, strict=True) if text == "涨 了"] == sorted(texts.WHITE_SPACE)
