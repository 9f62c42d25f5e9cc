"""The section ``published``: a table from a publication that runs are compared with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finsa.config.base import Name, Section

Score = Annotated[float, Field(ge=0, le=1)]
Count = NonNegativeInt
Scores = dict[Literal["accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall"], Score]


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
        base: the base model, as the source names it.
        billions: its number of parameters, in billions.
        training: how it was trained, in a few words.
        scores: as printed, as fractions of 1: accuracy, macro_f1, weighted_f1, macro_precision, macro_recall.
        by_data: the same by data set, for a table over several data sets.
        f1, recall: as printed, by label.
        confusion: confusion matrix: a row per true label, a column per predicted label, in the order of the table.
        unparsable: number of answers that name no label, by true label.
        correct: number of correct rows, if the table states it.
    """

    model: str | None = None
    method: str | tuple[str, ...] | None = None
    base: str | None = None
    billions: PositiveFloat | None = None
    training: str | None = None
    scores: Scores = Field(default_factory=dict)
    by_data: dict[str, Scores] = Field(default_factory=dict)
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


class PublishedRows(Section):
    """The test rows of one data set of a published table, as far as the source states them.

    Args:
        n: number of rows.
        support: rows by label.
        notes: caveats about this data set.
    """

    n: PositiveInt | None = None
    support: dict[str, PositiveInt] | None = None
    notes: tuple[str, ...] = ()


class Published(Section):
    """A published table that runs are compared with.

    Args:
        data: name of its data set in ``conf/``; of several data sets, the test rows of each by its name.
        n: number of test rows, if the source states it.
        support: test rows by label, if the source states them; its keys are the labels in the order of the table.
        decimals: number of decimals of the printed scores.
        facts: other figures from the source.
        notes: caveats for readers of the table.
    """

    name: Name
    source: str
    data: str | Annotated[dict[str, PublishedRows], Field(min_length=1)]
    n: PositiveInt | None = None
    support: dict[str, PositiveInt] | None = None
    decimals: PositiveInt
    rows: Annotated[dict[str, PublishedRow], Field(min_length=1)]
    facts: dict[str, Any]
    notes: tuple[str, ...]

    def of(self, data: str) -> Published | None:
        """The part about one data set of a table over several, None if there is none; other tables as they are."""
        if isinstance(self.data, str):
            return self
        if data not in self.data:
            return None
        test = self.data[data]
        rows = {
            name: row.model_copy(update={"scores": row.by_data[data]})
            for name, row in self.rows.items()
            if data in row.by_data
        }
        changed = {
            "data": data,
            "n": test.n,
            "support": test.support,
            "rows": rows,
            "notes": (*test.notes, *self.notes),
        }
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _check_totals(self) -> Published:
        tests = {self.data: PublishedRows(n=self.n, support=self.support)} if isinstance(self.data, str) else self.data
        if tests is self.data and (self.n, self.support) != (None, None):
            raise ValueError("n and support belong to each data set, below data, if a table names several")
        for data, test in tests.items():
            if test.support is not None and sum(test.support.values()) != test.n:
                of = "" if isinstance(self.data, str) else f" of {data}"
                raise ValueError(f"support{of} adds up to {sum(test.support.values())} rows, but n is {test.n}")
        for name, row in self.rows.items():
            if unknown := [data for data in row.by_data if tests is not self.data or data not in tests]:
                raise ValueError(f"by_data of {name} has {unknown[0]}, which is not below data")
            self._check_row(name, row, None if self.support is None else tuple(self.support.values()))
        return self

    def _check_row(self, name: str, row: PublishedRow, support: tuple[int, ...] | None) -> None:
        for key in ("confusion", "unparsable", "f1", "recall"):
            values = getattr(row, key)
            if values is not None and support is None:
                raise ValueError(f"{key} of {name} needs support, whose keys are its labels")
            if values is not None and len(values) != len(support or ()):
                raise ValueError(f"{key} of {name} has {len(values)} entries for {len(support or ())} labels")
        if support is not None and row.confusion is not None:
            unparsable = row.unparsable or (0,) * len(support)
            true = tuple(sum(line) + lost for line, lost in zip(row.confusion, unparsable, strict=False))
            if true != support:
                raise ValueError(f"the confusion matrix of {name} has {true} true rows, but support is {support}")
            if any(len(line) != len(support) for line in row.confusion):
                raise ValueError(f"the confusion matrix of {name} needs {len(support)} columns")
        if row.correct is not None and (self.n is None or row.correct > self.n):
            raise ValueError(f"{name} has {row.correct} correct rows of {self.n}")
        if row.pairs is not None and row.pairs.row not in self.rows:
            raise ValueError(f"{name} is paired with '{row.pairs.row}', which is not a row of the table")
