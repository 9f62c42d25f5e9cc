"""Keep what a sweep with a real model measured: its report, its scores, and the record of each run.

    python run.py experiment=aidf_real
    python benchmarks/real.py <sweep folder> aidf_real_tfns

It copies ``report.md``, ``report.csv`` and the bar chart to ``benchmarks/results/real/<name>/``, and writes
``runs.json``: of each run what it was started with, its scores, its seconds, and the hashes of the weights it started
from. Texts of the data set, which may not be ours to pass on, are not copied.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from kept import RESULTS, ROOT

FACTS = (
    *("started", "git_commit", "code", "machine", "device", "versions", "seed", "base_weights", "data_fingerprint"),
    *("trainable_parameters", "total_parameters", "steps", "best_validation", "training_seconds", "training_tokens"),
    *("wall_seconds", "peak_memory_bytes", "calibration", "batching"),
)
EXAMPLES = re.compile(r"^#+ .*(examples|texts).*$", re.IGNORECASE)


def keep(sweep: Path, name: str) -> Path:
    """Copy a sweep's results.

    Args:
        sweep: its folder, with a report.
        name: of the folder below ``benchmarks/results/real``.

    Returns:
        The new folder.
    """
    place = RESULTS / "real" / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep / "report.csv", place)
    for chart in ("f1.png", "scores.png"):  # the second of numbers and sets of labels
        if (sweep / "figures" / chart).is_file():
            shutil.copy(sweep / "figures" / chart, place)
    (place / "report.md").write_text(_without_places((sweep / "report.md").read_text(encoding="utf-8"), sweep))
    runs: dict[str, Any] = {}
    for file in sorted(sweep.glob("*/job.json"), key=lambda file: int(file.parent.name)):
        job = json.loads(file.read_text(encoding="utf-8"))
        if job["status"] != "complete":
            raise SystemExit(f"{file.parent}: {job['status']}; resume the sweep first")
        run = Path(job["run"])
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        overrides = [_without_places(text, sweep) for text in job["overrides"]]
        runs[file.parent.name] = {
            "overrides": overrides,
            **{key: facts[key] for key in FACTS if key in facts},
            "metrics": metrics,
        }
    (place / "runs.json").write_text(json.dumps(runs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return place


def _without_places(text: str, sweep: Path) -> str:
    """A text without the folders of this machine."""
    for folder, shown in ((sweep.absolute(), "<sweep>"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(folder), shown)
    return re.sub(r"(?<![\w.])/(?:[\w.-]+/)+([\w.-]+)", r"<...>/\1", text)


if __name__ == "__main__":
    print(keep(Path(sys.argv[1]), sys.argv[2]))
