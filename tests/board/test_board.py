"""The board in a real browser: compose, start, watch, stop and resume runs, compare them, and try one on texts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import browsers
import pytest
from few import FEW

from finsa.board import processes, runs
from finsa.config import ROOT

TOKEN = "Geheim-0123456789"
TELEPHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


@dataclass
class Board:
    """A running board with a browser.

    Args:
        process: of the board.
        url: its address.
        output: its output folder.
        driver: of the browser.
    """

    process: subprocess.Popen[str]
    url: str
    output: Path
    driver: Any

    def js(self, script: str) -> Any:
        """The value of an expression."""
        return self.driver.execute_script(f"return {script}")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true."""
        from selenium.webdriver.support.wait import WebDriverWait

        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.1)
        return waiting.until(lambda one: one.execute_script(f"return {script}"), script)

    def text(self, name: str) -> str:
        """What is shown in a component."""
        return str(self.js(f"document.querySelector('#{name}').innerText"))

    def wait_for(self, name: str, *words: str) -> None:
        """Wait until a component shows words."""
        for word in words:
            self.wait(f"document.querySelector('#{name}')?.innerText.includes({json.dumps(word)})")

    def click(self, selector: str) -> None:
        """Click an element as soon as it can be clicked."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.disabled === false")
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def tab(self, number: int) -> None:
        """Open a tab."""
        self.wait("document.querySelectorAll('[role=tab]').length >= 4 && !!document.querySelector('#verdict strong')")
        self.driver.execute_script("document.querySelectorAll('[role=tab]')[arguments[0]].click()", number)

    def write(self, name: str, text: str) -> None:
        """Type a text into a box instead of what it contains."""
        box = self.driver.find_element("css selector", f"#{name} textarea")
        box.clear()
        box.send_keys(text)

    def choose(self, name: str, choice: str) -> None:
        """Choose from a list."""
        self.driver.find_element("css selector", f"#{name} input").click()
        options = "[...document.querySelectorAll('ul[role=listbox] li')]"
        option = f"{options}.find(li => li.innerText.replace('✓', '').trim().startsWith('{choice}'))"
        self.wait(option)
        self.driver.execute_script(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")

    def compose(self, text: str, **choices: str) -> None:
        """Compose a valid command, and wait until it is shown."""
        self.wait("document.querySelector('#verdict strong')")
        self.tab(0)
        for name, choice in choices.items():
            self.choose(name, choice)
        self.write("overrides", text)
        words = [f"{name}={choice}" for name, choice in choices.items()]
        self.wait_for("command", *words, *text.split()[-1:])
        self.wait_for("verdict", "Valid")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    output = tmp_path_factory.mktemp("board") / "out"
    output.mkdir()
    process, url = _start(output, f"stage.folders=[{ROOT / 'tests' / 'rows'}]", "stage.refresh_seconds=0.5")
    driver = browsers.chromium("127.0.0.1")
    driver.set_window_size(1280, 900)
    board = Board(process, url, output, driver)
    try:
        yield board
    finally:
        driver.quit()
        board.process.send_signal(signal.SIGINT)  # a test starts another one
        board.process.wait(20)
        for command in processes.started(output):
            if command.running:
                os.kill(command.pid, signal.SIGKILL)


def _start(output: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "run.py", "stage=board", "port=0", f"output_dir={output}", *words]
    environment = {**os.environ, "BOARD_TOKEN": TOKEN, "WANDB_MODE": "offline"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("board at "):
            return process, line.split()[2]
    raise AssertionError("the board did not start")


def test_a_run_is_composed_started_watched_compared_and_tried(board: Board) -> None:
    board.driver.get(f"{board.url}/en/")
    board.wait_for("verdict", "Valid")
    board.write("overrides", "train.epochz=2")
    board.wait_for(
        "verdict", "train.epochz: unknown key. Did you mean 'train.epochs'?  [command line]".replace("  ", " ")
    )
    assert board.js("document.querySelector('#start').disabled")
    board.write("overrides", "data.files=/etc/passwd")
    board.wait_for("verdict", "data.files: /etc/passwd is outside of the folders of the board")
    for seed in (1, 2):
        board.compose(f"tracking=none {FEW} seed={seed}", method="tfidf_lr" if seed == 1 else "majority")
        if seed == 1:
            board.wait_for("plan", "check: tfidf_lr", "language model")
            assert "name: tiny" in board.text("yaml")  # the editor draws the lines that are visible
        board.click("#start")
        board.wait_for("run", "tfidf_lr" if seed == 1 else "majority", "complete", "macro-F1")
    entries = runs.listed(board.output)
    assert [(entry.status, entry.facts["config_hash"] is not None) for entry in entries] == [("complete", True)] * 2
    assert f"python run.py output_dir={board.output} method=majority" in board.text("again")
    for number in range(2):
        boxes = "document.querySelectorAll('#list input[type=checkbox]')"
        board.driver.execute_script(f"{boxes}[{number}].click()")
        board.wait(f"{boxes}[{number}].checked")
    board.click("#compare")
    board.wait("document.querySelector('#comparison iframe')")
    page = board.js("document.querySelector('#comparison iframe').src")
    board.tab(3)
    board.choose("finished", "tfidf_lr")
    board.write("texts", "股价大涨，涨停\n股价大跌，跌停")
    board.click("#predict")
    board.wait("document.querySelectorAll('#answers tbody tr').length == 2")
    rows = board.js("[...document.querySelectorAll('#answers tbody tr')].map(r => r.cells[1].innerText)")
    command = next(one for one in processes.started(board.output) if "stage=predict" in one.words)
    written = (command.folder / "answers.csv").read_text(encoding="utf-8-sig").splitlines()
    assert [line.split(",")[1] for line in written[1:]] == rows
    assert set(rows) <= {"利空", "中性", "利好"}
    messages = [json.loads(entry["message"])["message"] for entry in board.driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(("data:", "blob:", f"{board.url}/"))] == []
    board.driver.get(page)
    assert "tfidf_lr" in board.js("document.body.innerText")
    assert "majority" in board.js("document.body.innerText")


def test_a_run_is_stopped_and_resumed_and_found_by_another_board(board: Board) -> None:
    board.driver.get(f"{board.url}/en/")
    words = f"{FEW} tracking=none stage.compare_base=false train.max_steps=60 train.epochs=40 train.log_every=2"
    board.compose(f"{words} seed=7", train="smoke")
    board.click("#start")
    board.wait("+document.querySelector('#step')?.innerText.split(' ')[0] >= 4")
    board.wait_for("run", "running", "of 60", "Time left", "Loss")
    board.click("#stop")
    board.wait_for("run", "stopped", "is saved")
    board.wait("!!document.querySelector('#resume')")  # the process has ended
    (entry,) = [one for one in runs.listed(board.output) if one.facts.get("seed") == 7]
    made = runs.progress(entry)
    assert made is not None
    stopped_at = int(str(entry.facts["error"]).rpartition("step ")[2].split()[0])
    assert (entry.status, entry.resumable, made.total) == ("stopped", True, 60)
    assert entry.command is not None
    assert asyncio.run(processes.ended(entry.command)) == 130
    assert 4 <= stopped_at < 60
    board.process.send_signal(signal.SIGINT)  # the board is stopped, and another one finds the run
    assert board.process.wait(20) == 0
    board.process, board.url = _start(board.output, "stage.refresh_seconds=0.5")
    board.driver.get(f"{board.url}/en/")
    board.tab(1)
    board.wait("document.querySelectorAll('#list tr[data-name]').length == 3")
    board.driver.execute_script(f"document.querySelector('#list tr[data-name=\"{entry.name}\"]').click()")
    board.click("#resume")
    board.wait_for("run", "complete", "60 of 60")
    resumed = runs.find(board.output, entry.name)
    assert resumed is not None
    assert (resumed.status, resumed.facts["sittings"]) == ("complete", 2)
    assert len(runs.listed(board.output)) == 3  # no sitting is a run of its own
    steps = [json.loads(line)["step"] for line in (resumed.folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_both_languages_fit_a_telephone(board: Board) -> None:
    for language, first in (("en", "New run"), ("zh", "新建运行")):
        board.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", TELEPHONE)
        board.driver.get(f"{board.url}/{language}/")
        board.wait("document.querySelector('#verdict strong')")
        assert board.js("document.querySelector('[role=tab]').innerText") == first
        for number in range(4):
            board.tab(number)
            time.sleep(0.3)
            assert board.js("document.documentElement.scrollWidth") == 390
    board.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_browser_enters_with_the_token(board: Board) -> None:
    process, url = _start(board.output, "stage.token_env=BOARD_TOKEN")
    try:
        board.driver.get(f"{url}/en/")
        assert board.js("document.querySelectorAll('[role=tab]').length") == 0
        board.driver.get(f"{url.replace('://', f'://finsa:{TOKEN}@')}/files/")  # as if typed into the browser's dialog
        board.driver.get(f"{url}/en/")
        board.wait("document.querySelector('#verdict strong')")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_a_shell_run_can_be_stopped_and_resumed(board: Board) -> None:
    words = [FEW, "tracking=none", "stage.compare_base=false", "train=smoke", "train.max_steps=400", "train.epochs=90"]
    command = [sys.executable, "run.py", f"output_dir={board.output}", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not (found := [one for one in runs.listed(board.output) if one.status == "running" and runs.progress(one)]):
        assert time.monotonic() < ends
        time.sleep(0.1)
    (entry,) = found
    assert (entry.pid, entry.command) == (process.pid, None)
    assert entry.words == [f"output_dir={board.output}", *words]
    processes.stop(process.pid)
    assert process.wait(30) == 130
    stopped = runs.find(board.output, entry.name)
    assert stopped is not None
    assert (stopped.status, stopped.resumable) == ("stopped", True)
