"""Take the pictures of the README from a real report: the terminal as SVG, the page as PNG with headless Chromium.

    python docs/pictures.py <run folders, or the folder of a sweep>
    python docs/pictures.py <run folder>/index.html
    python docs/pictures.py <report of experiment=english_sentiment>/report.html
    python docs/pictures.py --board <output_dir>    the board, with its newest run; in a folder that contains output_dir
    python docs/pictures.py --rewards <run> <run>   the reward of two runs of method=expected_reward by step

The report is written by ``stage=report``, so the figures in the pictures are those of the runs. The second
command takes the picture of a run's page, the third that of a table over several data sets. Look at the pictures before
you commit them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
WIDTH = 136
THEME = TerminalTheme(
    (250, 250, 250),
    (40, 44, 52),
    [
        (40, 44, 52),
        (200, 60, 60),
        (60, 130, 60),
        (170, 110, 0),
        (40, 90, 180),
        (140, 60, 140),
        (0, 120, 130),
        (90, 90, 90),
    ],
)


def main(folders: list[str]) -> None:
    """Write a report on the runs and take both pictures."""
    runs = folders[0] if len(folders) == 1 else f"[{','.join(folders)}]"
    with tempfile.TemporaryDirectory() as folder:
        command = "python run.py stage=report runs=<folder> stage.baseline=zero_shot"
        argv = [sys.executable, str(ROOT / "run.py"), "stage=report", f"runs={runs}", f"output={folder}"]
        argv.append("stage.baseline=zero_shot")
        environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        lines = done.stdout.replace(folder, "<folder>").rstrip().splitlines()
        draw_terminal(command, "\n".join(line for line in lines if "runs=" not in line), PICTURES / "terminal.svg")
        photograph_page(Path(folder) / "report.html", PICTURES / "report.png", (1200, 1250), "scores")


def draw_terminal(command: str, output: str, file: Path) -> None:
    """Write the output of a command as SVG, in the fonts of the viewer; nothing is downloaded."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    console.print(Text("$ ", style="bold") + Text(command))
    console.print(Text.from_ansi(output.rstrip()))
    svg = console.export_svg(title="finsa", theme=THEME)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, Noto Sans Mono CJK SC")
    file.write_text(svg, encoding="utf-8")


def photograph_page(page: Path, file: Path, size: tuple[int, int], start: str | None) -> None:
    """Take a screenshot of a page, from its top or the element with the id `start` on, in 64 colors."""
    from PIL import Image
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # None: selenium searches for one
    with webdriver.Chrome(options=options, service=service) as driver:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.absolute().as_uri())
        if start is not None:
            driver.execute_script("document.getElementById(arguments[0]).scrollIntoView()", start)
        driver.save_screenshot(str(file))
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


def photograph_board(output: str, file: Path) -> None:
    """Take a screenshot of the board's list of runs, with the newest run selected."""
    from PIL import Image
    from selenium import webdriver
    from selenium.webdriver.support.wait import WebDriverWait

    command = [sys.executable, str(ROOT / "run.py"), "stage=board", "port=0", f"output_dir={output}"]
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as board:
        assert board.stdout is not None
        url = next(line.split()[2] for line in board.stdout if line.startswith("board at "))
        with webdriver.Chrome(options=options, service=service) as driver:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": 1200, "height": 780, "deviceScaleFactor": 1, "mobile": False},
            )
            driver.get(f"{url}/en/")
            row = "document.querySelector('#list tr[data-name]')"
            WebDriverWait(driver, 60).until(lambda one: one.execute_script(f"return {row}"))
            driver.execute_script("document.querySelectorAll('[role=tab]')[1].click()")
            driver.execute_script(f"{row}.click()")
            WebDriverWait(driver, 60).until(
                lambda one: one.execute_script("return document.querySelector('.run .facts')")
            )
            driver.execute_script("return document.fonts.ready")
            driver.save_screenshot(str(file))
        board.terminate()
    Image.open(file).convert("RGB").quantize(96).save(file, optimize=True)


def draw_rewards(runs: list[str], file: Path) -> None:
    """Draw the objective of runs of ``method=expected_reward`` by step: reward minus beta times the divergence."""
    from PIL import Image

    sys.path.insert(0, str(ROOT))
    from finsa.evaluation import figures

    with figures.canvas(file, 2.8, columns=len(runs)) as (_, axes):
        for run, one in zip(runs, axes[0], strict=True):
            kind = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))["method"]["reward"]["kind"]
            log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            points = [(record["step"], -record["loss"]) for record in log if "loss" in record]
            one.plot(*zip(*points, strict=True), "o-", color=figures.LINES[0], markersize=3, linewidth=1)
            one.set(xlabel="optimizer step", title=f"reward.kind={kind}")
        axes[0][0].set_ylabel("expected reward - beta KL")
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rewards"]:
        sys.exit(draw_rewards(sys.argv[2:], PICTURES / "rewards.png"))
    if sys.argv[1:2] == ["--board"]:
        sys.exit(photograph_board(sys.argv[2], PICTURES / "board.png"))
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1].endswith("report.html"):
        photograph_page(Path(sys.argv[1]), PICTURES / "english_sentiment.png", (1280, 582), "over-the-data-sets")
    elif sys.argv[1].endswith(".html"):
        photograph_page(Path(sys.argv[1]), PICTURES / "run.png", (1100, 1064), None)
    else:
        main(sys.argv[1:])
