"""Golden tables: published scores follow from the published confusion matrices and counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from finsa.config import ROOT, Published, RunConfig, catalogue
from finsa.evaluation import metrics, published, statistics

TABLES = catalogue.choices_of("published")
ARMS = ("zero_shot", "lora", "lora_downsample", "lora_response", "lora_response_downsample")


@pytest.fixture
def table(config: Callable[..., RunConfig]) -> Callable[[str], Published]:
    def of(name: str) -> Published:
        found = config("stage=report", f"published={name}").published
        assert found is not None
        return found

    return of


def test_all_30_cells_of_the_aidf_table(table: Callable[[str], Published]) -> None:
    aidf = table("aidf_ablation")
    cells = []
    for name in ARMS:
        row = aidf.rows[name]
        assert row.confusion is not None
        assert row.f1 is not None
        again = published.recomputed(row)
        assert again is not None
        f1 = metrics.f1_scores(np.array(row.confusion))
        cells += [(again[key], printed) for key, printed in row.scores.items()] + list(zip(f1, row.f1, strict=True))
    assert len(cells) == 30
    assert [round(float(value), 2) for value, _ in cells] == [printed for _, printed in cells]


def test_both_finllm_tables(table: Callable[[str], Published]) -> None:
    """Tuned and base model, the latter with four classes, the fourth for answers without a label."""
    for name in ("lora", "base", "lora and retrieval"):
        row = table("finllm_qlora").rows[name]
        counts = published.confusion(row)
        assert counts is not None
        assert row.f1 is not None
        assert row.recall is not None
        assert round(float(np.trace(counts) / counts.sum()), 5) == row.scores["accuracy"]
        f1, support = metrics.f1_scores(counts), counts.sum(axis=1)
        assert round(float(f1.mean()), 5) == row.scores["macro_f1"]  # as stored: over all classes of the matrix
        assert [round(float(value), 5) for value in f1[:3]] == list(row.f1)
        recall = np.diagonal(counts)[:3] / support[:3]
        assert [round(float(value), 5) for value in recall] == list(row.recall)
    base = published.recomputed(table("finllm_qlora").rows["base"])
    assert base is not None
    assert round(base["macro_f1"], 5) == 0.26829
    assert sum(table("finllm_qlora").rows["base"].unparsable or ()) == 8962


@pytest.mark.parametrize("part", ["news", "forum"])
def test_accuracy_of_finsa_moe_follows_from_its_recalls(table: Callable[[str], Published], part: str) -> None:
    moe = table(f"finsa_moe_{part}")
    assert moe.support is not None
    assert moe.n is not None
    support = np.array(list(moe.support.values()))
    for row in moe.rows.values():
        assert row.scores["accuracy"] == pytest.approx(float(support @ np.array(row.recall)) / moe.n, abs=2e-4)
        assert row.scores["macro_recall"] == pytest.approx(float(np.mean(row.recall or ())), abs=2e-4)
    assert len(moe.rows) == 11


def test_pairs_of_the_intent_table_give_its_p_values(table: Callable[[str], Published]) -> None:
    intent = table("openfindata_intent")
    paired = {name: row for name, row in intent.rows.items() if row.pairs}
    assert len(paired) == 3
    for row in paired.values():
        assert row.pairs is not None
        assert row.correct is not None
        base = intent.rows[row.pairs.row].correct
        assert row.correct == (base or 0) + row.pairs.fixed - row.pairs.broken
        decimals = len(str(row.pairs.p).split(".")[1])
        assert round(statistics.mcnemar(row.pairs.fixed, row.pairs.broken), decimals) == row.pairs.p


def test_comparisons_on_75_questions_are_inconclusive(table: Callable[[str], Published]) -> None:
    analysis = published.analyze(table("openfindata_intent"))
    verdicts = {record["row"]: record["verdict"] for record in analysis.records if record["against"]}
    assert verdicts == {
        "Qwen2.5-7B-Instruct tuned": "inconclusive",
        "Baichuan2-7B-Chat tuned": "better",
        "Llama-3-8B-Instruct tuned": "better",
        "ChatGLM3-6B tuned": "better",
        "Qwen2.5-0.5B-Instruct tuned": "better",
    }
    assert analysis.remarks[0].startswith(
        "Inconclusive: Claude-3.5-Sonnet (untuned) classifies the most rows correctly (71 of 75)"
    )
    tuned = [name for name in table("openfindata_intent").rows if name.endswith(" tuned")]
    assert len(tuned) == 6
    assert all(name in analysis.remarks[0] for name in tuned)
    (baichuan,) = (record for record in analysis.records if record["row"] == "Baichuan2-7B-Chat tuned")
    assert (round(100 * baichuan["accuracy_low"], 1), round(100 * baichuan["accuracy_high"], 1)) == (78.7, 93.6)


def test_no_pairing_separates_two_tuned_models_of_the_intent_table(table: Callable[[str], Published]) -> None:
    rows = table("openfindata_intent").rows
    tuned = [row.correct or 0 for name, row in rows.items() if name.endswith(" tuned")]
    assert min(statistics.mcnemar_range(a, b, 75)[0] for a, b in product(tuned, tuned)) > 0.05


def test_a_verdict_from_totals_is_withheld_if_it_depends_on_the_pairs(table: Callable[[str], Published]) -> None:
    analysis = published.analyze(table("aidf_ablation"))
    verdicts = {record["row"]: record["verdict"] for record in analysis.records}
    assert verdicts["lora"] == verdicts["lora_downsample"] == "pairs unknown"
    assert verdicts["lora_response"] == verdicts["lora_response_downsample"] == "better"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_consistent(table: Callable[[str], Published], name: str) -> None:
    """Counts, confusion matrices and printed accuracies agree; models and methods have files."""
    whole = table(name)
    sets = (whole.data,) if isinstance(whole.data, str) else tuple(whole.data)
    for found in filter(None, map(whole.of, sets)):
        check_consistency(found)


def check_consistency(found: Published) -> None:
    assert found.data in catalogue.choices_of("data")
    for row in found.rows.values():
        hits = published.correct_rows(row, found.n)
        if hits is None:
            assert set(row.scores) - {"macro_f1"} == {"weighted_f1"}  # FinGPT and FinDPO print only this one
        if "accuracy" in row.scores:
            assert hits is not None
            assert round(hits / (found.n or 0), found.decimals) == pytest.approx(row.scores["accuracy"], abs=1e-4)
        assert row.model is None or row.model in catalogue.choices_of("model")
        assert set(row.methods) <= set(catalogue.choices_of("method"))


@pytest.mark.parametrize(
    ("rows", "remark"),
    [
        (
            {"a": {"scores": {"macro_f1": 0.5}}, "b": {}},
            "Rows cannot be tested against each other: no row has an accuracy, a confusion matrix or a count.",
        ),
        (
            {"a": {"scores": {"macro_f1": 0.5}}, "b": {"correct": 700}},
            "Rows cannot be tested against each other: only b has an accuracy, a confusion matrix or a count.",
        ),
        (
            {"a": {"scores": {"macro_f1": 0.5}}, "b": {"correct": 700}, "c": {"scores": {"accuracy": 0.5}}},
            "b classifies the most rows correctly (700 of 908; no accuracy or counts are published for a), "
            "significantly more than any other row for all possible pairs.",
        ),
    ],
)
def test_a_table_without_accuracies_or_counts_is_analyzed_as_far_as_possible(
    table: Callable[[str], Published], rows: dict[str, Any], remark: str
) -> None:
    analysis = published.analyze(Published.model_validate({**table("aidf_ablation").model_dump(), "rows": rows}))
    assert analysis.remarks[0] == remark
    assert [record["row"] for record in analysis.records] == list(rows)
    assert analysis.records[0]["right"] is None
    assert analysis.records[0]["verdict"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"f1": (0.5, 0.5)}, "f1 of a has 2 entries for 3 labels"),
        ({"confusion": ((411, 0, 0), (0, 231, 0), (0, 266))}, "the confusion matrix of a needs 3 columns"),
        ({"correct": 909}, "a has 909 correct rows of 908"),
    ],
)
def test_a_row_must_match_its_table(table: Callable[[str], Published], row: dict[str, Any], message: str) -> None:
    values = table("aidf_ablation").model_dump()
    order = tuple(values["support"].values())
    if "confusion" in row:
        row = {"confusion": tuple((count,) + (0,) * (2 - (place == 2)) for place, count in enumerate(order))}
    with pytest.raises(ValidationError, match=message):
        Published.model_validate({**values, "rows": {"a": row}})


def test_tables_add_up(table: Callable[[str], Published]) -> None:
    values: dict[str, Any] = table("aidf_ablation").model_dump()
    with pytest.raises(ValidationError, match="support adds up to 908 rows, but n is 900"):
        Published.model_validate({**values, "n": 900})
    with pytest.raises(ValidationError, match="the confusion matrix of zero_shot has"):
        Published.model_validate({**values, "support": {"negative": 266, "neutral": 231, "positive": 411}})


def test_support_and_number_of_rows_may_be_unknown(table: Callable[[str], Published]) -> None:
    """A row without either has its scores and no interval; what is counted needs the counts."""
    values = {**table("aidf_ablation").model_dump(), "support": None, "n": None}
    values["rows"] = {"a": {"scores": {"accuracy": 0.9}}, "b": {"scores": {"weighted_f1": 0.8}}}
    analysis = published.analyze(Published.model_validate(values))
    assert [record["accuracy_low"] for record in analysis.records] == [None, None]
    assert analysis.records[0]["accuracy"] == 0.9
    with pytest.raises(ValidationError, match="f1 of a needs support, whose keys are its labels"):
        Published.model_validate({**values, "rows": {"a": {"f1": (0.1, 0.2, 0.3)}}})


def test_a_table_over_several_data_sets(table: Callable[[str], Published]) -> None:
    """Its part about one data set is an ordinary table, and the counts add up."""
    english = table("english_sentiment")
    fpb = english.of("fpb")
    assert fpb is not None
    assert (fpb.n, len(fpb.rows)) == (1212, 14)
    assert fpb.rows["findpo"].scores == {"weighted_f1": 0.865}
    accuracy = next(record for record in published.analyze(fpb).records if record["row"] == "finlora_lora")
    assert accuracy["right"] == round(0.8564 * 1212)
    assert english.of("sample") is None
    values = english.model_dump()
    with pytest.raises(ValidationError, match="by_data of a has sample, which is not below data"):
        Published.model_validate({**values, "rows": {"a": {"by_data": {"sample": {"accuracy": 0.5}}}}})
    with pytest.raises(ValidationError, match="n and support belong to each data set"):
        Published.model_validate({**values, "n": 3})
    with pytest.raises(ValidationError, match="support of fpb adds up to 1212 rows, but n is 3"):
        Published.model_validate({**values, "data": {**values["data"], "fpb": {**values["data"]["fpb"], "n": 3}}})


def test_numbers_equal_the_transcription(table: Callable[[str], Published]) -> None:
    file = ROOT.parent / "shared" / "published.json"
    if not file.is_file():
        pytest.skip("the transcription is not beside the repository")
    known = json.loads(file.read_text(encoding="utf-8"))
    for part in ("news", "forum"):
        rows = table(f"finsa_moe_{part}").rows
        for name, scores in known["finsa_moe"][f"{part}_test"].items():
            for key, value in rows[name].scores.items():
                assert value == pytest.approx(scores[key] / 100)
    intent = table("openfindata_intent")
    for name, counts in known["openfindata_intent"]["rows"].items():
        assert intent.rows[name].correct == counts["base"]
        assert "tuned" not in counts or intent.rows[f"{name} tuned"].correct == counts["tuned"]
    assert intent.support is not None
    assert list(intent.support.values()) == list(known["openfindata_intent"]["gold_counts"].values())
    aidf = known["aidf_ablation"]
    assert table("aidf_ablation").facts["parameters"] == aidf["parameters"]
    for name, row in table("aidf_ablation").rows.items():
        old = {"lora_response_downsample": "lora_downsample_response"}.get(name, name)
        (counts,) = (value for key, value in aidf["confusion"].items() if key.split(" ")[0] == old)
        assert [list(line) for line in row.confusion or ()] == counts
