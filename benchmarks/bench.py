"""All benchmarks with one command: medians over repeats, one table, one chart.

    python benchmarks/bench.py                        the default set, about an hour on two slow cores
    python benchmarks/bench.py --full                 more rows and repeats, all sizes of data
    python benchmarks/bench.py --only epoch startup   some of them
    python benchmarks/bench.py --show                 nothing is run: table and chart from the results that are there
    python benchmarks/bench.py --quick                small shapes, to see that everything runs; nothing is kept

Every benchmark is a script of its own, whose text says what it holds equal; each writes ``results/<name>.json``. Here
they are run one after another, never at once, so that none disturbs another. The service has a benchmark of its own
kind, which ``--serving`` adds. The chart is ``results/bench.png``, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        benchmark: the script's name.
        arm: what was measured.
        value: as text, with its unit.
        ratio: how many times as fast as the reference; None where there is none.
        equal: what is held equal.
    """

    benchmark: str
    arm: str
    value: str
    ratio: float | None
    equal: str


# What each script is told by default, with --full, and with --quick.
WORDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "training_step": (["--turns", "2"], ["--turns", "5", "--rows", "16"], ["--quick", "--rows", "8", "--turns", "1"]),
    "epoch": (["--turns", "1", "--epochs", "2"], ["--turns", "3"], ["--quick"]),
    "inference": (["--texts", "6", "--turns", "2"], ["--turns", "5"], ["--quick", "--texts", "2", "--turns", "1"]),
    "mixture": (
        ["--turns", "2", "--layers", "12"],
        ["--turns", "5"],
        ["--quick", "--turns", "1", "--batch", "2", "--tokens", "24"],
    ),
    "curves": (["--turns", "3"], ["--turns", "7"], ["--quick"]),
    "lines": (["--turns", "5"], ["--turns", "15"], ["--quick"]),
    "data_pipeline": (["--rows", "10000", "100000"], [], ["--quick"]),
    "memory_plan": (["--arms", "lora", "lora, gradient checkpointing"], [], ["--quick", "--arms", "lora"]),
    "startup": ([], [], ["--quick"]),
    "sweep": (["train=smoke"], [], []),
    "report": ([], ["--coverage", "10000"], []),  # prints its figures
    "ranks": ([], [], []),
    "preferences": (["--turns", "2"], [], ["--quick"]),
    "serving": ([], [], []),
}
QUICK_SKIPS = ("sweep", "report", "ranks", "serving")  # without a short version
FULL_ONLY = ("ranks",)


