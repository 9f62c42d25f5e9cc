"""Class order is fixed once: as configured, or sorted."""

from __future__ import annotations

from collections.abc import Callable

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace

Configure = Callable[..., RunConfig]


def test_labels_found_are_sorted_and_distinct(config: Configure) -> None:
    labels = LabelSpace.of(config("data=table").data, iter(["b", "c", "a", "b"]))
    assert labels == LabelSpace(("a", "b", "c"), ("a", "b", "c"))
    assert len(labels) == 3


def test_configured_order_is_kept(config: Configure) -> None:
    data = config("data=table", "data.labels=[positive,negative,neutral]").data
    assert LabelSpace.of(data, ["neutral"]) == LabelSpace(
        ("positive", "negative", "neutral"), ("positive", "negative", "neutral")
    )


def test_map_gives_names_and_words(config: Configure) -> None:
    data = config("data=table", "data.labels={2: '看涨', 0: '看跌'}").data
    assert LabelSpace.of(data, ["0", "1"]) == LabelSpace(("2", "0"), ("看涨", "看跌"))


def test_sample_has_the_published_order(config: Configure) -> None:
    assert LabelSpace.of(config().data, []).names == ("利空", "中性", "利好")
