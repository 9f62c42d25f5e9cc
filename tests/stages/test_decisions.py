"""Abstaining and label sets in predict, evaluate, serve and report; cascades; cost of answers."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from few import FEW

from finsa.config import RunConfig, read_section
from finsa.errors import ConfigError, FinsaError, RunError
from finsa.evaluation import calibration, cascades, costs, finished_runs, metrics, selective, statistics
from finsa.inference import predictor
from finsa.serving import schemas
from finsa.serving.batching import Batcher
from finsa.stages import cascade, evaluate, export, predict, report, train

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
LIMITS = ("stage.risk=0.4", "stage.coverage=0.8")


@pytest.fixture(scope="module")
def last(trained: Trained) -> Path:
    return trained("lora_response")


@pytest.fixture(scope="module")
def cheap(config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cheap")
    done = train.run(config("method=tfidf_lr", FEW, "tracking=none", f"output_dir={place}"))
    assert done.run_dir is not None
    return done.run_dir


@pytest.fixture(scope="module")
def composed(config: Compose, cheap: Path, last: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cascade")
    words = ("stage.tolerance=0.3", "tracking=none", f"output_dir={place}")
    # The language model is trained for a few steps and is worse than the classifier, so it comes first here.
    done = cascade.run(config("stage=cascade", f"runs=[{last},{cheap}]", *words))
    assert done.run_dir is not None
    return done.run_dir


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def labels_of(run: Path) -> tuple[str, ...]:
    return tuple(json.loads((run / "run.json").read_text(encoding="utf-8"))["labels"])


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def saved(run: Path, name: str = selective.FILE) -> selective.Rows:
    rows = selective.read(run / name, labels_of(run), (None, "validation"))
    assert rows is not None
    return rows


def test_a_run_saves_the_validation_predictions_that_its_temperature_was_fitted_on(cheap: Path, last: Path) -> None:
    for run in (cheap, last):
        known = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["calibration"]["validation"]
        records, names = lines(run / selective.FILE), labels_of(run)
        assert len(records) == known["n"]
        log_probs = np.array([[record["log_probs"][name] for name in names] for record in records])
        gold = [names.index(record["gold"]) for record in records]
        assert calibration.loss(log_probs, gold) == pytest.approx(known["loss_uncalibrated"], abs=1e-5)
        temperature = json.loads((run / "run.json").read_text(encoding="utf-8"))["calibration"]["temperature"]
        np.testing.assert_allclose(metrics.probabilities(log_probs, temperature), saved(run).probs, atol=2e-5)


def test_files_get_both_columns_by_the_rule_of_the_saved_predictions(
    config: Compose, cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [record["text"] for record in lines(cheap / "predictions.jsonl")]
    pl.DataFrame({"text": texts, "abstain": ["?"] * len(texts)}).write_csv(tmp_path / "in.csv")
    words = ("stage=predict", f"run={cheap}", f"input={tmp_path / 'in.csv'}")
    for name in ("out.csv", "out.parquet"):
        predict.run(config(*words, f"output={tmp_path / name}", *LIMITS))
    predict.run(config(*words, f"output={tmp_path / 'plain.csv'}"))
    options = config("stage=report", "runs=x", *LIMITS).stage
    assert isinstance(options, selective.Selection)
    rows, test = saved(cheap), saved(cheap, "predictions.jsonl")
    rule = selective.choose(options, labels_of(cheap), rows)
    assert f"confidence above {rule.threshold:.6f}" in capsys.readouterr().out
    cells = rule.cells(test.probs)
    assert 0 < sum(cells["abstain"]) < len(texts)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    # The input has a column of that name already.
    assert [row["predicted_abstain"] == "true" for row in written] == cells["abstain"]
    assert [json.loads(row["label_set"]) for row in written] == cells["label_set"]
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table["predicted_abstain"].to_list() == cells["abstain"]
    assert [json.loads(cell) for cell in table["label_set"]] == cells["label_set"]
    plain = pl.read_csv(tmp_path / "plain.csv")
    assert plain.columns == [name for name in written[0] if name not in ("predicted_abstain", "label_set")]


def test_a_prediction_with_limits_is_not_resumed_without_them(config: Compose, cheap: Path, tmp_path: Path) -> None:
    pl.DataFrame({"text": ["公司大涨"]}).write_csv(tmp_path / "in.csv")
    words = ("stage=predict", f"run={cheap}", f"input={tmp_path / 'in.csv'}", f"output={tmp_path / 'out.csv'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "_load", _stopped)
        with pytest.raises(KeyboardInterrupt):
            predict.run(config(*words, "stage.risk=0.4"))
    with pytest.raises(RunError, match=r"was started with another stage.risk \(0.4, now None\)"):
        predict.run(config(*words))


def test_an_evaluation_reports_what_holds_on_the_test_rows(config: Compose, cheap: Path, tmp_path: Path) -> None:
    words = ("stage=evaluate", "tracking=none", f"output_dir={tmp_path}", f"run={cheap}")
    done = evaluate.run(config(*words, *LIMITS, "stage.coverage_by=class"))
    assert done.run_dir is not None
    found, rows = done.metrics["selection"], lines(done.run_dir / "predictions.jsonl")
    kept = [row for row in rows if not row["abstain"]]
    assert (found["answered"]["k"], found["answered"]["n"]) == (len(kept), len(rows))
    assert found["wrong among the answered"]["k"] == sum(row["label"] != row["gold"] for row in kept)
    hits = [row["gold"] in row["label_set"] for row in rows]
    assert found["true label in the label set"]["k"] == sum(hits)
    assert found["labels_per_set"] == pytest.approx(np.mean([len(row["label_set"]) for row in rows]))
    assert sum(found[f"the same, of {name}"]["k"] for name in labels_of(cheap)) == sum(hits)
    with pytest.raises(ConfigError, match="scored on the same rows"):
        evaluate.run(config(*words, "stage.split=validation", "stage.risk=0.4"))
    # Rows that an evaluation has scored can be named instead of those of the run, and an older run needs them.
    other = evaluate.run(config(*words, "stage.split=validation")).run_dir
    older = shutil.copytree(cheap, tmp_path / "older")
    (older / selective.FILE).unlink()
    with pytest.raises(RunError, match=r"stage\.split=validation and add stage\.calibration"):
        evaluate.run(config(*words[:-1], f"run={older}", "stage.risk=0.4"))
    again = evaluate.run(config(*words, *LIMITS, "stage.coverage_by=class", f"stage.calibration={other}"))
    assert again.metrics["selection"] == found
    with pytest.raises(ConfigError, match=r"stage\.calibration: .* is not a folder that"):
        evaluate.run(config(*words[:-1], f"run={older}", "stage.risk=0.4", f"stage.calibration={other}"))
    with pytest.raises(ConfigError, match="scored on the same rows"):
        evaluate.run(config(*words, "stage.split=validation", "stage.risk=0.4", f"stage.calibration={other}"))


def test_a_limit_that_cannot_be_met_makes_the_run_abstain_and_names_the_smallest_one(
    config: Compose, cheap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.run(config("stage=predict", f"run={cheap}", "text='公司大涨'", "stage.risk=0.001"))
    out = capsys.readouterr().out
    assert "stage.risk=0.001 cannot be met, so the run abstains from every text" in out
    assert "abstain: true" in out
    smallest = out.split("can be met is about ")[1].split(". ")[0]
    predict.run(config("stage=predict", f"run={cheap}", "text='公司大涨'", f"stage.risk={smallest}"))
    assert "confidence above" in capsys.readouterr().out


def test_options_without_effect_and_empty_predictions_are_errors(config: Compose, cheap: Path, tmp_path: Path) -> None:
    words = ("stage=predict", f"run={cheap}", "text='公司大涨'")
    for option, problem in (
        ("stage.coverage_by=class", "has no effect without coverage"),
        (f"stage.calibration={cheap}", "has no effect without risk or coverage"),
    ):
        with pytest.raises(ConfigError, match=problem):
            config(*words, option)
    with pytest.raises(RunError, match="stage.calibration: .*nowhere is not a run folder"):
        predict.run(config(*words, "stage.risk=0.4", f"stage.calibration={tmp_path / 'nowhere'}"))
    empty = shutil.copytree(cheap, tmp_path / "empty")
    (empty / selective.FILE).write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=f"{selective.FILE} is empty"):
        predict.run(config("stage=predict", f"run={empty}", "text='公司大涨'", "stage.risk=0.4"))
    (empty / selective.FILE).unlink()
    report.run(config("stage=report", f"runs={empty}", "stage.risk=0.4", "stage.samples=1000", f"output={tmp_path}"))
    assert "need one class per row and validation predictions" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_an_export_has_its_own_validation_predictions_without_texts(
    config: Compose, last: Path, tmp_path: Path
) -> None:
    export.run(config("stage=export", f"run={last}", "format=merged", f"output={tmp_path / 'made'}", "stage.timed=1"))
    records = lines(tmp_path / "made" / selective.FILE)
    assert not {"text", "target"} & set(records[0])
    rows = selective.validation(tmp_path / "made", labels_of(last))
    assert rows is not None
    own = saved(last)  # the run scored fewer of them (train.validation_rows)
    assert rows.ids[: len(own.ids)] == own.ids
    np.testing.assert_allclose(rows.first(len(own.ids)).probs, own.probs, atol=1e-3)
    predict.run(config("stage=predict", f"run={tmp_path / 'made'}", "text='公司大涨'", "stage.coverage=0.8"))


def test_a_service_answers_with_decisions_only_if_limits_are_set(config: Compose, cheap: Path) -> None:
    model = predictor.restore(str(cheap), 4096)

    class Quiet:
        batch = queue = property(lambda self: self)

        def observe(self, _: int) -> None: ...
        def set_function(self, _: Any) -> None: ...

    batcher = Batcher(model, 8, 0, 8, Quiet())  # type: ignore[arg-type]
    assert not {"abstain", "label_set"} & set(batcher._call(["公司大涨"])[0])
    options = config("stage=report", "runs=x", *LIMITS).stage
    assert isinstance(options, selective.Selection)
    model.selection = selective.choose(options, labels_of(cheap), saved(cheap))
    (answer,) = batcher._call(["公司大涨"])
    parsed = schemas.LabeledText(input="公司大涨", **answer)
    assert (parsed.abstain, parsed.label_set) == (answer["abstain"], answer["label_set"])
    assert parsed.prediction in (parsed.label_set or ())


# ------------------------------------------------------------------------------------------------ cascades


def test_a_cascade_is_the_composition_of_the_saved_predictions(
    config: Compose, composed: Path, cheap: Path, last: Path, tmp_path: Path
) -> None:
    (threshold,) = json.loads((composed / "run.json").read_text(encoding="utf-8"))["cascade"]["thresholds"]
    for name in ("predictions.jsonl", selective.FILE):
        first, second, made = (lines(run / name) for run in (last, cheap, composed))
        second = second[: len(first)]  # of the validation rows, the language model scored fewer
        wanted = [
            one if max(one["probs"].values()) > threshold else two for one, two in zip(first, second, strict=True)
        ]
        assert 0 < sum(one in first for one in wanted) < len(wanted)
        assert [record["label"] for record in made] == [record["label"] for record in wanted]
        for record, other in zip(made, wanted, strict=True):
            assert record["probs"] == pytest.approx(other["probs"], abs=1e-4)
    accuracy = np.mean([record["label"] == record["gold"] for record in lines(composed / "predictions.jsonl")])
    again = evaluate.run(config("stage=evaluate", f"run={composed}", "tracking=none", f"output_dir={tmp_path}"))
    assert again.metrics["test"]["accuracy"] == pytest.approx(accuracy)
    assert again.run_dir is not None
    gates = [record["gates"] for record in lines(again.run_dir / "predictions.jsonl")]
    assert gates == [record["gates"] for record in lines(composed / "predictions.jsonl")]
    runs, skipped = finished_runs.load([composed, again.run_dir])  # a report on an evaluation of a cascade
    groups, notes = finished_runs.group(runs)
    assert (len(groups), skipped) == (1, {})
    assert "1 copies" in notes[0]


def test_a_cascade_without_one_of_its_runs_names_both(composed: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(composed, tmp_path / "alone")
    facts = json.loads((alone / "run.json").read_text(encoding="utf-8"))
    facts["cascade"]["runs"][0] = str(tmp_path / "gone")
    (alone / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(RunError, match="alone is a cascade, which reads .* run: .*gone is not a run folder"):
        predictor.read(str(alone))


def test_later_runs_of_a_cascade_see_only_the_rows_that_earlier_ones_leave(composed: Path) -> None:
    model = predictor.restore(str(composed), 4096)
    assert isinstance(model, predictor.Cascade)
    seen = list[int]()
    members = list(model.predictors)

    def counting(member: Any) -> Any:
        def call(texts: Any) -> Any:
            seen.append(len(texts))
            return member(texts)

        return call

    model.predictors = [counting(member) for member in members]
    texts = [record["text"] for record in lines(composed / "predictions.jsonl")]
    answers = model(texts)
    assert answers.gates is not None
    assert seen == [len(texts), int(answers.gates[:, 1].sum())]
    assert answers.routes == [model.experts[number] for number in answers.gates.argmax(axis=1)]
    assert model([]).predicted == []


def test_a_cascade_is_a_run_like_another(
    config: Compose, composed: Path, cheap: Path, last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.yaml").write_text("currency: EUR\ndevices: {cpu: 0.36}\nruns: {tfidf: 1}\n", encoding="utf-8")
    words = ("stage.samples=1000", f"output={tmp_path / 'report'}", f"stage.prices={tmp_path / 'prices.yaml'}")
    done = report.run(config("stage=report", f"runs=[{cheap},{last},{composed}]", *words, *LIMITS))
    name = "cascade-lora_response-tfidf_lr"
    assert set(done.metrics) == {"tfidf_lr", "lora_response", name}
    made = done.metrics[name]
    assert made["money_per_1000"] == pytest.approx(made["seconds_per_1000"] * 0.36 / 3600)
    assert {file.name for file in (tmp_path / "report" / "figures").iterdir()} >= {"pareto.png", "risk_coverage.png"}
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "EUR" in page
    assert "stage.prices: no configuration is called tfidf." in page
    assert "train.calibrate" not in capsys.readouterr().out
    predict.run(config("stage=predict", f"run={composed}", "text='公司大涨'", "stage.coverage=0.8"))
    assert "route " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a cascade consists of several runs"):
        export.run(config("stage=export", f"run={composed}", "format=merged"))
    (tmp_path / "prices.yaml").write_text("devices: {H100: 2}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stage\.prices: has no price of the device '.*' of"):
        report.run(config("stage=report", f"runs=[{cheap},{last}]", *words))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": {"a": "a", "b": "b"}}, "has the labels a, b"),
        ({"data_fingerprint": "f00d"}, "different data"),
        ({"validation": None}, "has no validation_predictions.jsonl"),
        ({"validation": 1}, "different validation rows"),
        ({"predictions": 1}, "different test rows"),
        ({}, "at least two different runs"),
    ],
)
def test_runs_that_cannot_be_composed_are_refused(
    changes: dict[str, Any], reason: str, config: Compose, cheap: Path, last: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(cheap, tmp_path / "other")
    facts = json.loads((other / "run.json").read_text(encoding="utf-8"))
    (other / "run.json").write_text(json.dumps(facts | changes), encoding="utf-8")
    for key, name in (("validation", selective.FILE), ("predictions", "predictions.jsonl")):
        if key in changes:
            kept = (other / name).read_text(encoding="utf-8").splitlines()[1:]
            (other / name).write_text("\n".join(kept) + "\n", encoding="utf-8")
            if changes[key] is None:
                (other / name).unlink()
    runs = f"runs=[{cheap},{other if changes else cheap}]"
    with pytest.raises(FinsaError, match=reason):
        cascade.run(config("stage=cascade", runs, "tracking=none", f"output_dir={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_values_that_make_no_sense_are_refused(config: Compose) -> None:
    for words, key in (
        (("stage=predict", "run=x", "text=x", "stage.risk=1.0"), "risk"),
        (("stage=serve", "run=x", "stage.coverage=0.0"), "coverage"),
        (("stage=cascade", "runs=[x,y]", "stage.tolerance=0.0"), "tolerance"),
        (("stage=cascade", "runs=[x]"), "two or more, the cheapest first"),
        (("stage=cascade",), "two or more, the cheapest first"),
    ):
        with pytest.raises(ConfigError, match=key):
            config(*words)


def test_abstaining_needs_one_class_per_row_and_a_run(config: Compose, cheap: Path, tmp_path: Path) -> None:
    record = predictor.read(str(cheap))
    labels = record.labels.__class__(record.labels.names, record.labels.words, "multi_label", ())
    options = config("stage=predict", "run=x", "text=x", "stage.risk=0.1").stage
    with pytest.raises(ConfigError, match="need one class per row"):
        selective.of_run(options, record.path, labels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="need run=<folder>"):
        evaluate.run(config("stage=evaluate", FEW, "stage.risk=0.1", f"output_dir={tmp_path}"))


def test_thresholds_of_a_cascade_keep_macro_f1_within_the_tolerance_in_most_resplits() -> None:
    """The cheap run is sure of rows that it gets wrong; macro-F1 of the distribution is that of many rows."""

    def drawn(n: int, seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        gold, hard = rng.integers(0, 3, n), rng.random(n)
        wrong = (gold + 1) % 3
        cheap = np.where(rng.random(n) < 0.45 * hard, wrong, gold)
        better = np.where(rng.random(n) < 0.12, wrong, gold)
        probs = np.stack([np.full((n, 3), 0.0), np.full((n, 3), 0.0)])
        sure = np.stack([1 - 0.6 * hard, np.full(n, 0.9)]).round(6)
        for run, answers in enumerate((cheap, better)):
            probs[run] = ((1 - sure[run]) / 2)[:, None]
            probs[run, np.arange(n), answers] = sure[run]
        return probs, gold

    whole, truth = drawn(100_000, 1)
    rows, surest, answers = np.arange(len(truth)), whole.max(axis=2), whole.argmax(axis=2)
    alone, violated, used = cascades.macro_f1(answers[1], truth, 3), 0, 0
    for split in range(60):
        thresholds = cascades.choose(*drawn(400, 10 + split), tolerance=0.03, confidence=0.9, seed=split)
        source = cascades.answering(surest, thresholds)
        used += bool((source == 0).mean() > 0.1)
        violated += cascades.macro_f1(answers[source, rows], truth, 3) < alone - 0.03
    assert used > 30
    assert violated <= 12, violated  # 6 expected at most, and 12 are exceeded with probability 0.005


def test_three_runs_answer_in_order() -> None:
    confidence = np.array([[0.9, 0.5, 0.5, 0.7], [0.9, 0.9, 0.4, 0.9], [0.1, 0.1, 0.1, 0.1]])
    assert cascades.answering(confidence, [0.7, 0.5]).tolist() == [0, 1, 2, 1]
    assert cascades.answering(confidence, [1.0, 1.0]).tolist() == [2, 2, 2, 2]
    gold = np.tile([0, 1, 2], 100)
    right = 0.9 * np.eye(3)[gold] + 0.1 / 3
    # Runs that all answer correctly: the first one answers everything.
    assert cascades.choose(np.stack([right, right, right]), gold, 0.02, 0.95) == [0.0, 0.0]
    wrong = 0.9 * np.eye(3)[(gold + 1) % 3] + 0.1 / 3
    probs = np.stack([wrong, wrong, right])
    source = cascades.answering(probs.max(axis=2), cascades.choose(probs, gold, 0.02, 0.95))
    assert source.tolist() == [2] * 300
    assert statistics.confusions(gold, right.argmax(axis=1)[None], 3).trace(axis1=1, axis2=2) == [300]


# ------------------------------------------------------------------------------------------------ cost


def test_a_configuration_is_optimal_if_no_other_is_better_and_cheaper(last: Path, tmp_path: Path) -> None:
    (run,), _ = finished_runs.load([last])
    groups = [finished_runs.RunGroup(name, [run]) for name in "abcd"]
    values: list[dict[str, Any]] = [
        {"arm": name, "macro_f1": score, "milliseconds_per_row": cost}
        for name, score, cost in (("a", 0.9, 10.0), ("b", 0.8, 1.0), ("c", 0.8, 2.0), ("d", 0.95, None))
    ]
    costs.add(values, groups, None)
    assert [record["pareto"] for record in values] == [True, True, False, None]
    (tmp_path / "prices.yaml").write_text("devices: {cpu: 3.6}\nruns: {b: 360}\n", encoding="utf-8")
    prices = read_section(costs.Prices, "stage.prices", str(tmp_path / "prices.yaml"))
    costs.add(values, groups, prices)
    assert [record["money_per_1000"] for record in values[:3]] == pytest.approx([0.01, 0.1, 0.002])
    assert [record["pareto"] for record in values] == [True, False, True, None]
    for content, fault in (
        ("price: 1\n", "price: Extra inputs are not permitted"),
        ("devices: {cpu: -1}\n", "devices.cpu: Input should be greater than or equal to 0"),
        ("- 1\n", "the file has no keys"),
        ("", "the file has no keys"),
        ("2024-01-01: 1\n", "cannot be read"),
        ("a: [\n", "cannot be read"),
    ):
        (tmp_path / "prices.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"stage\.prices: .*{fault}.*  \[.*prices.yaml\]"):
            read_section(costs.Prices, "stage.prices", str(tmp_path / "prices.yaml"))
    with pytest.raises(ConfigError, match="stage.prices: there is no file"):
        read_section(costs.Prices, "stage.prices", str(tmp_path / "none.yaml"))
