"""An article's class is the vote of its entities; ignored values are counted or noted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finsa.config import Data, RunConfig
from finsa.data import articles
from finsa.data.articles import vote
from finsa.data.readers import FATE, LINE
from finsa.data.sources import Rows
from finsa.errors import DataError

Configure = Callable[..., RunConfig]
LABELS = ("negative", "neutral", "positive")


def _news(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "Title": f"T{number}", "Description": "D", "Content": "C", "Type": "Markets", **fields}


def _labels(number: int, *sentiments: Any) -> dict[str, Any]:
    return {"id": number, "entities": [{"name": "X", "sentiment": sentiment} for sentiment in sentiments]}


def _data(config: Configure, folder: Path, news: object, labels: object, **changes: object) -> Data:
    for name, content in (("news.json", news), ("labels.json", labels)):
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return config("data=aidf_news").data.model_copy(update={"files": str(folder), **changes})


def _spec(data: Data, **changes: object) -> Data:
    assert data.articles is not None
    return data.model_copy(update={"articles": data.articles.model_copy(update=changes)})


def _found(rows: Rows) -> list[tuple[str, str | None, str | None]]:
    return rows.frame.select("id", "label", FATE).rows()


# ------------------------------------------------------------------------------------------------ the vote


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=9))
def test_vote_is_the_published_one(values: list[int]) -> None:
    """Published: ``max(set(s), key=s.count)`` over small integers, whose set is in their order."""
    published = max(set(values), key=values.count)
    assert vote([LABELS[value] for value in values], LABELS) == LABELS[published]


def test_ties_go_to_the_first_class() -> None:
    assert vote(["positive", "neutral"], LABELS) == "neutral"
    assert vote(["positive", "neutral"], LABELS[::-1]) == "positive"
    assert vote([], LABELS) is None
    assert vote(["strange"], LABELS) is None


# ------------------------------------------------------------------------------------------------ joining


def test_articles_meet_their_sentiments(config: Configure, tmp_path: Path) -> None:
    news = [_news(1), _news(2, Content=None, Title=" A \n b "), _news("x", Type="Sports"), _news(4), _news(5)]
    labels = [
        _labels(2, "positive", "negative", "positive"),
        _labels(1, "neutral", "positive"),
        _labels("x", "positive"),
        _labels(4, "mixed", None),
        _labels(77, "positive"),
    ]
    rows = articles.collect(_data(config, tmp_path, news, labels))
    assert _found(rows) == [
        ("1", "neutral", None),
        ("2", "positive", None),
        ("x", None, "filtered: category Sports"),
        ("4", None, "filtered: no valid sentiment"),
        ("5", None, "filtered: no valid sentiment"),
    ]
    assert rows.frame["text"].to_list()[:2] == ["T1\n\nD\n\nC", "A b\n\nD"]
    assert rows.frame[LINE].to_list() == [1, 2, 3, 4, 5]
    assert rows.counts() == {str(tmp_path / "news.json"): 5}
    assert rows.notes == [
        "2 sentiments of entities are not labels and are not counted in the vote: 'mixed' (1), '' (1)",
        "1 articles of labels.json are not in news.json",
    ]


@pytest.mark.parametrize(
    "labels",
    [
        [_labels(1, "positive", "negative", "positive")],
        [{"id": 1, "sentiment": value} for value in ("positive", "negative", "positive")],
        [{"id": "1", "entities": {"X": "positive", "Y": "negative", "Z": "positive"}}],
        [{"id": 1, "entities": {"X": {"sentiment": "positive"}}}],
        [{"id": 1, "entities": {"sentiment": "positive"}}],
        [{"id": 1, "entities": ["positive", "negative", "positive"]}],
        [{"id": 1, "entities": "positive"}],
        {"1": {"entities": [{"sentiment": "positive"}]}},
        {"labels": [_labels(1, "positive")]},
    ],
)
def test_forms_of_the_labels_file(config: Configure, tmp_path: Path, labels: object) -> None:
    assert _found(articles.collect(_data(config, tmp_path, [_news(1)], labels))) == [("1", "positive", None)]


@pytest.mark.parametrize("entities", [None, [], {}, [None], [3], [{"name": "X"}]])
def test_article_without_a_sentiment_is_filtered(config: Configure, tmp_path: Path, entities: object) -> None:
    data = _data(config, tmp_path, [_news(1)], [{"id": 1, "entities": entities}])
    assert _found(articles.collect(data)) == [("1", None, "filtered: no valid sentiment")]


def test_sentiments_are_mapped_and_corrected(config: Configure, tmp_path: Path) -> None:
    news, labels = [_news(1), _news(2)], [_labels(1, 2, 2, 0), _labels(2, " Negative", "NEGATIVE", "positive")]
    data = _data(config, tmp_path, news, labels, label_map={"0": "negative", "1": "neutral", "2": "positive"})
    rows = articles.collect(data)
    assert _found(rows) == [("1", "positive", None), ("2", "negative", None)]
    assert sorted(rows.notes) == [
        "data.label_map: no row has the label '1'.",
        "label ' Negative' (1 row) is read as 'negative'",
        "label 'NEGATIVE' (1 row) is read as 'negative'",
    ]


def test_wanted_categories(config: Configure, tmp_path: Path) -> None:
    news = [_news(1), _news(2, Type="Banking"), _news(3, Type=None), _news(4, Type=" Markets ")]
    data = _data(config, tmp_path, news, [_labels(number, "positive") for number in range(1, 5)])
    kept = _spec(data, kinds=("Markets",))
    assert _found(articles.collect(kept)) == [
        ("1", "positive", None),
        ("2", None, "filtered: category Banking"),
        ("3", None, "filtered: category "),
        ("4", "positive", None),
    ]
    assert [fate for _, _, fate in _found(articles.collect(_spec(data, kind=None)))] == [None] * 4


def test_articles_that_cannot_be_read_are_counted(config: Configure, tmp_path: Path) -> None:
    doubled = '{"id": 5, "id": 6, "Title": "T"}'
    good, bad = _news(1), [3, {"Title": "T"}, _news(4, Content=["p", "q"])]
    news = f"[{json.dumps(good)}, {', '.join(map(json.dumps, bad))}, {doubled}]"
    rows = articles.collect(_data(config, tmp_path, news, [_labels(1, "positive"), _labels(4, "positive")]))
    assert [fate for _, _, fate in _found(rows)] == [
        None,
        "unreadable: not a JSON object",
        "unreadable: no field 'id'",
        "unreadable: the text is a list or object",
        "unreadable: duplicate key",
    ]


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "nr"}, "data.articles.id: no article of .* has a field 'nr'; they have Content, Description, "),
        ({"parts": ("Title", "Body")}, "data.articles.parts: no article of .* has a field 'Body'"),
        ({"kind": "Section"}, "data.articles.kind: no article of .* has a field 'Section'"),
        ({"news": "articles.json"}, "data.files: no such file: .*articles.json.\n  data=aidf_news is not public"),
    ],
)
def test_wrong_names_are_reported(config: Configure, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        articles.collect(_spec(_data(config, tmp_path, [_news(1)], [_labels(1, "positive")]), **changes))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"nr": 1}], "record 1 of .*labels.json has no 'id' or a duplicate key; set data.articles.id=<field>"),
        ([_labels(1, "positive"), 3], "record 2 of .* has no 'id'"),
        ("[]", "labels.json contains no list of records"),
        ("3", "labels.json contains no list of records"),
        ("garbage", "labels.json cannot be read: Expecting value"),
        ('{"1": {"entities": []}, "1": {"entities": []}}', "has a duplicate key"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_labels_that_cannot_be_read_are_reported(
    config: Configure, tmp_path: Path, labels: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        articles.collect(_data(config, tmp_path, [_news(1)], labels))


@pytest.mark.parametrize("files", [None, (), ("a", "b"), "news.json"])
def test_one_folder_is_needed(config: Configure, tmp_path: Path, files: object) -> None:
    data = _data(config, tmp_path, [_news(1)], [_labels(1, "positive")])
    files = str(tmp_path / files) if isinstance(files, str) else files
    with pytest.raises(
        DataError, match=r"data\.files: data=aidf_news needs one folder with news\.json and labels\.json"
    ):
        articles.collect(data.model_copy(update={"files": files}))


def test_a_folder_in_a_list_of_one_is_accepted(config: Configure, tmp_path: Path) -> None:
    data = _data(config, tmp_path, [_news(1)], [_labels(1, "positive")])
    assert _found(articles.collect(data.model_copy(update={"files": (str(tmp_path),)}))) == [("1", "positive", None)]


def test_ties_need_an_order_of_classes(config: Configure, tmp_path: Path) -> None:
    data = _data(config, tmp_path, [_news(1)], [_labels(1, "positive")]).model_copy(update={"labels": None})
    with pytest.raises(DataError, match=r"data\.labels: source=articles needs the classes in the order"):
        articles.collect(data)


@pytest.mark.parametrize("codec", ["gb18030", "utf-8-sig"])
def test_the_encoding_is_detected_and_noted(config: Configure, tmp_path: Path, codec: str) -> None:
    data = _data(config, tmp_path, [_news(1, Title="利好消息，股价大涨")], [_labels(1, "positive")])
    file = tmp_path / "news.json"
    file.write_bytes(file.read_text(encoding="utf-8").encode(codec))
    rows = articles.collect(data)
    assert rows.frame["text"][0].startswith("利好消息，股价大涨")
    assert rows.notes[0].startswith("news.json: ")
