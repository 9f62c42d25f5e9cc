"""What a request may have depends on what the prompt of the served run asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finsa.serving import schemas
from finsa.serving.schemas import RefusedError

ROWS = {"rows": [{"text": "甲涨", "target": "甲"}]}


def _many(body: bytes) -> list[str]:
    return schemas.many_texts(body, 10)


@pytest.mark.parametrize(
    ("parse", "body", "message"),
    [
        (schemas.one_text, {"text": "甲涨", "target": "甲"}, "target: the prompt of this model asks for no target"),
        (_many, ROWS, 'rows: this model reads texts; send {"texts": ["...", "..."]}'),
    ],
)
def test_a_model_without_targets_says_what_to_send(
    parse: Callable[[bytes], Any], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        parse(json.dumps(body).encode())
    assert refused.value.status == 422
    assert refused.value.reason.startswith(message)


def test_a_model_with_targets_reads_rows() -> None:
    def read(row: dict[str, Any]) -> tuple[str, str | None]:
        return f"{row['target']}\n{row['text']}", None

    assert schemas.many_texts(json.dumps(ROWS).encode(), 10, read, targeted=True) == ["甲\n甲涨"]
    assert schemas.one_text(json.dumps(ROWS["rows"][0]).encode(), read, targeted=True) == "甲\n甲涨"
