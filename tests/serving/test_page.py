"""The page in a real browser: predictions, two languages, CSV files, and no requests to other hosts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import browsers
import pytest
from services import SERVED, Reader, Service, serving, stage_of

from finsa.data.prompts import with_target
from finsa.serving.application import start_page

Compose = Callable[..., Any]
BAIT = '<img src="http://example.invalid/x.png" onerror="document.title=1">'
TELEPHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
TOKEN = "Geheim-0123456789"


class Opened(NamedTuple):
    """A browser with the page of a service."""

    driver: Any
    service: Service
    reader: Reader


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    opened = browsers.chromium("127.0.0.1")
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture(scope="module")
def running(browser: Any, config: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    reader = Reader(experts=("news", "forum"))
    with serving(stage_of(config, texts=100), reader, tmp_path_factory.mktemp("page")) as service:
        yield Opened(browser, service, reader)


@pytest.fixture
def page(running: Opened) -> Opened:
    """The loaded page, in English."""
    running.driver.get(running.service.url)
    running.driver.find_element("css selector", "[data-language=en]").click()
    running.driver.get_log("browser")
    return running


def _wait(driver: Any, script: str, seconds: float = 10) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(lambda one: one.execute_script(f"return {script}"))


def _predict(page: Opened, text: str) -> None:
    page.driver.execute_script("arguments[0].value = arguments[1]", page.driver.find_element("id", "texts"), text)
    page.driver.find_element("id", "predict").click()
    _wait(page.driver, "/answered|已预测/.test(document.getElementById('status').textContent)")


def _rows(page: Opened) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    return page.driver.execute_script(script)


def test_texts_get_label_probabilities_route_and_time(page: Opened) -> None:
    _predict(page, "股价大涨，涨停\n\n股价大跌，跌停\r\n" + "大跌之后是大涨，" * 80)
    rows = _rows(page)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[2] for row in rows] == ["利好", "利空", "利空"]
    assert rows[0][1] == "股价大涨，涨停"
    assert "truncated" in rows[2][1]
    assert rows[0][4].split() == ["news", "25.0", "%", "forum", "75.0", "%"]
    assert rows[0][5].endswith("ms")
    answer = page.service.client.post("/predict", json={"text": "股价大涨，涨停"}).json()
    shown = dict(zip(rows[0][3].split()[::3], rows[0][3].split()[1::3], strict=True))
    assert shown == {label: f"{100 * share:.1f}" for label, share in answer["probs"].items()}
    widths = page.driver.execute_script(
        "return [...document.querySelectorAll('#rows tr:first-child td:nth-child(4) .track')]"
        ".map(t => t.firstChild.getBoundingClientRect().width / t.getBoundingClientRect().width)"
    )
    assert widths == pytest.approx(list(answer["probs"].values()), abs=0.05)
    assert page.driver.find_element("id", "summary").text.split("\n") == ["利空 2", "中性 0", "利好 1"]


def test_examples_fill_the_box_and_ctrl_enter_predicts(page: Opened) -> None:
    from selenium.webdriver.common.keys import Keys

    examples = page.driver.find_elements("css selector", ".example")
    for example in examples:
        example.click()
    assert page.driver.find_element("id", "count").text == f"{len(examples)} texts"
    page.driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    _wait(page.driver, f"document.querySelectorAll('#rows tr').length == {len(examples)}")


def test_markup_in_a_text_is_only_text(page: Opened) -> None:
    _predict(page, BAIT)
    assert _rows(page)[0][1] == BAIT
    assert page.driver.find_elements("css selector", "#rows img") == []
    assert page.driver.title == "finsa"


def test_the_page_makes_no_foreign_requests_and_logs_no_errors(page: Opened) -> None:
    page.driver.get_log("performance")
    page.driver.get(page.service.url)
    _predict(page, "大涨\n大跌")
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [
        f"{page.service.url}/",
        f"{page.service.url}/predict/batch",
    ]
    assert page.driver.get_log("browser") == []


def test_a_foreign_script_does_not_run(page: Opened) -> None:
    page.driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert page.driver.title == "finsa"
    assert "Content Security Policy" in page.driver.get_log("browser")[0]["message"]


def test_the_page_is_available_in_chinese(page: Opened) -> None:
    _predict(page, "大跌之后是大涨，" * 80)
    page.driver.find_element("css selector", "[data-language=zh]").click()
    assert page.driver.execute_script("return document.documentElement.lang") == "zh-Hans"
    assert page.driver.find_element("id", "predict").text == "预测"
    assert "过长，已截断" in _rows(page)[0][1]
    left = page.driver.execute_script(
        "return [...document.querySelectorAll('[data-say]')].map(e => e.textContent)"
        ".filter(t => !/[\\u4e00-\\u9fff]/.test(t))"
    )
    assert left == []
    page.driver.find_element("id", "clear").click()
    page.driver.find_element("id", "predict").click()
    assert page.driver.find_element("id", "error").text == "请先输入文本，或选择文件。"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_a_csv_is_read_and_its_texts_predicted(page: Opened, tmp_path: Path, encoding: str) -> None:
    lines = ["id,新闻,date", '1,"大涨，又""大涨""",a', '2,"第一行\n第二行跌",b', "3,平,c", "4,,d"]
    (tmp_path / "新闻.csv").write_bytes("\r\n".join(lines).encode(encoding))
    for give in (_choose, _drop):
        give(page, tmp_path / "新闻.csv")
        _wait(page.driver, "!document.getElementById('columns').hidden")
        chosen = "document.getElementById('column').selectedOptions[0].textContent"
        assert page.driver.execute_script(f"return {chosen}") == "新闻"
        page.driver.find_element("id", "predict").click()
        _wait(page.driver, "document.querySelectorAll('#rows tr').length == 3")
        assert [row[1] for row in _rows(page)] == ['大涨，又"大涨"', "第一行 第二行跌", "平"]
        page.driver.find_element("id", "forget").click()
        assert page.driver.find_element("id", "texts").is_enabled()
        page.driver.find_element("id", "clear").click()


