"""Rows read and rows in buckets are the same number, or the ledger says so."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from finsa.data.ledger import Ledger
from finsa.errors import DataError


def test_balanced() -> None:
    Ledger(Counter(a=3, b=2), Counter({"used": 4, "empty text": 1})).balance()
    Ledger().balance()


@pytest.mark.parametrize("used", [3, 5])
def test_lost_or_doubled_row_is_told(used: int) -> None:
    with pytest.raises(DataError, match=rf"does not balance: 4 rows read, buckets \{{'used': {used}\}}"):
        Ledger(Counter(a=4), Counter(used=used)).balance()


def test_as_dict_is_plain_json() -> None:
    ledger = Ledger(Counter({"a.csv": 2}), Counter(used=2), {"train": {"利好": 2}})
    plain = {
        "read": {"a.csv": 2},
        "buckets": {"used": 2},
        "splits": {"train": {"利好": 2}},
        "truncated": {"train": 1},
    }
    assert ledger.as_dict({"train": 1}) == plain
    assert json.loads(json.dumps(ledger.as_dict({"train": 1}))) == plain


def test_ledgers_share_nothing() -> None:
    first, second = Ledger(), Ledger()
    first.buckets["used"] += 1
    first.splits["train"] = {}
    assert (second.buckets, second.splits) == (Counter(), {})
