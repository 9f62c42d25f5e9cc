"""Fixtures for tests of figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib import font_manager, pyplot

from finsa.evaluation import figures


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with only matplotlib's fonts."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    figures._installed.cache_clear()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that a test draws, kept open so that their data can be read."""
    kept: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    for figure in kept:
        close(figure)
