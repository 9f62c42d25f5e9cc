from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import answers, write_run
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score

from finsa.config import ReportStage, RunConfig
from finsa.errors import ConfigError
from finsa.evaluation import comparison, finished_runs, metrics, statistics
from finsa.evaluation.finished_runs import RunGroup

GOLD = np.random.default_rng(0).integers(0, 3, 400)
LIMITS: Any = {"risk": None, "confidence": 0.95, "coverage": None, "coverage_by": "all", "prices": None}
OPTIONS = ReportStage(name="report", baseline=None, training_rows="same", samples=2000, seed=0, **LIMITS)
Configure = Callable[..., RunConfig]


def groups_of(folder: Path) -> list[RunGroup]:
    return finished_runs.group(finished_runs.load(finished_runs.find_folders(str(folder)))[0])[0]


def records_of(found: comparison.Comparison) -> dict[str, comparison.Record]:
    return {record["arm"]: record for record in found.records}


@pytest.fixture
def five(config: Configure, tmp_path: Path) -> list[RunGroup]:
    """A weak base, two similar groups, one that is clearly better, and one with three seeds."""
    for number, (method, right) in enumerate(
        [("zero_shot", 0.3), ("lora", 0.6), ("lora_downsample", 0.61), ("lora_response", 0.95)]
    ):
        write_run(tmp_path / str(number), config(f"method={method}"), GOLD, answers(GOLD, right, number))
    for seed in (1, 2, 3):
        cfg = config("method=lora_response_downsample", f"seed={seed}")
        write_run(tmp_path / f"1{seed}", cfg, GOLD, answers(GOLD, 0.5 + 0.1 * seed, 20 + seed))
    return groups_of(tmp_path)


def test_scores_are_those_of_sklearn_and_intervals_those_of_the_run(five: list[RunGroup]) -> None:
    found = comparison.compare(five, OPTIONS)
    lora, run = records_of(found)["lora"], five[1].runs[0]
    assert lora["accuracy"] == pytest.approx(accuracy_score(GOLD, run.predicted))
    assert lora["macro_f1"] == pytest.approx(f1_score(GOLD, run.predicted, average="macro"))
    assert lora["weighted_f1"] == pytest.approx(f1_score(GOLD, run.predicted, average="weighted"))
    assert lora["f1_中性"] == pytest.approx(f1_score(GOLD, run.predicted, average=None)[1])
    own = run.report["intervals"]
    assert [lora["accuracy_low"], lora["accuracy_high"]] == own["accuracy"]
    for name in ("macro_f1", "weighted_f1"):
        assert [lora[f"{name}_low"], lora[f"{name}_high"]] == pytest.approx(own[name], abs=0.006)
    assert lora["macro_f1_sd"] is None


def test_seeds_give_mean_and_spread(five: list[RunGroup]) -> None:
    record = records_of(comparison.compare(five, OPTIONS))["lora_response_downsample"]
    scores = [run.report["macro_f1"] for run in five[4].runs]
    assert (record["runs"], record["seeds"]) == (3, "1 2 3")
    assert record["macro_f1"] == pytest.approx(np.mean(scores))
    assert record["macro_f1_sd"] == pytest.approx(np.std(scores, ddof=1))
    assert record["precision_利空"] == pytest.approx(
        np.mean([run.report["per_class"]["利空"]["precision"] for run in five[4].runs])
    )


def test_the_mean_cost_of_several_runs_has_an_interval(config: Configure, tmp_path: Path) -> None:
    """That of the error rate where every error costs 1, by a bootstrap over rows and runs."""
    costs = "evaluation.costs=[[0,1,1],[1,0,1],[1,1,0]]"
    for seed in (1, 2, 3):
        write_run(tmp_path / str(seed), config("method=lora", costs, f"seed={seed}"), GOLD, answers(GOLD, 0.7, seed))
    (group,) = groups_of(tmp_path)
    for run in group.runs:
        run.report["measures"] = {"cost": 1 - run.report["accuracy"]}
    (record,) = comparison.compare([group], OPTIONS).records
    assert record["cost"] == pytest.approx(1 - record["accuracy"])
    found = [1 - record["cost_high"], 1 - record["cost_low"]]
    assert found == pytest.approx([record["accuracy_low"], record["accuracy_high"]], abs=0.01)


def test_tests_are_paired_exact_and_corrected(five: list[RunGroup]) -> None:
    found = comparison.compare(five, OPTIONS)
    assert found.baseline == "zero_shot"
    tested = records_of(found)
    assert tested.pop("zero_shot")["verdict"] is None
    base, lora = five[0].runs[0].predicted == GOLD, five[1].runs[0].predicted == GOLD
    fixed, broken = int((lora & ~base).sum()), int((base & ~lora).sum())
    record = tested["lora"]
    assert (record["fixed"], record["broken"]) == (fixed, broken)
    assert record["mcnemar_p"] == binomtest(fixed, fixed + broken).pvalue
    for kind in ("bootstrap_p", "mcnemar_p"):
        ranked = sorted(tested.values(), key=lambda one: one[kind])
        assert ranked[0][f"{kind}_holm"] == pytest.approx(4 * ranked[0][kind])
        assert all(one[f"{kind}_holm"] >= one[kind] for one in ranked)
    assert {one["verdict"] for one in tested.values()} == {"better"}


