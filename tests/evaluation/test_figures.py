from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager, image

from finsa.evaluation import figures, metrics

REPORT = metrics.report([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], ("利空", "中性", "利好"))


def test_the_figure_is_coloured_by_the_share_of_the_true_class(tmp_path: Path) -> None:
    figures.confusion_matrix(REPORT, "lora, tiny, sample", tmp_path / "a.png")
    empty = dict(REPORT, confusion=[[0, 2, 0], [0, 1, 0], [3, 0, 0]])
    figures.confusion_matrix(empty, "lora, tiny, sample", tmp_path / "b.png")
    first, second = (image.imread(tmp_path / name)[..., :3] for name in ("a.png", "b.png"))
    assert first.shape == second.shape
    assert min(first.shape[:2]) > 400
    assert np.abs(first - second).mean() > 0.01


def test_matrices_of_many_and_of_long_labels_can_be_looked_at(tmp_path: Path) -> None:
    many = [f"intent_{number:03d}" for number in range(150)]
    gold = list(range(150))
    figures.confusion_matrix(metrics.report(gold, gold, many), "tfidf_lr", tmp_path / "many.png")
    assert max(image.imread(tmp_path / "many.png").shape) < 5000
    long = [f"a label of many words, number {number}" for number in range(4)]
    for names in (long, list("abcd")):
        figures.confusion_matrix(
            metrics.report(gold[:4], gold[:4], names), "tfidf_lr", tmp_path / f"{names is long}.png"
        )
    tall, short = (image.imread(tmp_path / f"{kind}.png").shape[:2] for kind in (True, False))
    assert tall[0] >= short[0]


def test_of_many_labels_the_most_frequent_are_shown_beside_the_others() -> None:
    labels = [f"{number:02d}" for number in range(30)]
    counts = {label: int(label) for label in labels}
    shown = figures.frequent([counts], labels)
    assert shown == labels[-9:]
    assert figures.folded(counts, labels, shown) == {label: int(label) for label in shown} | {"21 other classes": 210}
    few = {"a": 1, "b": 2}
    assert figures.folded(few, ["a", "b"], figures.frequent([few], ["a", "b"])) == few


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.filterwarnings("error:Glyph")
def test_without_an_installed_chinese_font_names_are_written_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["利空", "看涨", "中性", "Négatif", "положительный", "股吧评论（2024）"]
    assert figures.font_and_names(names) == ("Finsa Sans SC", names)
    figures.confusion_matrix(REPORT, "lora, tiny, 股吧评论", tmp_path / "chinese.png")  # a missing glyph is an error
    assert capsys.readouterr().err == ""


def test_names_that_need_no_chinese_font_get_none() -> None:
    assert figures.font_and_names(["up", "Négatif", "нейтральный"]) == (
        "DejaVu Sans",
        ["up", "Négatif", "нейтральный"],
    )


@pytest.mark.usefixtures("no_fonts")
def test_what_no_font_can_write_is_numbered_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert figures.font_and_names(["up", "鱻犇", "看涨"]) == ("Finsa Sans SC", ["up", "class 2", "看涨"])
    assert capsys.readouterr().err == (
        "warning: no font has 犇鱻; figures say 'class 1', 'class 2' ... instead of the names. Install one that has "
        "them, such as Debian's fonts-noto-cjk; tables and pages are not affected\n"
    )


def test_a_font_that_was_installed_after_matplotlib_listed_them_is_found(
    no_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is cached on disk; here it lacks a font that the system has."""
    monkeypatch.setattr(figures, "CARRIED", Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    new = tmp_path / "new.otf"
    new.write_bytes((Path(figures.__file__).parent / "fonts" / "FinsaSansSC.otf").read_bytes())
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(new)])
    assert figures.font_and_names(["利空"]) == ("Finsa Sans SC", ["利空"])
    assert font_manager.findfont("Finsa Sans SC") == str(new)


def test_the_carried_font_is_the_first_level_of_gb_2312_and_its_licence_lies_beside_it() -> None:
    level = [bytes((row, cell)).decode("gb2312", "ignore") for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    level = [letter for letter in level if letter]
    assert len(level) == 3755
    assert figures._lacking(figures.CARRIED, frozenset(level)) == frozenset()
    assert figures.CARRIED.stat().st_size < 1_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (figures.CARRIED.parent / "OFL.txt").read_text(encoding="utf-8")
