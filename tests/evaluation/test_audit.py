"""Answers read by the rules of publications: planted answers, with scores that scikit-learn computes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from finsa.config import AuditStage, RunConfig
from finsa.errors import DataError, RunError
from finsa.evaluation import audit

Configure = Callable[..., RunConfig]
LABELS = ("negative", "neutral", "positive")
# True labels by row, answered labels by column: read as labels, the weighted F1 is .8414; by FinLoRA's rule, .9086.
PLANTED = ((27, 0, 3), (10, 49, 1), (6, 0, 24))


def stage_of(config: Configure, *words: str) -> AuditStage:
    stage = config("stage=audit", "input=somewhere", *words).stage
    assert isinstance(stage, AuditStage)
    return stage


def planted(form: str) -> tuple[list[str], list[str]]:
    """True labels, and answers that are the label in a form, such as ``{}.``."""
    pairs = [
        (LABELS[gold], form.format(LABELS[found]))
        for gold, row in enumerate(PLANTED)
        for found, count in enumerate(row)
        for _ in range(count)
    ]
    return [gold for gold, _ in pairs], [answer for _, answer in pairs]


def scores(config: Configure, *systems: audit.System) -> dict[tuple[str, str], dict[str, float]]:
    records, _ = audit.audit(systems, stage_of(config))
    return {(record["system"], record["rule"]): record for record in records}


def test_the_same_answers_have_two_weighted_f1_scores(config: Configure) -> None:
    """As labels with a full stop: every rule reads them, but FinLoRA's keeps a wrong one as text, which is no class."""
    gold, answers = planted("{}.")
    by_rule = scores(config, audit.System("a", gold, answers))
    read = [answer.strip(".") for answer in answers]
    true = f1_score(gold, read, average="weighted")
    as_published = f1_score(
        gold,
        [one if one == label else text for label, one, text in zip(gold, read, answers, strict=True)],
        average="weighted",
    )
    assert (round(true, 3), round(as_published, 3)) == (0.841, 0.909)
    for rule in ("strict", "fingpt", "flare", "finllm"):
        assert by_rule["a", rule]["weighted_f1"] == pytest.approx(true)
        assert by_rule["a", rule]["macro_f1"] == pytest.approx(f1_score(gold, read, average="macro"))
    assert by_rule["a", "finlora"]["weighted_f1"] == pytest.approx(as_published)
    assert by_rule["a", "finlora"]["accuracy"] == pytest.approx(accuracy_score(gold, read)) == pytest.approx(100 / 120)
    assert by_rule["a", "aidf"]["accuracy"] == 0
    low, high = (by_rule["a", "finlora"][f"weighted_f1_{end}"] for end in ("low", "high"))
    assert low < as_published < high
    assert true < high - 0.05
    _, remarks = audit.audit([audit.System("a", gold, answers)], stage_of(config))
    assert remarks[0] == f"Weighted F1: 0.0000 (aidf) to {as_published:.4f} (finlora)."
    _, remarks = audit.audit([audit.System("a", gold, gold)], stage_of(config))
    assert remarks[0] == "Weighted F1 is 1.0000 by every rule."


def test_a_wrong_answer_that_is_exactly_a_label_is_a_false_positive_for_finlora_too(config: Configure) -> None:
    gold, answers = planted("{}")
    by_rule = scores(config, audit.System("a", gold, answers))
    for rule in ("finlora", "fingpt", "aidf", "strict"):
        assert by_rule["a", rule]["weighted_f1"] == pytest.approx(f1_score(gold, answers, average="weighted"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("POSITIVE.", {"strict": 2, "fingpt": 2, "finlora": 2, "flare": 2, "aidf": None, "finllm": 2}),
        (
            "The answer is neutral",
            {"strict": None, "fingpt": 1, "finlora": None, "flare": 1, "aidf": None, "finllm": 1},
        ),
        ("no idea", {"strict": None, "fingpt": 1, "finlora": None, "flare": None, "aidf": None, "finllm": None}),
        # Both labels: the searches differ in their order.
        ("positive, not negative", {"strict": None, "fingpt": 2, "finlora": 2, "flare": 0, "aidf": None, "finllm": 2}),
        ("negative, not positive", {"strict": None, "fingpt": 2, "finlora": None, "flare": 0, "finllm": 2}),
        ("<think>negative?</think> positive", {"strict": 2, "fingpt": 2, "finlora": 2, "flare": 2, "aidf": 2}),
        ("", {"strict": None, "fingpt": 1, "finlora": None, "flare": None, "aidf": None, "finllm": None}),
    ],
)
def test_an_answer_about_a_positive_row(config: Configure, answer: str, expected: dict[str, int | None]) -> None:
    rules = stage_of(config).reading_rules
    assert {rule: audit.read(answer, 2, LABELS, rules[rule]) for rule in expected} == expected


