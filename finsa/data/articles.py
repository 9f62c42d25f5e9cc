"""News articles and the sentiments of their entities, two JSON files, as one labelled table (the AIDF system)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Articles, Data, locate
from finsa.data.readers import FATE, LINE
from finsa.data.sources import Rows
from finsa.errors import DataError


def collect(data: Data) -> Rows:
    """Join articles with their entities' sentiments.

    The text is the article's parts joined by blank lines, white space within a part folded. The label is the most
    frequent valid sentiment of its entities; ties go to the class that comes first in ``data.labels``, as published
    (``max(set(s), key=s.count)`` over 0 negative, 1 neutral, 2 positive). Where no sentiment is valid, or the category
    is not wanted, the row is filtered and counted.

    Raises:
        DataError: where a file is missing, no list, or lacks the fields that are named.
    """
    assert data.articles is not None
    assert data.labels is not None
    spec, folder = data.articles, locate(str(data.files))
    news_file, labels_file = folder / spec.news, folder / spec.labels
    for file in (news_file, labels_file):
        if not file.is_file():
            where = f"\n  data={data.name} is {data.origin}" if data.origin else ""
            raise DataError(f"data.files: no such file: {file}.{where}")
    sentiments = _sentiments(_load(labels_file), spec, labels_file)
    records = _load(news_file)
    rows = [_row(record, line, sentiments, spec, tuple(data.labels)) for line, record in enumerate(records, 1)]
    schema = dict.fromkeys(("id", "text", "label"), pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    empty = [pl.lit(None, dtype=pl.String).alias(name) for name in ("domain", "parent", "group", "split")]
    return Rows(frame.with_columns(*empty, pl.lit(str(news_file)).alias("file")), set(), _notes(sentiments, data.labels))


def _load(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.files: {file} is no JSON: {error}") from None
    if isinstance(content, dict):  # {id: {...}}: the id becomes a field like the others
        content = [{"id": key, **value} if isinstance(value, dict) else value for key, value in content.items()]
    if not isinstance(content, list) or not content:
        raise DataError(f"data.files: {file} holds no list of records")
    return content


def _sentiments(records: list[Any], spec: Articles, file: Path) -> dict[str, list[str]]:
    """Sentiments per article id; a record has a list of entities, or is one entity."""
    found: dict[str, list[str]] = {}
    for record in records:
        if not isinstance(record, dict) or spec.id not in record:
            raise DataError(f"data.files: a record of {file} has no '{spec.id}'; set data.articles.id=<field>")
        entities = record.get(spec.entities, [record])
        if isinstance(entities, dict):
            entities = list(entities.values())
        values = [entity.get(spec.sentiment) if isinstance(entity, dict) else entity for entity in entities]
        found.setdefault(str(record[spec.id]), []).extend(str(value).strip().lower() for value in values)
    return found


def _row(
    record: Any, line: int, sentiments: dict[str, list[str]], spec: Articles, labels: tuple[str, ...]
) -> tuple[str, str | None, str | None, int, str | None]:
    if not isinstance(record, dict):
        return f"article-{line}", None, None, line, "unreadable: not a JSON object"
    name = str(record.get(spec.id, f"article-{line}"))
    parts = [" ".join(str(record.get(part) or "").split()) for part in spec.parts]
    text = "\n\n".join(part for part in parts if part)
    kind = str(record.get(spec.kind)) if spec.kind else ""
    if kind in spec.skipped or (spec.kinds is not None and kind not in spec.kinds):
        return name, text, None, line, f"filtered: category {kind}"
    label = vote(sentiments.get(name, []), labels)
    return name, text, label, line, None if label else "filtered: no valid sentiment"


def vote(values: list[str], labels: tuple[str, ...]) -> str | None:
    """The most frequent of the values that are labels; ties go to the label that comes first; None without any."""
    counts = Counter(value for value in values if value in labels)
    return max(labels, key=lambda label: (counts[label], -labels.index(label))) if counts else None


def _notes(sentiments: dict[str, list[str]], labels: Any) -> list[str]:
    strange = Counter(value for values in sentiments.values() for value in values if value not in labels)
    listed = ", ".join(f"'{value}' ({count})" for value, count in strange.most_common(5))
    return [f"{strange.total()} sentiments of entities are no label and take no part in the vote: {listed}"] * bool(strange)
