"""The page of a run: the numbers of its files, in two languages, without a script or a request, whatever is missing."""

from __future__ import annotations

import heapq
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browsers
import numpy as np
import pytest
import yaml
from folders import answers, write_run

from finsa.config import RunConfig, command_line, migration
from finsa.evaluation import pages, run_page, run_results
from finsa.runs.run_folder import RunFolder

GOLD = np.random.default_rng(0).integers(0, 3, 120)
BAIT = "</span><script>document.title=1</script><img src=http://example.invalid/x onerror=alert(1)>"
TELEPHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
METHODS = ("lora_response", "tfidf_lr")
Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _page(folder: Path) -> str:
    return (folder / run_page.FILE).read_text(encoding="utf-8")


def _text(page: str) -> str:
    """The English of a page, cells separated by ``|``."""
    body = re.sub(r'<span class="zh".*?</span>', "", page.partition("<body")[2])
    body = re.sub(r"</(?:th|td|dt|dd|p)>", "|", body)
    return re.sub(r"\s*\|\s*", "|", html.unescape(re.sub(r"<[^>]*>", "", body)))


def _write(folder: Path, split: str | None = "test") -> str:
    cfg = migration.read(folder / "config.yaml", ())
    run_results.write_page(cfg, RunFolder(folder, _read(folder, "run.json")), cfg.method.name, split)
    return _page(folder)


@pytest.mark.parametrize("method", METHODS)
def test_scores_classes_and_rows_are_those_of_the_files(trained: Trained, method: str) -> None:
    folder = trained(method)
    text, found, ledger = _text(_page(folder)), _read(folder, "metrics.json")["test"], _read(folder, "ledger.json")
    for key in ("accuracy", "macro_f1", "weighted_f1"):
        low, high = found["intervals"][key]
        assert f"{found[key]:.4f} ({low:.3f}-{high:.3f})|" in text
    for row, (label, one) in zip(found["confusion"], found["per_class"].items(), strict=True):
        counts = "|".join(f"{count:,} {100 * count / sum(row):.0f} %" for count in row)
        assert f"{label}|{counts}|" in text
        numbers = "|".join(f"{one[key]:.4f}" for key in ("precision", "recall", "f1"))
        assert f"{label}|{numbers}|{one['support']:,}|" in text
    for split, counts in ledger["splits"].items():
        assert f"{split}|{'|'.join(f'{count:,}' for count in counts.values())}|{sum(counts.values()):,}|" in text


@pytest.mark.parametrize("method", METHODS)
def test_mistakes_are_the_most_confident_wrong_predictions(trained: Trained, method: str) -> None:
    folder = trained(method)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = [row for row in rows if row["label"] != row["gold"]]
    worst = heapq.nlargest(12, wrong, key=lambda row: row["probs"][row["label"]])
    text = _text(_page(folder))
    assert len(wrong) > 12
    assert f"mistakes|{len(wrong):,}|of {len(rows)} test rows|" in text
    assert f"12 of {len(wrong):,} mistakes" in text
    shown = re.findall(r"probability (0\.\d{3}) · (\S+?)\|", text)
    assert shown == [(f"{row['probs'][row['label']]:.3f}", row["id"]) for row in worst]


def test_a_curve_has_the_points_of_the_log(config: Configure, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config("method=lora"), GOLD, answers(GOLD, 0.6, 1))
    page = _write(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [f"{one['step']}: {one['loss']:.3f}" for one in log if "loss" in one]
    assert f'aria-label="Training loss by optimizer step: {", ".join(points[:20])} and 20 more' in page
    best = max((one for one in log if "eval_macro_f1" in one), key=lambda one: one["eval_macro_f1"])
    assert f"best {best['eval_macro_f1']:.4f} at step {best['step']}" in page
    drawn = re.search(r'<path class="line" d="M([^"]*)h0"/>', page)
    assert drawn is not None
    places = np.array([place.split(" ") for place in drawn[1].split("L")], dtype=float)
    losses = np.log10([one["loss"] for one in log if "loss" in one])
    assert abs(np.corrcoef(places[:, 1], losses)[0, 1] + 1) < 1e-4
    assert (places[0, 0], places[-1, 0], len(places)) == (0, 1000, 40)


def test_ticks_are_round_numbers_inside_the_interval() -> None:
    assert run_page._ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert run_page._ticks(-0.03, 0.11) == [-0.025, 0, 0.025, 0.05, 0.075, 0.1]
    assert run_page._ticks(10, 904) == [200, 400, 600, 800]
    for low, high in np.random.default_rng(0).normal(0, 100, (50, 2)):
        found = run_page._ticks(min(low, high), max(low, high))
        assert 2 <= len(found) <= 7
        assert min(low, high) <= found[0] < found[-1] <= max(low, high)


@pytest.mark.parametrize("method", METHODS)
def test_every_command_composes(trained: Trained, config: Configure, method: str) -> None:
    page = _page(trained(method))
    commands = [html.unescape(one) for one in re.findall(r"<dd><code>(.*?)</code>", page)]
    assert len(commands) == (6 if method == "lora_response" else 5)
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "run.py"]
        config(*map(command_line.quote, words[2:]))