def test_a_rule_can_change_the_order_of_two_systems(config: Configure) -> None:
    """One system answers in words and is right more often; FinLoRA ignores errors in the other's sentences."""
    gold, words = planted("{}")
    fewer = [
        label if label != answer and place % 4 == 0 else answer
        for place, (label, answer) in enumerate(zip(gold, words, strict=True))
    ]
    first, second = audit.System("words", gold, fewer), audit.System("sentences", gold, planted("It is {}.")[1])
    records, remarks = audit.audit([first, second], stage_of(config))
    rank = {(record["system"], record["rule"]): record["weighted_f1_rank"] for record in records}
    assert [rank["words", rule] for rule in ("strict", "fingpt", "flare", "finlora")] == [1, 1, 1, 2]
    value = {(record["system"], record["rule"]): f"{record['weighted_f1']:.4f}" for record in records}
    assert remarks[1 if "macro" in remarks[0] else 0] == (
        f"By finlora, sentences has a higher weighted-F1 than words ({value['sentences', 'finlora']}, "
        f"{value['words', 'finlora']}); strictly read, a lower one (0.0000, {value['words', 'strict']})."
    )


def test_a_rule_whose_labels_are_missing_is_left_out(config: Configure) -> None:
    records, remarks = audit.audit([audit.System("a", ["利好", "利空"], ["利好。", "利好"])], stage_of(config))
    assert {record["rule"] for record in records} == {"strict", "finlora", "flare", "aidf", "finllm"}
    assert "The rule fingpt was left out: the gold labels do not have all of its labels." in remarks
    assert records[0]["accuracy"] == 0.5


def test_rules_apply_to_labels_in_another_case(config: Configure) -> None:
    gold, answers = ["Positive", "Negative", "Neutral"], ["It is positive", "NEGATIVE", "unclear"]
    records, _ = audit.audit([audit.System("a", gold, answers)], stage_of(config))
    assert {record["rule"]: record["accuracy"] for record in records}["fingpt"] == 1
    spelled = stage_of(config, "stage.labels=[Positive,Neutral,Negative]")
    records, _ = audit.audit([audit.System("a", gold, answers)], spelled)
    assert {record["rule"]: record["accuracy"] for record in records}["fingpt"] == 1


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_files_are_read_by_their_columns(config: Configure, tmp_path: Path) -> None:
    """A CSV with the columns of FinGPT's code, and the answers of a run folder, in their order."""
    table = write(
        tmp_path / "a.csv",
        [{"target": "positive", "out_text": "It is\npositive"}, {"target": "neutral", "out_text": ""}],
    )
    (tmp_path / "run").mkdir()
    answers = [{"id": "1", "gold": "positive", "answer": "negative", "label": "negative"}]
    (tmp_path / "run" / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    loaded = audit.load([str(table), str(tmp_path / "run")], stage_of(config))
    assert loaded == [
        audit.System("a", ["positive", "neutral"], ["It is\npositive", ""]),
        audit.System("run", ["positive"], ["negative"]),
    ]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (
            [{"text": "t", "answer": "a"}],
            (),
            r"has no column gold or target or label or output, only text, answer; .*stage.gold",
        ),
        (
            [{"gold": "positive", "text": "a"}],
            (),
            r"has no column answer or .*, only gold, text; .* stage.answer=\[<column>\]",
        ),
        ([{"gold": "", "answer": "a"}], (), "line 2: gold is empty"),
    ],
)
def test_wrong_files(
    config: Configure, tmp_path: Path, rows: list[dict[str, str]], words: tuple[str, ...], message: str
) -> None:
    file = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=message):
        audit.load([str(file)], stage_of(config, *words))


def test_wrong_inputs(config: Configure, tmp_path: Path) -> None:
    stage = stage_of(config)
    with pytest.raises(DataError, match="input: there is no file"):
        audit.load([str(tmp_path / "a.csv")], stage)
    with pytest.raises(
        RunError, match=r"has no generated answers \(answers.jsonl\); python run.py stage=evaluate stage.protocol"
    ):
        audit.load([str(tmp_path)], stage)
    (tmp_path / "b.csv").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="input: .*b.csv is empty"):
        audit.load([str(tmp_path / "b.csv")], stage)
    (tmp_path / "b.csv").write_text("gold,answer\n", encoding="utf-8")
    with pytest.raises(DataError, match="input: .*b.csv has no rows"):
        audit.load([str(tmp_path / "b.csv")], stage)
    with pytest.raises(DataError, match="stage.labels: up, Up: two of them are the same"):
        audit.audit([audit.System("a", ["up"], ["up"])], stage_of(config, "stage.labels=[up,Up]"))
    texts = [f"text {number}" for number in range(60)]
    with pytest.raises(DataError, match="60 different gold labels"):
        audit.audit([audit.System("a", texts, texts)], stage)
    with pytest.raises(DataError, match="a has the gold label 'up'; stage.labels are negative, positive"):
        audit.audit([audit.System("a", ["up"], ["up"])], stage_of(config, "stage.labels=[negative,positive]"))
