"""Rows read and rows in buckets are the same number, or the ledger says so."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finsa.data.ledger import Ledger
from finsa.errors import DataError


def test_balanced() -> None:
    Ledger(Counter(a=3, b=2), Counter({"used": 4, "empty text": 1})).balance()
    Ledger().balance()


@pytest.mark.parametrize("used", [3, 5])
def test_a_lost_or_duplicated_row_is_reported(used: int) -> None:
    with pytest.raises(DataError, match=rf"does not balance: 4 rows read, buckets \{{'used': {used}\}}"):
        Ledger(Counter(a=4), Counter(used=used)).balance()


def test_as_dict_is_plain_json() -> None:
    ledger = Ledger(Counter({"a.csv": 2}), Counter(used=2), {"train": {"利好": 2}}, {"train": 2})
    plain = {
        "read": {"a.csv": 2},
        "buckets": {"used": 1, "used, truncated": 1},
        "splits": {"train": {"利好": 2}},
        "rows": {"train": 2},
        "truncated": {"train": 1},
        "notes": [],
        "examples": {},
    }
    assert ledger.as_dict({"train": 1}) == plain
    assert json.loads(json.dumps(ledger.as_dict({"train": 1}))) == plain


def test_ledgers_share_nothing() -> None:
    first, second = Ledger(), Ledger()
    first.buckets["used"] += 1
    first.splits["train"] = {}
    assert (second.buckets, second.splits) == (Counter(), {})


@given(
    buckets=st.dictionaries(st.sampled_from(["used", "empty text", "duplicate"]), st.integers(1, 50)),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_truncated_texts_are_part_of_the_used_rows(buckets: dict[str, int], shares: list[float]) -> None:
    ledger = Ledger(Counter(a=sum(buckets.values())), Counter(buckets))
    used = ledger.buckets["used"]
    cut = {split: int(share * used) // 3 for split, share in zip(("train", "validation", "test"), shares, strict=True)}
    closed = ledger.closed(cut)
    assert closed.total() == ledger.read.total()
    assert closed["used"] + closed["used, truncated"] == used
    assert closed["used, truncated"] == sum(cut.values())
    assert ledger.dropped() == closed.total() - used
    assert ledger.summary(cut) == ", ".join(f"{name} {count:,}" for name, count in closed.items() if count)
