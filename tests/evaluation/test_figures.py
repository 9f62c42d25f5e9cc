from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager, image

from finsa.evaluation import figures, metrics

REPORT = metrics.report([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], ("利空", "中性", "利好"))


def test_a_confusion_matrix_has_counts_and_is_colored_by_the_share_of_the_true_class(
    tmp_path: Path, drawn: list[Any]
) -> None:
    figures.confusion_matrix(REPORT, "lora, tiny, sample", tmp_path / "a.png")
    axes, bar = drawn[0].axes
    assert axes.get_title() == "lora, tiny, sample\naccuracy 0.667, macro-F1 0.656"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    counts = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 2]])
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(axes.images[0].get_array(), shares)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {
        (column, row): f"{counts[row, column]}\n{shares[row, column]:.0%}" for row in range(3) for column in range(3)
    }
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["利空", "中性", "利好"]
    assert bar.get_ylabel() == "share of the true class"
    assert min(image.imread(tmp_path / "a.png").shape[:2]) > 400


def test_a_search_is_drawn_by_trial_with_the_best_so_far(tmp_path: Path, drawn: list[Any]) -> None:
    figures.search([0.5, None, 0.4, 0.7], tmp_path / "search.png")
    trials, best, stopped = drawn[0].axes[0].lines
    assert trials.get_xydata().tolist() == [[0, 0.5], [2, 0.4], [3, 0.7]]
    assert best.get_ydata().tolist() == [0.5, 0.5, 0.7]
    assert stopped.get_xydata().tolist() == [[1, 0.4]]


def test_training_curves_have_the_records_of_the_log(tmp_path: Path, drawn: list[Any]) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_macro_f1": 0.6}]
    figure = figures.training_curves([("lora", "#0072B2", [log])], "Training", tmp_path / "curves.png")
    upper, lower = drawn[0].axes
    assert [line.get_xydata().tolist() for line in upper.lines] == [[], [[1, 2.0], [2, 1.0]]]
    assert [line.get_xydata().tolist() for line in lower.lines] == [[[2, 0.6]]]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["lora"]
    assert (upper.get_yscale(), lower.get_ylabel()) == ("log", "macro-F1 on validation")
    assert figure.file.is_file()


def test_the_axis_of_a_penalty_grid_is_its_penalty(tmp_path: Path, drawn: list[Any]) -> None:
    grid = [{"step": n, "strength": c, "eval_macro_f1": 0.5 + n / 100} for n, c in enumerate((0.1, 1.0, 10.0), start=1)]
    figures.penalty_grid([("", "#0072B2", [grid])], tmp_path / "penalties.png")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("C, the inverse strength of the penalty", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "1", "10"]
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0.1, 0.51], [1.0, 0.52], [10.0, 0.53]]
    assert figures.has_penalties(grid)
    assert not figures.has_steps(grid)


def test_a_router_is_drawn_as_the_mean_gates_of_each_domain(tmp_path: Path, drawn: list[Any]) -> None:
    gates = {"news": {"news": 0.9, "forum": 0.1}, "forum": {"news": 0.25, "forum": 0.75}}
    figure = figures.router({"lora mixture": {"mean_gates": gates}}, tmp_path / "router.png")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.9, 0.25, 0.1, 0.75])
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0, 0, 0.9, 0.25])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["lora mixture: news", "lora mixture: forum"]
    assert [text.get_text() for text in axes.get_legend().texts] == ["news", "forum"]
    assert figure.alt == "lora mixture: news: news 0.90, forum 0.10; lora mixture: forum: news 0.25, forum 0.75"


@pytest.mark.parametrize(("color", "ink"), [("#000000", "white"), ("#ffffff", "black"), ("#0072B2", "white")])
def test_text_contrasts_with_its_background(color: str, ink: str) -> None:
    assert figures.ink(color) == ink


def test_many_classes_have_distinct_colors() -> None:
    assert len({tuple(color) for color in figures.palette(50, figures.CLASSES)}) == 50


def test_confusion_matrices_of_many_or_long_labels_are_readable(tmp_path: Path) -> None:
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


def test_of_many_labels_the_most_frequent_are_shown_and_the_rest_combined() -> None:
    labels = [f"{number:02d}" for number in range(30)]
    counts = {label: int(label) for label in labels}
    shown = figures.frequent([counts], labels)
    assert shown == labels[-9:]
    assert figures.folded(counts, labels, shown) == {label: int(label) for label in shown} | {"21 other classes": 210}
    few = {"a": 1, "b": 2}
    assert figures.folded(few, ["a", "b"], figures.frequent([few], ["a", "b"])) == few


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.filterwarnings("error:Glyph")
def test_chinese_names_are_drawn_without_an_installed_chinese_font(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["利空", "看涨", "中性", "Négatif", "положительный", "股吧评论（2024）"]
    assert figures.font_and_names(names) == ("Finsa Sans SC", names)
    figures.confusion_matrix(REPORT, "lora, tiny, 股吧评论", tmp_path / "chinese.png")  # a missing glyph is an error
    assert capsys.readouterr().err == ""


def test_latin_names_do_not_use_the_chinese_font() -> None:
    assert figures.font_and_names(["up", "Négatif", "нейтральный"]) == (
        "DejaVu Sans",
        ["up", "Négatif", "нейтральный"],
    )


@pytest.mark.usefixtures("no_fonts")
def test_names_that_no_font_can_render_are_numbered_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert figures.font_and_names(["up", "鱻犇", "看涨"]) == ("Finsa Sans SC", ["up", "class 2", "看涨"])
    assert capsys.readouterr().err == (
        "warning: no font has 犇鱻; figures show 'class 1', 'class 2' ... instead of the names. Install one that has "
        "them, such as Debian's fonts-noto-cjk; tables and pages are not affected\n"
    )


def test_a_font_installed_after_matplotlib_cached_its_list_is_found(
    no_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is cached on disk; here it lacks a font that the system has."""
    monkeypatch.setattr(figures, "CHINESE", Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    new = tmp_path / "new.otf"
    new.write_bytes((Path(figures.__file__).parent / "fonts" / "FinsaSansSC.otf").read_bytes())
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(new)])
    assert figures.font_and_names(["利空"]) == ("Finsa Sans SC", ["利空"])
    assert font_manager.findfont("Finsa Sans SC") == str(new)


def test_the_chinese_font_covers_gb_2312_level_1_and_includes_its_license() -> None:
    level = [bytes((row, cell)).decode("gb2312", "ignore") for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    level = [letter for letter in level if letter]
    assert len(level) == 3755
    assert figures._missing(figures.CHINESE, frozenset(level)) == frozenset()
    assert figures.CHINESE.stat().st_size < 1_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (figures.CHINESE.parent / "OFL.txt").read_text(encoding="utf-8")
