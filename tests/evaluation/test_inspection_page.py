"""The page in a real browser: on any screen, with keyboard and screen reader, and offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import browsers
import polars as pl
import pytest

from finsa.config import RunConfig
from finsa.stages import inspect

BAIT = (
    '<img src="http://example.invalid/x.png" onerror="document.title=1"></td></table><script>document.title=2</script>'
)
TELEPHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


class Opened(NamedTuple):
    """A page in a browser, and the folder of the page."""

    driver: Any
    folder: Path
    text: str
    performance: list[dict[str, Any]]
    console: list[dict[str, Any]]


def _write(folder: Path) -> None:
    """Rows with everything that could break a page: markup, control characters, dropped rows, two sources."""
    rows = [
        (f"bbs-{n}", f"{BAIT}第{n}楼说这只股票{'大涨' * (n % 9)}", ("利好", "中性", "利空")[n % 3]) for n in range(90)
    ]
    rows += [(f"web-{n}", f"公司{n * 7919}公告\x1b：净利润下降{n}%", ("利好", "利空")[n % 2]) for n in range(90)]
    rows += [("bbs-100", "下跌" * 400, "利空"), ("bbs-101", "", "利空"), ("bbs-102", rows[95][1], rows[95][2])]
    pl.DataFrame(rows, ["id", "text", "label"], orient="row").write_parquet(folder / "rows.parquet")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., RunConfig]) -> Iterator[Opened]:
    driver = browsers.chromium()
    try:
        data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
        _write(data)
        cfg = config("stage=inspect", "data=table", f"data.files={data}", f"output_dir={out}", "tracking=none")
        folder = inspect.run(cfg).run_dir
        assert folder is not None
        driver.get((folder / "inspect.html").as_uri())
        text = driver.find_element("tag name", "body").text
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        yield Opened(driver, folder, text, messages, driver.get_log("browser"))
    finally:
        driver.quit()


def _table(opened: Opened, caption: str) -> dict[str, list[str]]:
    """The body of a table: other cells by first cell."""
    script = (
        "return [...document.querySelectorAll('table')].filter(t => t.caption && t.caption.textContent == arguments[0])"
        ".map(t => [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent)))[0]"
    )
    return {first: others for first, *others in opened.driver.execute_script(script, caption)}


def test_title_and_sections(opened: Opened) -> None:
    assert opened.driver.title == "finsa: inspection of data0"  # of its files, which lie in a folder of that name
    headings = [heading.text for heading in opened.driver.find_elements("css selector", "h2")]
    assert headings == [
        "Summary",
        "Ledger",
        "Labels",
        "Tokens",
        "Near duplicates",
        "Groups and confounds",
        "Examples as the model sees them",
    ]


def test_the_ledger_is_that_of_the_file(opened: Opened) -> None:
    ledger = json.loads((opened.folder / "ledger.json").read_text(encoding="utf-8"))
    buckets = _table(opened, "Rows by bucket")
    assert {name: cells[0] for name, cells in buckets.items()} == {
        name: f"{n:,}" for name, n in ledger["buckets"].items()
    }
    assert buckets["empty text"][1] == "\n".join(ledger["examples"]["empty text"])
    assert ledger["buckets"] == {"used": 180, "used, truncated": 1, "empty text": 1, "duplicate": 1}
    assert _table(opened, "Rows read by file") == {file: [f"{count:,}"] for file, count in ledger["read"].items()}
    rows = {split: list(map(int, cells)) for split, cells in _table(opened, "Rows by split").items()}
    splits = ledger["splits"]
    assert rows == {split: [*of.values(), sum(of.values()), ledger["truncated"][split]] for split, of in splits.items()}
    for label, cells in _table(opened, "Used rows by label").items():
        counts = [of[label] for of in splits.values()]
        assert list(map(int, cells)) == [*counts, sum(counts)]


def test_findings_are_those_of_the_file(opened: Opened) -> None:
    findings = json.loads((opened.folder / "inspect.json").read_text(encoding="utf-8"))["findings"]
    shown = [item.text for item in opened.driver.find_elements("css selector", ".remarks li")]
    assert shown == findings
    assert "Id prefix web (90 rows, 50 % of all) has no 中性 rows." in shown


def test_all_figures_are_loaded_and_are_the_files(opened: Opened) -> None:
    images = opened.driver.execute_script("return [...document.images].map(i => [i.naturalWidth, i.complete, i.alt])")
    assert len(images) == len(list(opened.folder.glob("*.png"))) == 7
    assert all(width > 600 and complete and alt for width, complete, alt in images)


def test_the_page_makes_no_requests_and_the_console_is_empty(opened: Opened) -> None:
    requests = [m["params"]["request"]["url"] for m in opened.performance if m["method"] == "Network.requestWillBeSent"]
    page = (opened.folder / "inspect.html").as_uri()
    assert [url[:200] for url in requests if url != page and not url.startswith("data:")] == []
    assert page in requests
    assert opened.console == []


def test_markup_in_texts_is_escaped(opened: Opened) -> None:
    assert '<img src="http://example.invalid/x.png"' in opened.text
    assert opened.driver.execute_script("return document.scripts.length") == 0
    assert "公告␛：净利润下降" in opened.text
    assert "\x1b" not in opened.text


def test_examples_show_segments_loss_and_truncated_text(opened: Opened) -> None:
    articles = opened.driver.find_elements("css selector", "article")
    assert len(articles) == 9
    truncated = [article for article in articles if article.find_elements("css selector", ".truncated")]
    assert len(truncated) == 1
    assert "下跌下跌" in truncated[0].find_element("css selector", ".truncated del").text
    training = [article for article in articles if article.text.startswith("train")]
    for article in training:
        loss = "".join(piece.text for piece in article.find_elements("css selector", ".t.loss"))
        assert loss == article.find_element("css selector", ".answer").text + "<|endoftext|>"
    assert not articles[-1].find_elements("css selector", ".t.loss")


def test_on_a_phone_the_page_does_not_scroll_horizontally(opened: Opened) -> None:
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", TELEPHONE)
    try:
        for details in opened.driver.find_elements("css selector", "details summary"):
            details.click()
        width = opened.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width == [360, 360]
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_scrollable_regions_are_reachable_by_keyboard(opened: Opened) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.driver.refresh()
    opened.driver.find_element("tag name", "body").send_keys(Keys.TAB)
    first = opened.driver.switch_to.active_element
    assert first.text == "Skip to the summary"
    first.send_keys(Keys.ENTER)
    assert opened.driver.switch_to.active_element.text == "Summary"
    script = "return [...document.querySelectorAll('.scroll')].filter(e => e.tabIndex !== 0 || !e.ariaLabel).length"
    assert opened.driver.execute_script(script) == 0


def test_the_page_is_labeled_for_screen_readers(opened: Opened) -> None:
    nodes = opened.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    wanted = {"banner", "main", "navigation", "heading", "table", "image", "article", "list"}
    assert wanted - set(named) == set()
    assert [role for role in ("table", "image", "heading", "link", "region") if "" in named[role]] == []
    levels = opened.driver.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert opened.driver.execute_script("return document.documentElement.lang") == "en"
    assert opened.driver.execute_script("return document.querySelectorAll('[lang=zh-Hans]').length") > 20