def test_against_another_baseline(five: list[RunGroup]) -> None:
    found = comparison.compare(five, OPTIONS.model_copy(update={"baseline": "lora_downsample"}))
    verdicts = {record["arm"]: record["verdict"] for record in found.records}
    assert verdicts == {
        "zero_shot": "worse",
        "lora": "inconclusive",
        "lora_downsample": None,
        "lora_response": "better",
        "lora_response_downsample": verdicts["lora_response_downsample"],
    }
    with pytest.raises(ConfigError, match=r"stage\.baseline: there is no configuration 'lora_respons'\. Did you mean"):
        comparison.compare(five, OPTIONS.model_copy(update={"baseline": "lora_respons"}))


def test_the_least_significant_pair_counts_for_groups_with_seeds(five: list[RunGroup]) -> None:
    fixed, broken, p = comparison._mcnemar(five[4], five[0])
    base, values = five[0].runs[0].predicted == GOLD, []
    for run in five[4].runs:
        right = run.predicted == GOLD
        pair = int((right & ~base).sum()), int((base & ~right).sum())
        values.append((binomtest(pair[0], sum(pair)).pvalue, pair))
    assert (p, (fixed, broken)) == max(values)


def test_a_clear_win_is_marked_and_groups_are_sorted_by_score(five: list[RunGroup]) -> None:
    found = comparison.compare(five, OPTIONS)
    assert found.best == "lora_response"
    assert [record["best"] for record in found.records] == [True, False, False, False, False]
    scores = [record["macro_f1"] for record in found.records]
    assert scores == sorted(scores, reverse=True)
    assert [group.name for group in found.groups] == [record["arm"] for record in found.records]
    assert found.remarks[0].startswith("lora_response has the highest macro-F1, ")
    assert found.remarks[0].endswith(
        "significantly better than every other configuration (paired bootstrap, Holm-corrected for 4 comparisons)."
    )


def test_the_default_baseline_is_the_untrained_method_not_a_classical_baseline(
    config: Configure, tmp_path: Path
) -> None:
    for number, (method, right) in enumerate([("majority", 0.5), ("tfidf_lr", 0.9), ("zero_shot", 0.3)]):
        write_run(tmp_path / str(number), config(f"method={method}"), GOLD, answers(GOLD, right, number))
    found = groups_of(tmp_path)
    assert comparison.compare(found, OPTIONS).baseline == "zero_shot"
    assert comparison.compare(found[:2], OPTIONS).baseline == "majority"
    assert comparison.compare(found[1:2], OPTIONS).baseline == "tfidf_lr"


def test_the_best_group_is_tested_against_every_other(five: list[RunGroup]) -> None:
    """The tests in the headline are those in the table: of the best group, corrected for their number."""
    found = comparison.compare(five, OPTIONS.model_copy(update={"baseline": "lora"}))
    top, *others = found.records
    assert top["vs_best_verdict"] is None
    p = [record["vs_best_bootstrap_p"] for record in others]
    assert [record["vs_best_bootstrap_p_holm"] for record in others] == statistics.holm(p)
    assert {record["vs_best_verdict"] for record in others} == {"worse"}
    for record in others:
        assert record["vs_best_difference"] == pytest.approx(record["macro_f1"] - top["macro_f1"])


def test_a_pair_has_the_same_p_value_in_both_directions(five: list[RunGroup]) -> None:
    top, other = comparison.compare(five[1:3], OPTIONS).records
    found = comparison.compare(five[1:3], OPTIONS.model_copy(update={"baseline": other["arm"]}))
    top, other = found.records
    assert top["bootstrap_p"] == other["vs_best_bootstrap_p"]
    assert top["difference"] == -other["vs_best_difference"]
    assert (top["difference_low"], top["difference_high"]) == (
        -other["vs_best_difference_high"],
        -other["vs_best_difference_low"],
    )
    assert f"({top['difference']:.4f} lower, p = {top['bootstrap_p_holm']:.4f})" in found.remarks[0]


def test_an_insignificant_win_is_not_marked(five: list[RunGroup]) -> None:
    found = comparison.compare([five[0], five[1], five[2]], OPTIONS)
    assert found.best is None
    assert not any(record["best"] for record in found.records)
    first, second = (record["arm"] for record in found.records[:2])
    assert found.remarks[0].startswith(f"Inconclusive: {first} has the highest macro-F1, ")
    assert f"it is not significantly better than {second} (0." in found.remarks[0]
    assert "No configuration is marked as the best" in found.remarks[0]


def test_a_single_group_is_not_compared(five: list[RunGroup]) -> None:
    found = comparison.compare([five[3]], OPTIONS)
    assert (found.best, found.records[0]["verdict"]) == (None, None)
    assert found.remarks[0].startswith("There is only one configuration")