def _choose(page: Opened, file: Path) -> None:
    page.driver.find_element("id", "file").send_keys(str(file))


def _drop(page: Opened, file: Path) -> None:
    """Dispatch the event of dropping a file on the page; the page prevents the browser from opening it."""
    script = """
      const [content, name] = arguments, held = new DataTransfer();
      held.items.add(new File([new Uint8Array(content)], name, { type: 'text/csv' }));
      const told = { dataTransfer: held, bubbles: true, cancelable: true }, place = document.getElementById('drop');
      return ['dragover', 'drop'].map(kind => place.dispatchEvent(new DragEvent(kind, told)));"""
    assert page.driver.execute_script(script, list(file.read_bytes()), file.name) == [False, False]


def test_a_long_list_is_sent_in_chunks_and_only_its_first_rows_are_shown(page: Opened, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"第{number}条大涨" for number in range(500)), encoding="utf-8")
    before = page.service.counted("finsa_texts_total")
    page.driver.find_element("id", "file").send_keys(str(tmp_path / "list.txt"))
    _wait(page.driver, "!document.getElementById('columns').hidden")
    page.driver.find_element("id", "predict").click()
    _wait(page.driver, "/500 texts answered/.test(document.getElementById('status').textContent)")
    assert len(_rows(page)) == 200
    assert page.driver.find_element("id", "more").text == "The first 200 of 500 are shown; the CSV has all."
    assert page.service.counted("finsa_texts_total") - before == 500


def test_errors_are_shown(page: Opened) -> None:
    page.driver.find_element("id", "predict").click()
    assert page.driver.find_element("id", "error").text == "Enter a text first, or choose a file."
    assert page.driver.switch_to.active_element.get_attribute("id") == "texts"
    page.driver.execute_script("document.getElementById('texts').value = 'a\\u0001b'")
    page.driver.find_element("id", "predict").click()
    _wait(page.driver, "document.getElementById('error').textContent.includes('control character U+0001')")


def test_a_keyboard_reaches_everything_in_order(page: Opened) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    order = []
    for _ in range(12):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        order.append(active.get_attribute("id") or active.get_attribute("class") or active.tag_name)
    ids = [name for name in order if name in ("skip", "texts", "example", "file", "predict", "clear")]
    assert ids[:8] == ["texts", "example", "example", "example", "example", "file", "predict", "clear"]


