from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.table import Table as RichTable

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.ledger import Ledger
from finsa.evaluation import metrics, tables, value_metrics
from finsa.evaluation.tables import Table

Configure = Callable[..., RunConfig]
NAMES = ("利空", "中性", "利好")


def report(hits: int, n: int = 300) -> dict[str, object]:
    gold = [row % 3 for row in range(n)]
    return metrics.report(gold, [g if row < hits else (g + 1) % 3 for row, g in enumerate(gold)], NAMES)


def test_only_a_significant_win_is_marked() -> None:
    assert tables.clear_winner({"a": report(280), "b": report(150)}) == "a"
    assert tables.clear_winner({"a": report(280), "b": report(276)}) is None
    assert tables.clear_winner({"a": report(280)}) is None


def test_the_comparison_shows_every_report_with_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    tables.scores({"zero_shot": report(150), "lora": report(280)}, "a title").show()
    shown = capsys.readouterr().out
    low, high = report(280)["intervals"]["macro_f1"]  # type: ignore[index]
    assert "a title" in shown
    assert "zero_shot" in shown
    assert f"{report(280)['macro_f1']:.4f} ({low:.3f}-{high:.3f})" in shown


def test_the_comparison_is_written_with_the_same_numbers(tmp_path: Path) -> None:
    reports = {"zero_shot": report(150), "lora": report(280)}
    tables.write_comparison(reports, tmp_path / "sweep")
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open(encoding="utf-8")))
    assert [row["job"] for row in rows] == ["zero_shot", "lora"]
    assert float(rows[1]["macro_f1"]) == pytest.approx(reports["lora"]["macro_f1"], abs=1e-6)
    assert json.loads((tmp_path / "sweep" / "comparison.json").read_text(encoding="utf-8")) == reports