def test_a_small_test_set_of_75_questions_is_remarked_on(config: Configure, tmp_path: Path) -> None:
    """The supports of the published intent set: one question is 1.33 points, three are a class of their own."""
    gold, labels = np.repeat(np.arange(5), (10, 27, 3, 25, 10)), tuple("ABCDE")
    wrong = np.random.default_rng(1).permutation(75)[:16]
    for method, missed in (("zero_shot", wrong[:11]), ("lora_response", wrong[7:])):  # 7 fixed, 5 broken, as published
        predicted = gold.copy()
        predicted[missed] = (gold[missed] + 1) % 5
        write_run(tmp_path / method, config(f"method={method}"), gold, predicted, labels)
    found = comparison.compare(groups_of(tmp_path), OPTIONS)
    assert found.best is None
    assert "There are only 75 test rows: one row is 1.33 points of accuracy." in found.remarks
    assert any(remark.startswith("Few test rows of C (3)") for remark in found.remarks)
    tuned = found.records[1] if found.baseline == found.records[0]["arm"] else found.records[0]
    assert (tuned["fixed"], tuned["broken"], round(tuned["mcnemar_p"], 3)) == (7, 5, 0.774)
    assert (round(tuned["accuracy"], 4), tuned["verdict"]) == (0.88, "inconclusive")


def test_costs_are_read_and_missing_ones_stay_missing(five: list[RunGroup], config: Configure, tmp_path: Path) -> None:
    found = comparison.compare(five, OPTIONS)
    base, lora = (records_of(found)[name] for name in ("zero_shot", "lora"))
    assert lora["rows_per_second"] == 160
    assert lora["peak_memory_gib"] == 1
    assert lora["trainable_parameters"] == 28_672
    assert lora["seconds_to_best"] == pytest.approx(20)  # step 200, at ten steps a second
    assert [base[name] for name in ("rows_per_second", "seconds_to_best", "training_seconds")] == [None] * 3
    path = write_run(tmp_path / "more" / "x", config("method=lora"), GOLD, GOLD, peak_memory_bytes=None)
    (path / "log.jsonl").unlink()
    (group,) = groups_of(path)
    record = comparison.compare([group], OPTIONS).records[0]
    assert (record["peak_memory_gib"], record["seconds_to_best"]) == (None, None)


def test_the_best_step_follows_the_selection_metric(config: Configure, tmp_path: Path) -> None:
    cfg = config("method=lora", "train.select_by=loss")
    (group,) = groups_of(write_run(tmp_path / "a", cfg, GOLD, GOLD))
    assert comparison.seconds_to_best(group.runs[0]) == pytest.approx(20)  # lowest loss where F1 is highest
    cfg = config("method=lora", "train.select_by=weighted_f1")
    (group,) = groups_of(write_run(tmp_path / "b", cfg, GOLD, GOLD))
    assert comparison.seconds_to_best(group.runs[0]) is None  # its log has no such score


def test_calibration_error_equals_that_of_the_predictions(five: list[RunGroup]) -> None:
    run = five[1].runs[0]
    gaps = [
        abs((run.predicted == GOLD)[inside].mean() - run.confidence[inside].mean()) * inside.sum() / 400
        for low in np.arange(15) / 15
        if (inside := (run.confidence >= low) & (run.confidence < low + 1 / 15)).any()
    ]
    record = records_of(comparison.compare(five, OPTIONS))["lora"]
    assert record["calibration_error"] == pytest.approx(sum(gaps))
    assert metrics.wilson(0, 10)[0] == 0


def test_a_temperature_at_its_bound_is_noted_in_the_remarks(config: Configure, tmp_path: Path) -> None:
    for name, value in (("lora", 20.0), ("zero_shot", 1.3)):
        facts = {"calibration": {"temperature": value}}
        write_run(tmp_path / name, config(f"method={name}"), GOLD, answers(GOLD, 0.7, 1), **facts)
    said = comparison.compare(groups_of(tmp_path), OPTIONS).remarks
    assert "The temperature ended at its bound, so the probabilities are not calibrated: lora (seed 42)." in said


@pytest.mark.parametrize(
    ("method", "devices", "notes"),
    [
        ("tfidf_lr", ("cpu, 2 threads, float32", "cpu, 2 threads, bfloat16"), []),
        (
            "lora",
            ("cpu, 2 threads, float32", "cpu, 2 threads, bfloat16"),
            ["The language models were run in different dtypes: bfloat16, float32."],
        ),
        (
            "tfidf_lr",
            ("cpu, 2 threads, float32", "cpu, 4 threads, float32"),
            ["The runs used 2 different devices."],
        ),
    ],
)
def test_dtypes_are_separate_from_devices_and_only_compared_for_language_models(
    method: str, devices: tuple[str, str], notes: list[str], config: Configure, tmp_path: Path
) -> None:
    for name, device in zip((method, "zero_shot"), devices, strict=True):
        write_run(tmp_path / name, config(f"method={name}"), GOLD, answers(GOLD, 0.7, 1), device=device)
    said = comparison.compare(groups_of(tmp_path), OPTIONS).remarks
    assert [note for note in said if "different d" in note] == notes