def test_the_page_has_accessible_names_and_live_regions(page: Opened) -> None:
    script = """return [...document.querySelectorAll('textarea, input, select, button, progress')].filter(e =>
        !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.outerHTML)"""
    assert page.driver.execute_script(script) == []
    assert page.driver.find_element("id", "status").get_attribute("aria-live") == "polite"
    assert page.driver.find_element("id", "error").get_attribute("role") == "alert"
    _predict(page, "大涨")
    assert page.driver.execute_script(
        "return [...document.querySelectorAll('.track')].every(t => t.ariaHidden == 'true')"
    )
    headings = page.driver.execute_script("return [...document.querySelectorAll('h1, h2')].map(h => h.tagName)")
    assert headings == ["H1", "H2"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_contrast_with_their_background(page: Opened, scheme: str) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 for text; 1.4.11: 3 for bars and edges."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    script = """
      const canvas = document.createElement('canvas').getContext('2d');
      const style = getComputedStyle(document.documentElement);
      const light = name => {
        canvas.fillStyle = style.getPropertyValue('--' + name); canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return arguments[0].map(pair => {
        const [x, y] = pair.map(light).sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05);
      });"""
    read = [("ink", "card"), ("ink", "back"), ("soft", "card"), ("soft", "back"), ("link", "back"), ("link", "card")]
    read += [("on-main", "main"), ("bad", "bad-back")]
    seen = [("edge", "card"), ("focus", "card"), ("focus", "back"), *((f"c{n}", "card") for n in range(6))]
    contrasts = page.driver.execute_script(script, read + seen)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert min(contrasts[: len(read)]) >= 4.5
    assert min(contrasts[len(read) :]) >= 3


def test_on_a_phone_nothing_scrolls_horizontally(page: Opened) -> None:
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", TELEPHONE)
    try:
        _predict(page, "股价大涨，涨停\n" + "a" * 300)
        width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] == TELEPHONE["width"]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_token_field_is_shown_if_a_token_is_required(browser: Any, config: Compose, tmp_path: Path) -> None:
    with serving(stage_of(config), Reader(), tmp_path, TOKEN) as service:
        browser.get(service.url)
        page = Opened(browser, service, Reader())
        browser.find_element("id", "texts").send_keys("大涨")
        browser.find_element("id", "predict").click()
        _wait(browser, "document.getElementById('error').textContent.includes('send the token')")
        browser.find_element("id", "token").send_keys(TOKEN)
        _predict(page, "大涨")
        assert _rows(page)[0][2] == "利好"


def test_a_target_is_sent_with_every_text(browser: Any, config: Compose, tmp_path: Path) -> None:
    reader, file = Reader(), tmp_path / "rows.csv"
    file.write_text("company,headline\n甲公司,甲公司大涨乙银行大跌\n乙银行,甲公司大涨乙银行大跌\n", encoding="utf-8")

    def read(row: dict[str, Any]) -> tuple[str, str | None]:
        return with_target(row["target"], row["text"]), None

    with serving(stage_of(config, texts=100), reader, tmp_path, read=read) as service:
        page = Opened(browser, service, reader)
        browser.get(service.url)
        browser.find_element("css selector", "[data-language=en]").click()
        browser.execute_script("document.getElementById('texts').value = '甲公司大涨\\n甲公司大跌'")
        browser.find_element("id", "predict").click()
        assert browser.find_element("id", "error").text == "Enter the target of the texts first."
        browser.find_element("id", "target").send_keys("甲公司")
        _predict(page, "甲公司大涨\n甲公司大跌")
        assert [row[1].split("\n") for row in _rows(page)] == [["甲公司大涨", "甲公司"], ["甲公司大跌", "甲公司"]]
        browser.find_element("id", "file").send_keys(str(file))
        _wait(browser, "!document.getElementById('columns').hidden")
        browser.find_element("css selector", "#column option[value='1']").click()
        browser.find_element("id", "predict").click()
        _wait(browser, "document.querySelectorAll('#rows .soft').length == 2 && /乙/.test(document.body.innerText)")
        assert reader.calls[-1] == ["甲公司\n甲公司大涨乙银行大跌", "乙银行\n甲公司大涨乙银行大跌"]


def test_the_embedded_model_is_called_a_demonstration_in_both_languages(config: Compose) -> None:
    told = "A demonstration: the answers come from a tiny embedded model or generated training texts."
    html = bytes(start_page(stage_of(config), {**SERVED, "demonstration": "..."}, needs_token=False).body).decode()
    assert f'<strong data-say="demonstration">{told} Do not rely on them.</strong>' in html
    assert 'demonstration: "仅供演示：答案来自内置的小模型或自动生成的训练文本，请勿据此做判断。"' in html
    assert b'data-say="demonstration"' not in start_page(stage_of(config), SERVED, needs_token=False).body
