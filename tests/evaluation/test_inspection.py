"""The numbers of an inspection, on rows with known results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from finsa.config import InspectStage, RunConfig
from finsa.data import near_duplicates, tokenized
from finsa.data.dataset import Dataset
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.evaluation import inspection

Configure = Callable[..., RunConfig]
COLUMNS = {"id": pl.String, "text": pl.String, "label": pl.Int64, "domain": pl.String}


def _frame(rows: list[tuple[str, str, int]]) -> pl.DataFrame:
    return pl.DataFrame([(*row, None) for row in rows], COLUMNS, orient="row")


@pytest.fixture
def job(config: Configure, tokenizer: Any) -> tokenized.TokenizedDataset:
    splits = {
        "train": _frame(
            [("a-1", "公司一季度净利润同比增长百分之二十", 2), ("a-2", "下跌" * 100, 0), ("a-3", "平稳", 1)]
        ),
        "validation": _frame([("a-4", "公司一季度净利润同比增长百分之三十", 0)]),
        "test": _frame([]),
    }
    ledger = Ledger(
        read=Counter({"x.csv": 9}),
        buckets=Counter({"used": 4, "duplicate": 2, "conflicting label": 1, "leak: training copy of a test row": 2}),
        splits={
            "train": {"利空": 1, "中性": 1, "利好": 1},
            "validation": {"利空": 1, "中性": 0, "利好": 0},
            "test": {"利空": 0, "中性": 0, "利好": 0},
        },
        notes=["2 rows have an unknown label; kept, because data.on_unknown_label=keep", "x.csv: read as GB18030"],
    )
    names = ("利空", "中性", "利好")
    cfg = config("stage=inspect", "data.max_length=60", "data.cache=null")
    return tokenized.build(cfg, Dataset(splits, LabelSpace(names, names), ledger, "", pl.DataFrame()), tokenizer)


def _numbers(job: tokenized.TokenizedDataset, config: Configure) -> dict[str, Any]:
    cfg = config("stage=inspect", "data.max_length=60", "data.cache=null")
    assert isinstance(cfg.stage, InspectStage)
    settings = cfg.data.near_duplicates
    return inspection.inspect(job, near_duplicates.find(job.dataset.splits, settings), settings, cfg.stage, None)


def test_findings(job: tokenized.TokenizedDataset, config: Configure) -> None:
    assert _numbers(job, config)["findings"] == [
        "9 rows read, 5 not used (exact duplicates 2, conflicting labels 1, leaks 2).",
        "2 rows have an unknown label; kept, because data.on_unknown_label=keep.",
        "The validation split has no 中性 and no 利好 rows.",
        "The test split is empty.",
        "1 texts (25.0 %) are too long and are truncated.",
        "1 of 1 validation rows (100.0 %) are near duplicates of a training row (similarity 0.7 or more); "
        "in 1 of 1 pairs the labels differ.",
    ]


def test_findings_name_every_reason_why_rows_are_not_used(job: tokenized.TokenizedDataset, config: Configure) -> None:
    ledger = job.dataset.ledger
    ledger.read["x.csv"] += 3
    ledger.buckets.update({"filtered: over data.split.rows": 2, "empty text": 1})
    assert _numbers(job, config)["findings"][0] == (
        "12 rows read, 8 not used (exact duplicates 2, conflicting labels 1, leaks 2, filtered: over data.split.rows 2,"
        " empty text 1)."
    )


def test_near_duplicates_by_pair_of_splits(job: tokenized.TokenizedDataset, config: Configure) -> None:
    found = _numbers(job, config)["near_duplicates"]
    counts = [(one["held_out"], one["other"], one["pairs"], one["rows"], one["of"]) for one in found["between"]]
    assert counts == [("test", "train", 0, 0, 0), ("validation", "train", 1, 1, 1), ("test", "validation", 0, 0, 0)]
    assert found["recall_at_threshold"] > 0.999


def test_lengths_above_the_limit_are_the_truncated_rows(job: tokenized.TokenizedDataset, config: Configure) -> None:
    numbers = _numbers(job, config)
    assert numbers["tokens"]["max_length"] == 60
    lengths = inspection.row_lengths(job, "train")
    assert (lengths > 60).tolist() == [False, True, False]
    assert lengths.max() == numbers["tokens"]["splits"]["train"]["percentiles"]["100"]
    assert numbers["tokens"]["splits"]["train"]["cut_tokens"] == lengths.max() - 60
    assert numbers["splits"]["train"]["cut"] == {"利空": 1, "中性": 0, "利好": 0}
    assert set(numbers["tokens"]["splits"]) == {"train", "validation"}


def test_files_of_rows_with_ids_that_occur_twice() -> None:
    read = pl.DataFrame(
        {
            "id": ["1", "2", "1", "2"],
            "text": ["a", "b ", "c", "d"],
            "file": ["/x/news/p.csv", "/x/news/p.csv", "/x/forum/p.csv", "/x/forum/p.csv"],
        }
    )
    rows = pl.DataFrame({"id": ["1", "2", "2"], "text": ["c", "b", "d"]})
    assert inspection.files_of(rows, read).to_list() == ["forum/p.csv", "news/p.csv", "forum/p.csv"]
