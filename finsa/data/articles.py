"""News articles with the sentiments of their entities, in two JSON files, as one labeled table (the AIDF system)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import Articles, Data
from finsa.data.labels import translate, unused_keys
from finsa.data.readers import FATE, LINE, Doubled, as_text, load_json, object_fault
from finsa.data.sources import Rows, article_files
from finsa.errors import DataError

Row = tuple[str, str | None, str | None, str | None, int, str | None]  # id, text, target, label, line, fate


def collect(data: Data) -> Rows:
    """Join articles with their entities' sentiments.

    The text is the article's parts joined by blank lines, white space within a part folded. The label is the most
    frequent valid sentiment of its entities; ties go to the class that comes first in ``data.labels``, as published
    (``max(set(s), key=s.count)`` over 0 negative, 1 neutral, 2 positive). If ``data.columns.target`` names the field
    with an entity's name, there is one row per article and entity instead, with the sentiment of that entity. Where no
    sentiment is valid, or the category is not wanted, the row is filtered and counted. A row's line is the article's
    number in its file.

    Raises:
        DataError: if a file is missing, no list, or lacks the fields that are named.
    """
    assert data.articles is not None
    if not data.labels:
        raise DataError(
            "data.labels: source=articles needs the classes in the order in which ties of the vote are broken"
        )
    spec, (news_file, labels_file) = data.articles, article_files(data)
    articles, notes = _load(news_file, spec, data.csv.encoding)
    records, more = _load(labels_file, spec, data.csv.encoding)
    notes += more
    # A field that no article has is misspelt; a field that only some have is accepted.
    fields = {field for article in articles if isinstance(article, dict) for field in article}
    wanted = [("id", spec.id), *(("parts", part) for part in spec.parts), *([("kind", spec.kind)] if spec.kind else [])]
    for key, name in wanted:
        if name not in fields:
            has = ", ".join(sorted(fields))
            raise DataError(f"data.articles.{key}: no article of {news_file} has a field '{name}'; they have {has}")
    votes, more = _votes(_sentiments(records, data, labels_file), data)
    notes += more
    labels = tuple(data.labels)
    rows = [row for line, article in enumerate(articles, 1) for row in _rows(article, line, votes, spec, labels)]
    schema = dict.fromkeys(("id", "text", "target", "label"), pl.String()) | {LINE: pl.Int64(), FATE: pl.String()}
    frame = pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.lit(str(news_file)).alias("file"))
    without_article = len(votes.keys() - set(frame["id"]))
    if without_article:
        notes.append(f"{without_article:,} articles of {labels_file.name} are not in {news_file.name}")
    return Rows(frame, set(), notes)


def _load(file: Path, spec: Articles, codec: str | None) -> tuple[list[Any], list[str]]:
    """Records of a file: a list, a list below some key, or {id: record}, whose id becomes a field like the others."""
    content, notes = load_json(file, codec)
    if isinstance(content, Doubled):
        raise DataError(f"data.files: {file} has a duplicate key, so that one of its records would be lost")
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        records = [{spec.id: key, **value} if isinstance(value, dict) else value for key, value in content.items()]
        content = lists[0] if len(lists) == 1 else records
    if not isinstance(content, list) or not content:
        raise DataError(f"data.files: {file} contains no list of records")
    return content, notes


def _sentiments(records: list[Any], data: Data, file: Path) -> pl.DataFrame:
    """Article id, target and sentiment of every entity; a record has entities, or is one."""
    found, spec, field = list[tuple[str, str | None, str]](), data.articles, data.columns.target
    assert spec is not None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or isinstance(record, Doubled) or record.get(spec.id) is None:
            raise DataError(
                f"data.files: record {number} of {file} has no '{spec.id}' or a duplicate key; set "
                "data.articles.id=<field>"
            )
        entities = record.get(spec.entities, record if spec.sentiment in record else [])
        named: Iterable[tuple[str | None, Any]] = [(None, entities)]
        if isinstance(entities, list):
            named = [(None, value) for value in entities]
        elif isinstance(entities, dict) and spec.sentiment not in entities:
            named = entities.items()  # {name: entity}
        for name, value in named:
            given = value if isinstance(value, dict) else {spec.sentiment: value}
            target = (as_text(given.get(field)) or name or "") if field else None
            found.append((str(record[spec.id]), target, as_text(given.get(spec.sentiment)) or ""))
    return pl.DataFrame(found, schema=dict.fromkeys(("id", "target", "label"), pl.String), orient="row")


def _votes(sentiments: pl.DataFrame, data: Data) -> tuple[dict[str, dict[str | None, list[str]]], list[str]]:
    """Valid sentiments per article and target, written as the classes are, and notes on the others."""
    names = tuple(data.labels or ())
    labels, used, notes = translate(sentiments["label"], data)
    notes += unused_keys(data, used, labels)
    sentiments = sentiments.with_columns(labels)
    invalid = sentiments.filter(~pl.col("label").is_in(names))["label"]
    if len(invalid):
        listed = ", ".join(f"'{value}' ({count:,})" for value, count in Counter(invalid).most_common(5))
        notes.append(
            f"{len(invalid):,} sentiments of entities are not labels and are not counted in the vote: {listed}"
        )
    valid = pl.col("label").filter(pl.col("label").is_in(names))
    votes: dict[str, dict[str | None, list[str]]] = {}
    for article, target, values in sentiments.group_by("id", "target", maintain_order=True).agg(valid).iter_rows():
        votes.setdefault(article, {})[target] = values
    return votes, notes


def _rows(
    article: Any, line: int, votes: dict[str, dict[str | None, list[str]]], spec: Articles, labels: tuple[str, ...]
) -> list[Row]:
    """The row of an article, or one per target."""
    name = f"article-{line}"
    fault = object_fault(article)
    if fault is None and article.get(spec.id) is None:
        fault = f"unreadable: no field '{spec.id}'"
    if fault is not None:
        return [(name, None, None, None, line, fault)]
    name, parts = str(article[spec.id]), [article.get(part) for part in spec.parts]
    if any(isinstance(part, list | dict) for part in parts):
        return [(name, None, None, None, line, "unreadable: the text is a list or object")]
    text = "\n\n".join(filter(None, (" ".join((as_text(part) or "").split()) for part in parts)))
    kind = (as_text(article.get(spec.kind)) or "").strip() if spec.kind else ""
    if kind in spec.skipped or (spec.kinds is not None and kind not in spec.kinds):
        return [(name, text, None, None, line, f"filtered: category {kind}")]
    found = {target: vote(values, labels) for target, values in votes.get(name, {None: []}).items()}
    return [
        (
            name if target is None else f"{name}-{number}",
            text,
            target,
            label,
            line,
            None if label else "filtered: no valid sentiment",
        )
        for number, (target, label) in enumerate(found.items(), 1)
    ]


def vote(values: list[str], labels: tuple[str, ...]) -> str | None:
    """The most frequent of the values that are labels; ties go to the label that comes first; None without any."""
    counts = Counter(value for value in values if value in labels)
    return max(labels, key=lambda label: (counts[label], -labels.index(label))) if counts else None
