"""What a second process is worth: the same steps by one process with one and two threads, and by two with one each.

    python benchmarks/ranks.py [turns]    writes results/ranks.json

The arms take turns in one sitting; each figure is the best of its turns, since other work on the machine only adds.
Validation is left out of the steps that are timed as far as it can be: one validation, of few rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import kept

ROOT = Path(__file__).parents[1]
STEPS = 40
COMMON = (
    "tracking=none",
    "stage.compare_base=false",
    f"train.max_steps={STEPS}",
    f"train.validate_every={STEPS}",
    "train.validation_rows=32",
    "train.batch_size=32",
    "method.adapter.dropout=0.0",
)
# arm: processes, threads of each, what the command adds
ARMS = {
    "1 process, 1 thread": (1, 1, ("train.micro_batch_size=32",)),
    "1 process, 2 threads": (1, 2, ("train.micro_batch_size=32",)),
    "2 processes, 1 thread each, ddp": (2, 1, ("train.micro_batch_size=16", "train.strategy=ddp")),
}


def seconds(processes: int, threads: int, further: tuple[str, ...]) -> tuple[float, float]:
    """Training seconds and tokens of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / "run.py"), *COMMON, *further, f"output_dir={folder}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        (file,) = Path(folder).glob("*/run.json")
        facts = json.loads(file.read_text(encoding="utf-8"))
        return facts["training_seconds"], facts["training_tokens"]


def main() -> None:
    """Print seconds, tokens per second and the ratio to one process with one thread."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    best = dict.fromkeys(ARMS, float("inf"))
    tokens = 0.0
    for _ in range(turns):
        for name, arm in ARMS.items():
            spent, tokens = seconds(*arm)
            best[name] = min(best[name], spent)
            print(f"  {name}: {spent:.1f} s", flush=True)
    first = next(iter(best.values()))
    for name, spent in best.items():
        print(f"{name:34} {spent:7.2f} s  {tokens / spent:9,.0f} tokens/s  {first / spent:5.2f}")
    arms = {
        name: {"seconds": round(spent, 2), "tokens_per_second": round(tokens / spent), "ratio": round(first / spent, 2)}
        for name, spent in best.items()
    }
    kept.write("ranks", {"steps": STEPS, "turns": turns, "arms": arms})


if __name__ == "__main__":
    main()
