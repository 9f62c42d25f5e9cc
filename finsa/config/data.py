"""The section ``data``: where the rows come from, how they are cleaned and split, and the prompt around a text."""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from finsa.config.base import MEASURES, FolderName, Fraction, Label, Name, Section, placeholders

Files = str | tuple[str, ...]
Policy = Literal["error", "drop", "keep"]
_WIDE = re.compile("[\uff01-\uff5e\u3000]")  # full-width forms
SplitFraction = Annotated[float, Field(gt=0, lt=0.5)]
Days = Annotated[float, Field(ge=0, le=100_000)]


class Columns(Section):
    """Column names in the user's files; null: there is no such column.

    Args:
        target: the entity, company or aspect of the text that the label refers to; then a row is a text and a target.
        rejected: a wrong label of each training row, for methods that learn from pairs; the others ignore it.
        rationale: the thought before the answer, of training rows; used with ``model.think=open``.
        time: when the text was written: a date, or a date with a time of day. Runs then also report scores by period.
    """

    id: str | None
    text: str
    label: str
    target: str | None
    rejected: str | None
    domain: str | None
    parent: str | None
    group: str | None
    rationale: str | None
    time: str | None


class SplitRows(Section):
    """Maximum number of rows per split; null: all.

    Args:
        train, validation, test: a larger split is subsampled in proportion to its classes.
        seed: of the subsample; null: ``data.split.seed``.
    """

    train: PositiveInt | None
    validation: PositiveInt | None
    test: PositiveInt | None
    seed: NonNegativeInt | None


class Split(Section):
    """How rows are split if the files do not define splits.

    ``by_class``: the published rule of FinNF: shuffle each class of n rows, validation = max(1, floor(fraction * n)),
    the same for test, the rest is training. ``random``: the published rule of AIDF: test = ceil(fraction * n) of all n
    rows, then validation = ceil(fraction / (1 - test fraction) * rest), regardless of class. ``stratified``:
    scikit-learn's proportional sizes. ``time``: the latest rows are the test split, those before them validation, and
    the earliest are training rows; it needs ``data.columns.time``. Of a family or group, only the rows in its latest
    split are used.

    Args:
        purge: of ``time``: rows less than so many days before the next split are removed, because their labels may
            depend on what happened then (López de Prado 2018).
        embargo: of ``time``: validation and test rows less than so many days after the previous split are removed,
            because they are similar to its last rows.
    """

    rule: Literal["by_class", "random", "stratified", "time"]
    validation: SplitFraction
    test: SplitFraction
    seed: NonNegativeInt
    purge: Days
    embargo: Days
    rows: SplitRows


class Csv(Section):
    """Format of the user's files; null: detected, or an error if that is ambiguous.

    Args:
        header: of CSV, TSV and xlsx files: true: the first row; false: there is none, and the columns are named
            column 1, column 2 and so on; a number: that line; a list: there is none, and these are the names.
    """

    delimiter: Annotated[str, Field(min_length=1)] | None
    encoding: str | None
    header: bool | PositiveInt | Annotated[tuple[str, ...], Field(min_length=1)] | None
    quotes: bool | None

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None) -> str | None:
        delimiter = "\t" if delimiter == "\\t" else delimiter
        words = ("comma", "semicolon", "tab", "pipe")
        if delimiter is not None and delimiter not in words and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError(f"needs one character, or {', '.join(words)}")
        return delimiter

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        try:
            known = encoding is None or codecs.lookup(encoding)._is_text_encoding
        except LookupError:
            known = False
        if not known:
            raise ValueError(f"unknown encoding '{encoding}'; known ones are utf-8, utf-16, gb18030, big5, cp1252 etc.")
        return encoding


class Hub(Section):
    """A data set on the hub, or a local folder that the datasets library can load.

    Args:
        splits: name of each of our splits in the data set; a split that is null or missing is taken from the training
            rows.
    """

    id: str | None
    config: str | None
    revision: str
    splits: dict[Literal["train", "validation", "test"], str | None]


class Articles(Section):
    """News articles with one sentiment per entity, in the format of AIDF: two JSON files that are joined by id."""

    news: str
    labels: str
    id: str
    parts: Annotated[tuple[str, ...], Field(min_length=1)]
    kind: str | None
    kinds: tuple[str, ...] | None
    skipped: tuple[str, ...]
    entities: str
    sentiment: str


class Near(Section):
    """Detection of near duplicates across splits: MinHash over character shingles (Broder 1997)."""

    threshold: Annotated[float, Field(gt=0, le=1)]
    shingle: PositiveInt
    permutations: Annotated[int, Field(ge=16)]


