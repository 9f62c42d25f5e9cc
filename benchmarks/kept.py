"""Where benchmarks write what they measured, and what each file says about its making."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finsa.config import compose
from finsa.runs import provenance

RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, report: dict[str, Any]) -> Path:
    """Write a result with machine, commit, versions and the load of the machine when it was done.

    Args:
        name: of the file, without its ending.
        report: what was measured.

    Returns:
        The file.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps({**report, "provenance": here()}, ensure_ascii=False, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def here() -> dict[str, Any]:
    """Machine, commit and versions."""
    told = provenance.of(compose.build(*compose.compose_values([]), []))
    return {
        **{key: told[key] for key in ("machine", "git_commit", "git_dirty", "versions")},
        "load_average": round(os.getloadavg()[0], 2),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