def test_a_page_is_light_and_asks_for_nothing(trained: Trained) -> None:
    for method in METHODS:
        page = _page(trained(method))
        assert len(page.encode()) < 60_000
        targets = re.findall(r'(?:src|href|action|srcset)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
        assert targets
        assert [one for one in targets if not one.startswith(("#", "data:"))] == []
        assert "@import" not in page
        assert "default-src 'none'" in page


def test_every_phrase_of_a_page_is_translated(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only names, and words of the data, are the same in both languages."""
    real, plain = pages.translated, set[str]()

    def recorded(text: str) -> str | None:
        found = real(text)
        if found is None:
            plain.add(text)
        return found

    monkeypatch.setattr(pages, "translated", recorded)
    for method in METHODS:
        _write(Path(shutil.copytree(trained(method), tmp_path / method)))
    assert {text for text in plain if re.search("[A-Za-z]{3}", text)} == set(METHODS)
    phrases = yaml.safe_load((pages.TEMPLATES / "chinese.yaml").read_text(encoding="utf-8"))
    written = re.findall(r'both\("([^"%]+)"\)', (pages.TEMPLATES / "run.html.j2").read_text(encoding="utf-8"))
    assert len(written) > 5
    assert set(written) <= phrases.keys()
    for english, chinese in phrases.items():
        assert english.count("{}") == len(re.findall(r"\{\d?\}", chinese)), english


def test_markup_of_the_data_is_only_text(config: Configure, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config("method=lora"), GOLD, answers(GOLD, 0.6, 1), labels=(BAIT, "b", "c"))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = (json.dumps({**row, "text": BAIT, "id": BAIT}) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    page = _write(folder)
    assert "<script" not in page
    assert "<img" not in page
    assert html.escape(BAIT, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")


@pytest.mark.parametrize("missing", ["ledger.json", "log.jsonl", "predictions.jsonl", "all facts", "intervals of base"])
def test_what_is_missing_is_left_out(config: Configure, tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run", config("method=lora"), GOLD, answers(GOLD, 0.6, 1))
    sections = {"ledger.json": "Rows", "log.jsonl": "Training", "predictions.jsonl": "Mistakes"}
    if missing in sections:
        (folder / missing).unlink()
    elif missing == "all facts":
        (folder / "run.json").write_text('{"status": "complete"}', encoding="utf-8")
    else:
        values = _read(folder, "metrics.json")
        values["base"] = {**values["test"], "intervals": {}}
        (folder / "metrics.json").write_text(json.dumps(values), encoding="utf-8")
    found = re.findall(r'<h2 id="([\w-]+)"', _write(folder))
    expected = ["scores", "classes", "mistakes", "training", "rows", "commands", "settings"]
    assert found == [name for name in expected if name != sections.get(missing, "").lower()]


def test_a_run_without_scores_has_a_page(config: Configure, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config("method=lora"), GOLD, GOLD)
    (folder / "metrics.json").unlink()
    assert re.findall(r'<h2 id="([\w-]+)"', _write(folder, None)) == ["training", "rows", "commands", "settings"]


def test_the_worse_model_comes_second(config: Configure, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config("method=lora"), GOLD, answers(GOLD, 0.6, 1))
    values = _read(folder, "metrics.json")
    for better in (False, True):
        base = {**values["test"], "macro_f1": 0.99 if better else 0.1}
        (folder / "metrics.json").write_text(json.dumps({**values, "base": base}), encoding="utf-8")
        names = ["base model (zero-shot)", "lora"]
        assert f"score|{'|'.join(names if better else names[::-1])}|" in _text(_write(folder))


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    started = browsers.chromium()
    try:
        yield started
    finally:
        started.quit()


@pytest.mark.parametrize("method", METHODS)
def test_the_language_is_switched_without_a_script_or_a_request(driver: Any, trained: Trained, method: str) -> None:
    driver.get_log("performance")
    driver.get((trained(method) / run_page.FILE).as_uri())
    shown = [driver.find_element("tag name", "body").text]
    driver.find_element("css selector", "label[for=zh]").click()
    shown.append(driver.find_element("tag name", "body").text)
    driver.find_element("css selector", "label[for=en]").click()
    shown.append(driver.find_element("tag name", "body").text)
    assert shown[0] == shown[2]
    for english, chinese in (("Confusion matrix", "混淆矩阵"), ("Mistakes", "错误示例"), ("Commands", "命令")):
        assert [english in text for text in shown[:2]] == [True, False]
        assert [chinese in text for text in shown[:2]] == [False, True]
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.scripts.length") == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_overflows_on_a_telephone(driver: Any, trained: Trained, language: str) -> None:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", TELEPHONE)
    try:
        for method in METHODS:
            driver.get((trained(method) / run_page.FILE).as_uri())
            driver.execute_script("document.getElementById(arguments[0]).click()", language)
            width = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert width[0] <= width[1] == TELEPHONE["width"]
            sizes = "return [...new Set([...document.querySelectorAll('main *, header *')].filter(e => e.innerText)"
            sizes += ".map(e => getComputedStyle(e).fontSize))]"
            assert set(driver.execute_script(sizes)) <= {"25.6px", "20px", "16px", "14.72px"}
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