class Generator(Section):
    """Settings of the synthetic data generator.

    Args:
        days: the rows get a time within so many days from 2023-01-01 on; null: no time.
        drift: share of the rows, by construction, whose bullish and bearish labels are exchanged in the last third of
            the days, so that a model of earlier rows is wrong about them.
    """

    rows: PositiveInt
    seed: NonNegativeInt
    domains: dict[str, PositiveFloat]
    imbalance: dict[str, dict[str, NonNegativeFloat]] | None
    noise: Fraction
    days: PositiveInt | None
    drift: Fraction

    @model_validator(mode="after")
    def _check_drift(self) -> Generator:
        if self.drift and self.days is None:
            raise ValueError("drift is a change over time, so it needs generator.days")
        return self


class Corpus(Section):
    """Documents for pre-training: generated ones, or the user's files."""

    files: Files | None
    column: str
    documents: PositiveInt | None
    role: Literal["macro", "micro", "quant"] | None
    seed: NonNegativeInt
    block: PositiveInt
    vocabulary: Annotated[int, Field(ge=1000)] | None


class Data(Section):
    """A data set of labeled texts, and the prompt around a text.

    Args:
        task: ``ordinal``: the labels are levels in the order of ``data.labels``; reports also have the mean distance of
            the levels and the quadratic kappa, predictions the expected level. ``regression``: the label column
            contains numbers, and ``data.labels`` names a word for some of them, the anchors, the first and the last of
            which limit the range; the predicted number is the expectation over the anchors, or the output of a head.
            ``multi_label``: a row has any number of the labels.
        separator: between the labels of a row, in the label column of ``multi_label``; its cells may also be lists.
        answers: of ``multi_label``: the answers that a label applies and that it does not, each with ``{label}``; their
            probabilities after the prompt are compared for each label.
        files: folder, file, glob pattern or a list of them, whose file and folder names indicate the splits; or a map
            from train, validation and test to such paths. With source=hub they are read instead of the hub's.
        prompt: contains ``{text}`` once, and optionally ``{target}`` once and ``{labels}``; the label follows it. In a
            command, ``\\n`` is a line break and ``\\t`` a tab, here and in ``answers``.
        corrections: a CSV file of decisions about single rows (keep, relabel, drop), as the page of ``stage=noise``
            writes it.
    """

    name: Name
    task: Literal["classification", "ordinal", "regression", "multi_label"]
    source: Literal["table", "alpaca", "messages", "articles", "hub", "mixture"]
    files: Files | dict[Literal["train", "validation", "test"], Files] | None
    csv: Csv
    hub: Hub | None
    articles: Articles | None
    parts: dict[Name, Data] | None
    ratios: dict[str, PositiveFloat] | None
    columns: Columns
    options: tuple[str, ...] | None
    turns: Literal["all", "last"]
    extract: str | None
    label_map: dict[str, Label] | None
    labels: tuple[Label, ...] | dict[Label, Label] | None
    separator: Annotated[str, Field(min_length=1)]
    answers: tuple[str, str] | None
    prompt: str
    max_length: Annotated[int, Field(ge=8)]
    split: Split
    domain: FolderName | None
    on_unknown_label: Policy
    on_duplicate: Policy
    on_conflict: Policy
    on_leak: Policy
    near_duplicates: Near
    corrections: str | None
    cache: str | None
    generator: Generator | None
    corpus: Corpus | None
    origin: str | None

    @property
    def from_hub(self) -> bool:
        """Whether the rows are loaded by the datasets library; local files take precedence."""
        return self.source == "hub" and self.files is None

    @property
    def title(self) -> str:
        """Name of the data set in run names and reports."""
        return data_title(self.model_dump(mode="json"))

    @property
    def has_target(self) -> bool:
        """Whether rows have a target, so that the same text with another target is another row."""
        return self.columns.target is not None or any(part.has_target for part in (self.parts or {}).values())

    @property
    def asks_for_target(self) -> bool:
        """Whether a method reads the target of a row, besides its text."""
        return "target" in placeholders(self.prompt)

    @model_validator(mode="after")
    def _check(self) -> Data:
        needed = {"hub": self.hub, "articles": self.articles, "mixture": self.parts}
        if self.source in needed and not needed[self.source]:
            section = "parts" if self.source == "mixture" else self.source
            raise ValueError(f"source={self.source} needs data.{section}; see conf/data/ for a file that has it")
        if self.ratios and set(self.ratios) != set(self.parts or {}):
            raise ValueError(f"ratios must name all of the parts: {', '.join(self.parts or {}) or 'there are none'}")
        sections = self.parts.values() if self.source == "mixture" and self.parts else [self]
        self._check_task()
        if self.split.rule == "time" and self.source != "mixture" and self.columns.time is None:
            raise ValueError("split.rule=time needs columns.time, the name of the column with the time of each row")
        if self.asks_for_target and any(section.columns.target is None for section in sections):
            raise ValueError("prompt contains {target}, so columns.target must name the column of the target")
        if self.corpus is not None and self.corpus.files is None and self.corpus.documents is None:
            raise ValueError("corpus needs corpus.documents (how many to generate) or corpus.files (where they are)")
        return self

    def _check_task(self) -> None:
        """Refuse labels and settings that do not suit the task."""
        task, names = self.task, list(self.labels or ())
        if self.answers is not None and task != "multi_label":
            raise ValueError(f"data.answers is for task=multi_label, and this is task={task}; leave it out")
        for name, part in (self.parts or {}).items():
            if part.task in MEASURES:
                raise ValueError(f"parts.{name}.task={part.task} needs a data set of its own")
        if task == "classification":
            return
        if task in MEASURES and self.corrections is not None:
            raise ValueError(f"data.corrections are for one class per row, and this is task={task}; leave it out")
        if self.labels is None:
            needed = {"ordinal": "the levels from lowest to highest", "multi_label": "the labels that a row may have"}
            text = needed.get(task, "the words of some numbers, as in {-1: negative, 0: neutral, 1: positive}")
            raise ValueError(f"task={task} needs data.labels, {text}")
        if task == "ordinal" and self.on_unknown_label == "keep":
            raise ValueError("task=ordinal does not support on_unknown_label=keep, which adds labels without an order")
        if task == "ordinal":
            return
        if self.source == "mixture" or self.options or self.on_unknown_label == "keep":
            what = "source=mixture" if self.source == "mixture" else "data.options" if self.options else ""
            raise ValueError(f"task={task} does not support {what or 'on_unknown_label=keep, which adds a class'}")
        if task == "regression":
            values = [finite_number(name) for name in names]
            if None in values or values != sorted(set(values), key=float):  # type: ignore[arg-type]
                raise ValueError(
                    f"task=regression needs data.labels to be numbers in ascending order; they are {', '.join(names)}"
                )
        elif any(self.separator in name for name in names):
            raise ValueError(f"a label contains the separator '{self.separator}'; set another data.separator")

    @field_validator("answers", mode="before")
    @classmethod
    def _check_answers(cls, answers: Any) -> Any:
        if isinstance(answers, list | tuple) and all(isinstance(answer, str) for answer in answers):
            example = "as in '{label}: yes', '{label}: no'"
            if len(answers) != 2:
                raise ValueError(f"needs two answers, that a label applies and that it does not, {example}")
            if any(answer.count("{label}") != 1 for answer in answers):
                raise ValueError(f"each of the two answers needs {{label}} exactly once, {example}")
            if len({"".join(answer.split()) for answer in answers}) == 1:
                raise ValueError(f"the two answers must be different, {example}")
            return tuple(answers)  # strict types accept no list from a validator
        return answers

    @field_validator("extract")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ValueError(f"is not a valid regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"needs exactly one group, which matches the text, and has {groups}")
        return pattern

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        fields = placeholders(prompt)
        if fields.count("text") != 1 or fields.count("target") > 1 or set(fields) - {"text", "target", "labels"}:
            raise ValueError("needs {text} exactly once, may have {target} once and {labels}, and no other {field}")
        return prompt

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...] | dict[str, str] | None) -> tuple[str, ...] | dict[str, str] | None:
        if labels is None:
            return labels
        words = list(labels.values()) if isinstance(labels, dict) else list(labels)
        if len(words) < 2:
            raise ValueError("needs at least two labels")
        if len(set(words)) < len(words) or not all(word.strip() for word in words):
            raise ValueError("label words must be different from each other and not empty")
        return labels


def finite_number(text: str) -> float | None:
    """The number that a text represents; None if it is not a finite one.

    Full-width digits are read; superscripts are not, nor Python's underscores, as in 1_000.
    """
    written = "".join(unicodedata.normalize("NFKC", one) if _WIDE.match(one) else one for one in text)
    try:
        value = float(written.replace("\u2212", "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in written else None


def data_title(data: Mapping[str, Any]) -> str:
    """Name of a data set in run names and reports: for general choices such as ``table``, that of its files.

    Args:
        data: the section as plain values, as in a run's ``config.yaml``.
    """
    if data["name"] != data["source"]:
        return str(data["name"])
    if data.get("parts"):
        return "_".join(data_title(part) for part in data["parts"].values())[:60]
    files = (data.get("hub") or {}).get("id") if data["source"] == "hub" else data.get("files")
    while isinstance(files, dict | list | tuple):
        files = next(iter(files.values() if isinstance(files, dict) else files), None)
    if not files:
        return str(data["name"])
    path = Path(str(files))
    stem = path.name.partition(".")[0] if path.suffix else path.name
    if any(sign in path.name for sign in "*?[") or stem in ("train", "valid", "validation", "test", "data"):
        stem = path.absolute().parent.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("_.")[:60] or str(data["name"])
