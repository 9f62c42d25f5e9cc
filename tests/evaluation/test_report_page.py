"""The page in a real browser: complete, offline, without errors, and with the numbers of the CSV."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import browsers
import numpy as np
import pytest
from folders import answers, write_run

from finsa.config import RunConfig
from finsa.stages import report

GOLD = np.random.default_rng(0).integers(0, 3, 300)
FIGURES = 7
BAIT = '<img src="http://example.invalid/x.png" onerror="document.title=1">'
ENGLISH = "const read = e => (e?.querySelector('.en') ?? e)?.textContent;"
TELEPHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


class Opened(NamedTuple):
    """A page in a browser, and the folder of the page."""

    driver: Any
    folder: Path
    requests: list[str]
    console: list[dict[str, Any]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., RunConfig]) -> Iterator[Opened]:
    driver = browsers.chromium()
    try:
        folder = tmp_path_factory.mktemp("sweep")
        for number, (method, right) in enumerate([("zero_shot", 0.3), ("lora", 0.7), ("lora_response", 0.95)]):
            write_run(folder / str(number), config(f"method={method}"), GOLD, answers(GOLD, right, number))
        write_run(folder / "3", config("method=lora"), GOLD, GOLD, status="failed", error=BAIT)
        report.run(config("stage=report", f"runs={folder}", "published=aidf_ablation"))
        alone = tmp_path_factory.mktemp("alone")  # away from its figures, as a page that was sent to somebody
        shutil.copy(folder / "report.html", alone)
        driver.get((alone / "report.html").as_uri())
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        yield Opened(driver, folder, asked, driver.get_log("browser"))
    finally:
        driver.quit()


def _rows(opened: Opened) -> dict[str, dict[str, str]]:
    with (opened.folder / "report.csv").open(encoding="utf-8", newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def _table(opened: Opened, caption: str) -> dict[str, dict[str, str]]:
    """A table as a reader of the English page sees it: by first cell, by column."""
    script = (
        f"{ENGLISH} return [...document.querySelectorAll('table')].filter(t => t.caption && read(t.caption) == "
        "arguments[0]).map(t => [...t.rows].map(r => [...r.cells].map(read)))[0]"
    )
    head, *rows = opened.driver.execute_script(script, caption)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_all_images_are_loaded_and_described(opened: Opened) -> None:
    script = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt, i.src.slice(0, 22)])"
    images = opened.driver.execute_script(script)
    assert len(images) == FIGURES
    for complete, width, alt, source in images:
        assert complete
        assert width > 600
        assert len(alt) > 20
        assert source == "data:image/png;base64,"


def test_the_page_makes_no_requests_and_logs_no_errors(opened: Opened) -> None:
    assert opened.console == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert opened.driver.title == "sample: report"
    assert opened.driver.execute_script("return document.scripts.length") == 0


def test_markup_in_a_run_is_only_text(opened: Opened) -> None:
    assert BAIT in opened.driver.find_element("tag name", "body").text


def test_the_page_has_the_numbers_of_the_csv(opened: Opened) -> None:
    scores, tests = _table(opened, "Scores on the test split"), _table(opened, "Against zero_shot")
    costs, beside = _table(opened, "Cost"), _table(opened, "Comparison with the published table aidf_ablation")
    rows = _rows(opened)
    assert list(rows) == list(scores)
    for arm, row in rows.items():
        for name, column in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("weighted_f1", "weighted-F1")):
            assert scores[arm][column] == f"{row[name]} ({row[f'{name}_low']}-{row[f'{name}_high']})"
        assert scores[arm]["ECE"] == row["calibration_error"]
        assert costs[arm]["seconds to the best score"] == (row["seconds_to_best"] or "-")
        assert beside[arm]["macro-F1"] == row["published_macro_f1"]
    for arm in ("lora", "lora_response"):
        found = tests[arm]
        assert found["macro-F1 difference"] == rows[arm]["difference"]
        assert found["p (Holm)"] == rows[arm]["bootstrap_p_holm"]
        assert found["McNemar p (Holm)"] == rows[arm]["mcnemar_p_holm"]
        assert found["verdict"] == rows[arm]["verdict"]


def test_every_class_of_every_group_has_its_scores(opened: Opened) -> None:
    script = f"{ENGLISH} return [...document.querySelectorAll('table')].map(t => [read(t.caption), t.innerText])"
    (text,) = (text for caption, text in opened.driver.execute_script(script) if caption == "By class")
    rows = _rows(opened)
    for arm, row in rows.items():
        for label in ("利空", "中性", "利好"):
            numbers = [row[f"{name}_{label}"] for name in ("precision", "recall", "f1")]
            assert "\t".join([arm, label, *numbers]) in text


def test_only_the_best_group_is_marked(opened: Opened) -> None:
    script = "return [...document.querySelectorAll('tr.best')].map(r => r.cells[0].textContent)"
    assert opened.driver.execute_script(script) == ["lora_response"]
    first = opened.driver.find_element("css selector", ".remarks li").text
    assert re.match(
        r"lora_response has the highest macro-F1, 0\.\d{4}, significantly better than every other configuration", first
    )


def test_the_page_is_also_in_chinese(opened: Opened) -> None:
    opened.driver.execute_script("document.getElementById('zh').click()")
    try:
        text = opened.driver.find_element("tag name", "main").text
    finally:
        opened.driver.execute_script("document.getElementById('en').click()")
    for phrase in ("摘要", "测试集上的分数", "各类别", "配置", "宏平均 F1", "括号内为 95 % 置信区间", "训练与代价"):
        assert phrase in text
    assert "lora_response 的 宏平均 F1 最高" in text
    for phrase in ("Scores on the test split", "By class", "In parentheses", "configuration", "Training and cost"):
        assert phrase not in text


def test_links_lead_to_their_sections(opened: Opened) -> None:
    script = "return [...document.links].map(link => document.getElementById(link.hash.slice(1))?.tagName)"
    targets = opened.driver.execute_script(script)
    assert targets == ["H2"] * 8


def test_on_a_phone_only_tables_and_figures_scroll_horizontally(opened: Opened) -> None:
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", TELEPHONE)
    try:
        width = opened.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] == TELEPHONE["width"]
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
