"""A part of the sample, for tests to which the number of rows is nothing."""

from __future__ import annotations

from finsa.config import ROOT

FEW = f"data.files={ROOT / 'tests' / 'rows'}"
