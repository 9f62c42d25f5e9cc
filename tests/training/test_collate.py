from __future__ import annotations

from finsa.training.collate import Collator


def test_rows_are_padded_on_the_right_and_padding_is_never_learnt() -> None:
    collate = Collator(pad=9)
    batch = collate(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3}, {"input_ids": [4], "labels": [-100]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["lengths"].tolist() == [3, 1]


def test_an_end_token_that_is_also_the_pad_token_is_learnt() -> None:
    batch = Collator(pad=9)([{"input_ids": [1, 9], "labels": [-100, 9]}, {"input_ids": [1], "labels": [-100]}])
    assert batch["labels"].tolist() == [[-100, 9], [-100, -100]]
