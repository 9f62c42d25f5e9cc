from __future__ import annotations

from pathlib import Path

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


def test_without_a_chinese_font_known_names_become_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert figures.font_and_names(["利空", "中性", "利好"]) == ("DejaVu Sans", ["bearish", "neutral", "bullish"])
    assert figures.font_and_names(["a", "看涨"]) == ("DejaVu Sans", ["a", "class 2"])
