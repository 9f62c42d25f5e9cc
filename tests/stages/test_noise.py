"""The stage on the embedded sample, whose wrong labels are known; its page in a browser, whose file is read back."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browsers
import numpy as np
import polars as pl
import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.errors import ConfigError, DataError
from finsa.stages import noise
from finsa.synthetic import generator

Configure = Callable[..., RunConfig]
SMALL = "data.split.rows={train: 60, validation: 12, test: 12}"
WORDS = ("stage=noise", "method=tfidf_lr", "tracking=none", "stage.folds=3", "method.baseline.strengths=[10]")


@pytest.fixture(scope="module")
def found(config: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the whole sample."""
    folder = noise.run(config(*WORDS, f"output_dir={tmp_path_factory.mktemp('out')}")).run_dir
    assert folder is not None
    return folder


def _numbers(folder: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["noise"]
    return numbers


def test_precision_and_recall_of_the_wrong_labels_of_the_sample(found: Path) -> None:
    rows = generator.generate(4800, 7)
    wrong = set(rows.filter("noisy")["id"])
    suspicious = pl.read_csv(found / "suspicious.csv", infer_schema=False)["id"].to_list()
    hits = [one in wrong for one in suspicious]
    assert len(wrong) == 144
    precision, recall = sum(hits) / len(hits), sum(hits) / len(wrong)
    # By chance, 3 % of the rows that are listed would be wrong. TF-IDF cannot read negation, so most of them are not.
    assert 0.15 < precision < 0.35
    assert recall > 0.5
    assert np.mean(hits[:50]) > 0.3  # the list is sorted
    assert _numbers(found)["ceiling"]["1"]["noise"] > 0.03  # confident errors of the model count as wrong labels


def test_every_row_is_scored_once_by_a_model_that_was_not_trained_on_it(config: Configure, found: Path) -> None:
    data = dataset.load(config(*WORDS).data)
    lines = [json.loads(line) for line in (found / "out_of_fold.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["split"]) for line in lines] == [
        (one, split) for split, part in data.splits.items() for one in part["id"]
    ]
    # Out of fold, the models are as accurate as an ordinary run is on the test split, and not as on training rows.
    right = np.mean([max(line["probs"], key=line["probs"].get) for line in lines] == _given(data))
    assert right == pytest.approx(_numbers(found)["accuracy"])
    assert 0.7 < right < 0.85
    scored = [
        [json.loads(line)["id"] for line in (place / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        for place in sorted((found / "folds").iterdir())
    ]
    assert sorted(one for fold in scored for one in fold) == sorted(line["id"] for line in lines)


def _given(data: dataset.Dataset) -> Any:
    return np.array([data.labels.names[label] for part in data.splits.values() for label in part["label"]])


def test_a_resumed_command_reads_finished_folds_again(config: Configure, tmp_path: Path) -> None:
    words = (*WORDS, FEW, "stage.splits=[train]", f"output_dir={tmp_path}")
    first = noise.run(config(*words)).run_dir
    assert first is not None
    before = (first / "metrics.json").read_text(encoding="utf-8")
    facts = json.loads((first / "run.json").read_text(encoding="utf-8"))
    (first / "run.json").write_text(json.dumps({**facts, "status": "stopped"}), encoding="utf-8")
    marks = {place: (place / "run.json").stat().st_mtime_ns for place in (first / "folds").iterdir()}
    (first / "folds" / "2" / "run.json").unlink()  # killed before it had begun
    again = noise.run(config(*words, "resume=true")).run_dir
    assert again == first
    assert (first / "metrics.json").read_text(encoding="utf-8") == before
    same = [place.name for place, mark in marks.items() if (place / "run.json").stat().st_mtime_ns == mark]
    assert sorted(same) == ["1", "3"]


def test_a_language_model_scores_rows_out_of_fold(config: Configure, shallow: tuple[str, ...], tmp_path: Path) -> None:
    words = (
        "stage=noise",
        "stage.folds=2",
        "stage.splits=[train]",
        "tracking=none",
        FEW,
        "train=smoke",
        *shallow,
        SMALL,
    )
    folder = noise.run(config(*words, "method=lora_label", f"output_dir={tmp_path}")).run_dir
    assert folder is not None
    assert _numbers(folder)["rows"] == sum(1 for _ in (folder / "out_of_fold.jsonl").open(encoding="utf-8"))


def test_what_cannot_be_scored_is_refused(config: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts from a run that was"):
        config("stage=noise", "method=dpo", "method.init=outputs/run")
    with pytest.raises(ConfigError, match="stage=noise needs one class per row"):
        config("stage=noise", "method=tfidf_lr", "data.task=multi_label", "data.labels=[a,b]")
    with pytest.raises(DataError, match=r"stage.folds: [\d,]+ rows of 3 labels are too few for 999 folds"):
        noise.run(config(*WORDS, FEW, "stage.folds=999", f"output_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())


def test_the_page_downloads_decisions_that_are_read_back(config: Configure, found: Path, tmp_path: Path) -> None:
    driver = browsers.chromium()
    try:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        driver.get((found / "labels.html").as_uri())
        rows = driver.find_elements("css selector", ".row")
        assert len(rows) == 300
        assert not driver.find_element("id", "download").is_enabled()
        for row, action in zip(rows, ("keep", "relabel", "drop"), strict=False):
            row.find_element("css selector", f"input[value={action}]").click()
        fourth = rows[3]  # a new label selects the action
        next(one for one in fourth.find_elements("css selector", "option") if not one.is_selected()).click()
        counts = "4 of 300 decided: 1 keep, 2 relabel, 1 drop"
        assert driver.find_element("id", "counts").text == counts
        driver.get((found / "labels.html").as_uri())  # decisions are kept
        assert driver.find_element("id", "counts").text == counts
        driver.find_elements("css selector", "#filter option")[1].click()
        assert sum(row.is_displayed() for row in driver.find_elements("css selector", ".row")) == 296
        driver.find_element("id", "download").click()
        file = tmp_path / "corrections.csv"
        for _ in range(100):
            if file.is_file() and file.stat().st_size:
                break
            driver.implicitly_wait(0.05)
            driver.find_elements("css selector", ".absent")
        assert driver.get_log("browser") == []
        wide = driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide == 0
    finally:
        driver.quit()
    decided = list(csv.DictReader(file.open(encoding="utf-8")))
    suspicious = pl.read_csv(found / "suspicious.csv", infer_schema=False).head(4)
    assert [(one["id"], one["given"]) for one in decided] == suspicious.select("id", "given").rows()
    assert [one["action"] for one in decided] == ["keep", "relabel", "drop", "relabel"]
    data = dataset.load(config(*WORDS, f"data.corrections={file}").data)
    assert data.ledger.buckets == {"used": 4799, "correction: dropped": 1}
    labels = {
        one: data.labels.names[of]
        for part in data.splits.values()
        for one, of in part.select("id", "label").iter_rows()
    }
    assert labels[decided[1]["id"]] == decided[1]["label"] == suspicious["likely"][1]
    assert labels[decided[3]["id"]] == decided[3]["label"] not in (decided[3]["given"], suspicious["likely"][3])
    assert labels[decided[0]["id"]] == decided[0]["given"]
