"""A part of the sample, for tests that do not depend on the number of rows."""

from __future__ import annotations

from finsa.config import ROOT

FEW = f"data.files={ROOT / 'tests' / 'rows'}"
