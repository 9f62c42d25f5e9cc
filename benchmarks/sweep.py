"""The five-arm ablation in one process against five processes one after the other, in one run.

Both do the same jobs from the same command line; what one process saves is imports, loading, and tokenizing anew.

    python benchmarks/sweep.py                  # the embedded default as it is, about ten minutes
    python benchmarks/sweep.py train=smoke      # any overrides
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kept

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("zero_shot", "lora", "lora_downsample", "lora_response", "lora_response_downsample")


def seconds(*words: str) -> float:
    """Wall time of a command."""
    started = time.monotonic()
    subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def scores(folder: Path) -> dict[str, float]:
    """Test macro-F1 by method of the runs below a folder."""
    found = {}
    for file in folder.rglob("metrics.json"):
        method = next(arm for arm in sorted(ARMS, key=len, reverse=True) if f"name: {arm}\n" in _config(file))
        found[method] = json.loads(file.read_text(encoding="utf-8"))["test"]["macro_f1"]
    return found


def _config(file: Path) -> str:
    return (file.parent / "config.yaml").read_text(encoding="utf-8")


if __name__ == "__main__":
    words = [*sys.argv[1:], "tracking=none"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        together = seconds("-m", f"method={','.join(ARMS)}", *words, f"output_dir={place / 'one'}")
        apart = {arm: seconds(f"method={arm}", *words, f"output_dir={place / 'five'}") for arm in ARMS}
        equal = scores(place / "one") == scores(place / "five")
    total = sum(apart.values())
    result = {
        "overrides": words,
        "one_process_s": round(together, 1),
        "five_processes_s": round(total, 1),
        "ratio": round(total / together, 2),
        "equal_scores": equal,
    }
    kept.write("sweep", result)
    print(json.dumps(result))