def test_reports_of_several_tasks_have_the_columns_of_each(tmp_path: Path) -> None:
    scale = LabelSpace(("0", "1"), ("low", "high"), "regression")
    numbers = value_metrics.report(scale, np.array([[0.1], [0.9]]), np.array([[0.0], [0.8]]))
    both = {"classes": metrics.report([0, 1], [0, 1], ["a", "b"]), "numbers": numbers}
    table = tables.scores(both, "both")
    cells = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert cells["numbers"]["RMSE"].startswith("0.1000 ")
    assert (cells["numbers"]["accuracy"], cells["classes"]["RMSE"]) == ("-", "-")
    assert table.marked is None  # scores of different tasks are not compared
    tables.write_comparison(both, tmp_path)
    with (tmp_path / "comparison.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["macro_f1"], first["rmse"], first["rmse_low"]) == ("1.000000", "", "")
    assert (second["macro_f1"], second["macro_f1_low"], second["rmse"]) == ("", "", "0.100000")


def test_a_report_shows_its_confusion_matrix(config: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_report(report(280), "by class", config("method=lora").method)
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)
    assert f"{report(280)['per_class']['利好']['f1']:.4f}" in shown  # type: ignore[index]


def test_of_many_classes_the_hardest_and_the_most_frequent_errors_are_shown(
    config: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """77 intents: one column per predicted class would not fit."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"intent_{number:02d}" for number in range(77)]
    gold = [number for number in range(77) for _ in range(4)]
    predicted = [5 if number == 40 else number for number in gold]
    tables.show_report(metrics.report(gold, predicted, names), "by class", config("method=tfidf_lr").method)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, shown)) <= 80
    assert len(shown) < 30
    assert any("intent_40 │    0.0000 │ 0.0000 │ 0.0000 │    4" in line for line in shown)
    assert any("10 of 77 classes, those with the lowest F1" in line for line in shown)
    assert any("intent_40│intent_05│4│100%" in "".join(line.split()) for line in shown)


def test_many_classes_are_counted_and_not_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    counts = {f"intent_{number:02d}": number for number in range(77)}
    tables.show_ledger(Ledger(splits={"train": counts}), {"train": 3})
    shown = capsys.readouterr().out
    assert "│ train │      76 │                    0 │             76 │ " in shown
    assert "2,926" in shown
    assert "intent_00" not in shown


# ------------------------------------------------------------------------------------------------ widths

TABLE = Table(
    "成绩 Scores",
    ["arm", "runs", "accuracy", "macro-F1", "weighted-F1", "macro-P", "macro-R", "看涨情绪"],
    [
        [
            name,
            "1",
            "0.7250 (0.6391-0.7970)",
            "0.7252 (0.6431-0.8016)",
            "0.7267 (0.6463-0.8030)",
            "0.7",
            "0.6",
            "0.0874",
        ]
        for name in ("lora_response data.name=股吧评论", "lora")
    ],
    "In parentheses: 95 % intervals",
    optional=(7, 6, 5, 4, 1),
)


def shown_at(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    TABLE.show()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("width", "hidden"),
    [
        (60, ["runs", "weighted-F1", "macro-P", "macro-R", "看涨情绪"]),
        (80, ["weighted-F1", "macro-P", "macro-R", "看涨情绪"]),
        (100, ["macro-R", "看涨情绪"]),
        (120, []),
    ],
)
def test_a_table_fits_the_width_without_cutting_words_or_borders(
    width: int, hidden: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown_at(width, monkeypatch, capsys)
    assert max(map(cell_len, lines)) <= width
    body = [line.rstrip() for line in lines if line[:1] in "┏┡┃│└"]
    assert {line[-1] for line in body} == set("┓┩┃│┘")
    assert len({cell_len(line) for line in body}) == 1
    words = " ".join(body).split()
    kept = [name for name in TABLE.columns if name not in hidden]
    for text in ["lora_response", "data.name=股吧评论", "0.7252", "(0.6431-0.8016)", *kept]:
        assert text in words, text
    note = f"Not shown at this width: {', '.join(hidden)}." if hidden else ""
    assert ("Not shown" in " ".join(lines)) == bool(hidden)
    assert note in " ".join(" ".join(lines).split())


def test_without_a_width_a_table_is_as_wide_as_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe or a file: 120 columns, more if the words need them, and no column is omitted."""
    monkeypatch.delenv("COLUMNS", raising=False)
    table = RichTable()
    for number in range(40):
        table.add_column(f"column{number}")
    table.add_row(*(f"value{number}" for number in range(40)))
    tables.show(table, optional=range(39, 0, -1))
    words = capsys.readouterr().out.split()
    for number in range(40):
        assert f"column{number}" in words
        assert f"value{number}" in words


@pytest.mark.parametrize("width", [80, 100, 120])
def test_all_tables_of_a_run_fit_the_width(
    width: int, config: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    labels = [f"看涨情绪第{number}类" for number in range(12)]
    gold = [row % 12 for row in range(240)]
    found = metrics.report(gold, [(one + row // 200) % 12 for row, one in enumerate(gold)], labels)
    tables.show_report(found, "by class", config("method=lora").method)
    tables.scores({"Qwen2.5-0.5B-Instruct (zero-shot)": found, "lora_response": found}, "compared").show()
    ledger = Ledger(splits={"train": dict.fromkeys(labels, 20_000), "test": dict.fromkeys(labels, 1234)})
    tables.show_ledger(ledger, {"train": 7})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line.rstrip()[-1] in "┓┩┃│┘" for line in lines if line[:1] in "┏┡┃│└")
    text = " ".join(lines)
    for word in ("precision", "recall", "Not shown at this width: → 看涨情绪第", "total", "truncated", "240,000"):
        assert word in text, word


# ------------------------------------------------------------------------------------------------ advice


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("majority", None),
        ("tfidf_lr", ""),
        ("encoder", "More epochs (method.baseline.epochs) or another method.baseline.learning_rate may help."),
        ("classifier", "More steps (train.epochs, train.max_steps) or another train.learning_rate may help."),
        (
            "zero_shot",
            "Label words that the model knows in the prompt's language may help: data.labels sets the word for each "
            "class, as in {negative: <word>, neutral: <word>, positive: <word>}.",
        ),
        (
            "lora",
            "More steps (train.epochs, train.max_steps) or another train.learning_rate may help. Label words that the "
            "model knows in the prompt's language may help: data.labels sets the word for each class, as in {negative: "
            "<word>, neutral: <word>, positive: <word>}.",
        ),
    ],
)
def test_one_predicted_label_for_all_rows_is_noted_with_advice_for_the_method(
    method: str, advice: str | None, config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    same = metrics.report([0, 1, 2], [2, 2, 2], ("negative", "neutral", "positive"))
    tables.show_report(same, "by class", config(f"method={method}").method)
    shown = " ".join(capsys.readouterr().out.split())
    if advice is None:
        assert "note:" not in shown
    else:
        assert shown.endswith(f"note: every row was predicted as positive. {advice}".rstrip())


@pytest.mark.parametrize("method", ["zero_shot", "lora"])
def test_label_words_already_in_use_are_not_advised(
    method: str, config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.show_report(metrics.report([0, 1, 2], [2, 2, 2], NAMES), "by class", config(f"method={method}").method)
    shown = capsys.readouterr().out
    assert "note: every row was predicted as 利好." in shown
    assert "Label words" not in shown


def test_rows_filtered_by_the_command_are_counted_without_examples(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger()
    for fate in ("filtered: data.split.rows.train=60", "unknown label"):
        ledger.buckets[fate] = 3
        ledger.examples[fate] = ["train.csv:1: a text [a]"]
    tables.show_losses(ledger)
    shown = capsys.readouterr().out
    assert "unknown label" in shown
    assert "filtered" not in shown


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00004, "0.0000"), (0.0, "0.0000"), (-0.00005001, "-0.0001"), (0.25, "+0.2500")]
)
def test_a_difference_that_rounds_to_zero_has_no_sign(value: float, text: str) -> None:
    assert tables.format_value("difference_low", value) == text
