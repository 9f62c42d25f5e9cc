from __future__ import annotations

from finsa.training.batches import Collator


def test_rows_are_padded_on_the_right_and_padding_has_no_loss() -> None:
    collate = Collator(pad=9)
    batch = collate(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3}, {"input_ids": [4], "labels": [-100]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["lengths"].tolist() == [3, 1]


def test_an_end_token_that_is_also_the_pad_token_has_loss() -> None:
    batch = Collator(pad=9)([{"input_ids": [1, 9], "labels": [-100, 9]}, {"input_ids": [1], "labels": [-100]}])
    assert batch["labels"].tolist() == [[-100, 9], [-100, -100]]


def test_weight_class_and_text_span_are_collated_if_present() -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [-100, -100], "weight": 0.5, "target": 2, "text_span": (1, 2)},
        {"input_ids": [3, 4, 5], "labels": [-100] * 3, "weight": 1.5, "target": 0, "text_span": (1, 3)},
    ]
    batch = Collator(pad=9)(rows)
    assert batch["weights"].tolist() == [0.5, 1.5]
    assert batch["targets"].tolist() == [2, 0]
    assert batch["text_span"].tolist() == [[1, 2], [1, 3]]


def test_a_suffix_is_appended_to_every_row_and_not_counted() -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, -100]}, {"input_ids": [3], "labels": [-100]}]
    batch = Collator(pad=9, suffix=(7, 8))(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 7, 8], [3, 7, 8, 9]]
    assert batch["lengths"].tolist() == [2, 1]
    assert (batch["labels"] == -100).all()
