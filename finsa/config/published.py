"""The section ``published``: a table from a publication that runs are compared with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from finsa.config.base import Name, Section

Score = Annotated[float, Field(ge=0, le=1)]
Count = NonNegativeInt


class Pairs(Section):
    """Paired comparison of a published row with another row of its table.

    Args:
        row: name of the other row.
        fixed: questions that only this row answers correctly.
        broken: questions that only the other row answers correctly.
        p: p-value of the exact McNemar test, as published.
    """

    row: str
    fixed: Count
    broken: Count
    p: Score


class PublishedRow(Section):
    """One row of a published table; these are data, so what the source does not state is left out.

    Args:
        model, method: their names in ``conf/``, by which runs are matched with the row; a method may have several
            names.
        scores: as printed, as fractions of 1: accuracy, macro_f1, weighted_f1, macro_precision, macro_recall.
        f1, recall: as printed, by label.
        confusion: confusion matrix: a row per true label, a column per predicted label, in the order of the table.
        unparsable: number of answers that name no label, by true label.
        correct: number of correct rows, if the table states it.
    """

    model: str | None = None
    method: str | tuple[str, ...] | None = None
    scores: dict[Literal["accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall"], Score] = Field(
        default_factory=dict
    )
    f1: tuple[Score, ...] | None = None
    recall: tuple[Score, ...] | None = None
    confusion: tuple[tuple[Count, ...], ...] | None = None
    unparsable: tuple[Count, ...] | None = None
    correct: Count | None = None
    pairs: Pairs | None = None
    note: str | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its method."""
        return (self.method,) if isinstance(self.method, str) else self.method or ()


class Published(Section):
    """A published table that runs are compared with.

    Args:
        data: name of its data set in ``conf/``.
        n: number of test rows.
        support: test rows by label; its keys are the labels in the order of the table.
        decimals: number of decimals of the printed scores.
        facts: other figures from the source.
        notes: caveats for readers of the table.
    """

    name: Name
    source: str
    data: str
    n: PositiveInt
    support: dict[str, PositiveInt]
    decimals: PositiveInt
    rows: Annotated[dict[str, PublishedRow], Field(min_length=1)]
    facts: dict[str, Any]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _check_totals(self) -> Published:
        support = tuple(self.support.values())
        if sum(support) != self.n:
            raise ValueError(f"support adds up to {sum(support)} rows, but n is {self.n}")
        for name, row in self.rows.items():
            unparsable = row.unparsable or (0,) * len(support)
            true = tuple(sum(line) + lost for line, lost in zip(row.confusion or (), unparsable, strict=False))
            if row.confusion is not None and true != support:
                raise ValueError(f"the confusion matrix of {name} has {true} true rows, but support is {support}")
            for key in ("confusion", "unparsable", "f1", "recall"):
                values = getattr(row, key)
                if values is not None and len(values) != len(support):
                    raise ValueError(f"{key} of {name} has {len(values)} entries for {len(support)} labels")
            if any(len(line) != len(support) for line in row.confusion or ()):
                raise ValueError(f"the confusion matrix of {name} needs {len(support)} columns")
            if row.correct is not None and row.correct > self.n:
                raise ValueError(f"{name} has {row.correct} correct rows of {self.n}")
            if row.pairs is not None and row.pairs.row not in self.rows:
                raise ValueError(f"{name} is paired with '{row.pairs.row}', which is not a row of the table")
        return self