def main() -> int:
    """Run, print, draw. Returns: 1 where a script failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=list(WORDS), default=None)
    kind = options.add_mutually_exclusive_group()
    for flag in ("quick", "full", "show"):
        kind.add_argument(f"--{flag}", action="store_true")
    options.add_argument("--serving", action="store_true")
    given = options.parse_args()
    left_out = () if given.full else FULL_ONLY
    names = given.only or [name for name in WORDS if name not in left_out and (name != "serving" or given.serving)]
    failed = []
    for name in [] if given.show else names:
        if given.quick and name in QUICK_SKIPS:
            continue
        words = WORDS[name][2 if given.quick else 1 if given.full else 0]
        started = time.monotonic()
        done = subprocess.run([sys.executable, f"benchmarks/{name}.py", *words], cwd=ROOT, check=False)
        print(f"==> {name}: {time.monotonic() - started:.0f} s, exit code {done.returncode}", flush=True)
        failed += [name] * (done.returncode != 0)
    if not given.quick:
        found = rows(RESULTS)
        show(found)
        draw(found, RESULTS / "bench.png")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def rows(folder: Path) -> list[Row]:
    """Read the results that are there."""
    found: list[Row] = []
    for name, reader in READERS.items():
        file = folder / f"{name}.json"
        if file.is_file():
            found += reader(json.loads(file.read_text(encoding="utf-8")))
    return found


def _training_step(values: Any) -> list[Row]:
    equal = "weights, LoRA, token ids, labels, batch, optimizer"
    name = f"training_step ({values['model']})"
    return [
        Row(
            f"{name}, behind a shared prefix" if "shared tokens" in arm else name,
            arm,
            f"{one['samples_per_second']} samples/s",
            one["ratio"],
            equal,
        )
        for arm, one in values["arms"].items()
    ]


def _epoch(values: Any) -> list[Row]:
    target = f"s to macro-F1 {values['target_macro_f1']:.3f}"
    equal = "weights, LoRA, rows, labels, batch, epochs, schedule, scorer"
    return [
        Row(
            "epoch (embedded default)",
            arm,
            f"{one['epoch_seconds']} s per epoch, {one['seconds_to_target']} {target}",
            one["ratio"],
            equal,
        )
        for arm, one in values["arms"].items()
    ]


def _inference(values: Any) -> list[Row]:
    equal = "weights, texts, label words"
    name = f"inference ({values['model'].split(',')[0]})"
    return [
        Row(name, arm, f"{one['texts_per_second']} texts/s", one["ratio"], equal) for arm, one in values["arms"].items()
    ]


def _mixture(values: Any) -> list[Row]:
    equal = "weights, rank, targets, token ids, labels, batch"
    return [
        Row(
            f"mixture, {part} ({values['model']}, {values['layers']} layers)",
            arm,
            f"{statistics.median(one['seconds']):.3f} s",
            round(1 / one["of_published"], 2),
            equal,
        )
        for part, arms in values["parts"].items()
        for arm, one in arms.items()
    ]


def _curves(values: Any) -> list[Row]:
    return [
        Row(f"cost over {axis}", f"{axis} {at}", f"{seconds * 1000:.1f} ms per {curve['per']}", None, curve["equal"])
        for axis, curve in values["curves"].items()
        for at, seconds in curve["seconds"].items()
    ]


def _lines(values: Any) -> list[Row]:
    return [
        Row(f"lines ({name}), {one['case']}", arm, f"{found['seconds'] * 1000:.0f} ms", found["ratio"], "rows, weights")
        for name, cases in values["shapes"].items()
        for one in cases
        for arm, found in one["arms"].items()
    ]


def _data_pipeline(values: Any) -> list[Row]:
    return [
        Row(
            "data_pipeline",
            f"{one['rows']:,} rows",
            f"{one['first']['table_seconds']} s table, {one['first']['token_seconds']} s tokens, "
            f"{one['first']['peak_gib']} GiB; again {one['from_cache']['table_seconds']} s",
            None,
            "file, tokenizer",
        )
        for one in values["results"]
    ]


def _memory_plan(values: Any) -> list[Row]:
    return [
        Row(
            f"memory_plan ({one['model']}, {one['dtype']})",
            f"{one['arm']}, {one['rows']} x {one['tokens']} tokens",
            f"{one['measured'] / 2**30:.2f} GiB, estimated {one['estimated'] / 2**30:.2f}",
            None,
            "shape, rows, tokens",
        )
        for one in values["runs"]
    ]


def _startup(values: Any) -> list[Row]:
    return [Row("startup", arm, f"{one['seconds']} s", None, "machine") for arm, one in values["arms"].items()]


def _sweep(values: Any) -> list[Row]:
    equal = "jobs, and their scores" if values["equal_scores"] else "jobs; the scores DIFFER"
    apart = Row("sweep", "a process per job", f"{values['five_processes_s']} s", 1.0, equal)
    return [apart, Row("sweep", "one process", f"{values['one_process_s']} s", values["ratio"], equal)]


def _ranks(values: Any) -> list[Row]:
    return [
        Row("ranks (embedded default)", arm, f"{one['tokens_per_second']:,} tokens/s", one["ratio"], "rows, steps")
        for arm, one in values["arms"].items()
    ]


def _preferences(values: Any) -> list[Row]:
    slowest = max(values["medians"].values())
    return [
        Row(f"preferences ({values['model']})", arm, f"{seconds:.1f} CPU s", slowest / seconds, "weights, LoRA, pairs")
        for arm, seconds in values["medians"].items()
    ]


READERS = {
    "training_step": _training_step,
    "epoch": _epoch,
    "inference": _inference,
    "mixture": _mixture,
    "curves": _curves,
    "lines": _lines,
    "data_pipeline": _data_pipeline,
    "memory_plan": _memory_plan,
    "startup": _startup,
    "sweep": _sweep,
    "ranks": _ranks,
    "preferences": _preferences,
}


def show(found: list[Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="finsa bench; ratio: times as fast as the group's reference", title_justify="left")
    for name in ("benchmark", "arm", "value", "ratio", "held equal"):
        table.add_column(name, justify="right" if name == "ratio" else "left")
    last = ""
    for row in found:
        first = row.benchmark if row.benchmark != last else ""
        last = row.benchmark
        table.add_row(first, row.arm, row.value, "" if row.ratio is None else f"{row.ratio:.2f}x", row.equal)
    Console(width=180).print(table)


def origin(folder: Path) -> str:
    """Machines, versions and commits that the results were made with, for the chart's foot."""
    made = [
        json.loads(file.read_text(encoding="utf-8")).get("provenance", {}) for file in sorted(folder.glob("*.json"))
    ]
    shown = ("torch", "transformers", "trl", "peft")
    versions = {", ".join(f"{name} {one['versions'][name]}" for name in shown) for one in made if "versions" in one}
    machines = {one["machine"] for one in made if "machine" in one}
    commits = {(one.get("git_commit") or "unknown")[:10] for one in made if one}
    return f"{'; '.join(sorted(machines))}\n{'; '.join(sorted(versions))}; commits {', '.join(sorted(commits))}"


def draw(found: list[Row], file: Path) -> None:
    """Draw all ratios as bars, a panel per benchmark, reference at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[Row]] = {}
    for row in found:
        if row.ratio is not None and not row.benchmark.startswith("lines"):  # a dozen panels: in the table alone
            groups.setdefault(row.benchmark, []).append(row)
    if not groups:
        print("no ratios to draw yet", file=sys.stderr)
        return
    heights = [len(group) + 1 for group in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(9, 0.42 * sum(heights) + 0.8), height_ratios=heights, squeeze=False
    )
    for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        ratios = [row.ratio or 0 for row in group]
        colors = ["#1f6f8b" if _own(row.arm) else "#b8b8b8" for row in group]
        bars = axis.barh([row.arm for row in group], ratios, color=colors)
        axis.bar_label(bars, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="#555555", linewidth=0.8)
        axis.set_xlim(0, 1.15 * max(ratios))
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.002, origin(file.parent), fontsize=6, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    print(f"chart: {file}")


def _own(arm: str) -> bool:
    """Whether an arm is finsa's."""
    return arm.startswith(("finsa", "mixture of", "score", "one process"))


if __name__ == "__main__":
    sys.exit(main())
