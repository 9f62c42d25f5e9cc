"""finsa on a GPU in one call of at most ten minutes: is it right, how fast is it, and what does it need.

    python benchmarks/gpu.py                                    everything; results/gpu.json and gpu.md
    python benchmarks/gpu.py --only correctness precision       some sections
    python benchmarks/gpu.py --output /tmp/gpu.json             results elsewhere, the table beside them as gpu.md
    python benchmarks/gpu.py --device cpu                       the small form, which needs no GPU

Nothing is downloaded: architectures are those of conf/model at their true shapes, weights are random. A part that
fails is a row with its error, and the next one starts; where the device has failed with it, or a section runs out of
its time, the next section gets another process. Results are written after every row, so that a call that is killed
loses nothing. Rows that have a limit are checks; the others are measurements. Without a GPU the shapes are tiny, and
what needs a GPU says so.

The sections are in gpu_parts/; each function's text says what it holds equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The sections in the order in which they run, and the seconds that each may take on a GPU, imports included.
SECTIONS = {
    "machine": 60,
    "correctness": 90,
    "precision": 80,
    "attention": 60,
    "training": 110,
    "inference": 70,
    "glm9b": 130,
    "memory": 80,
    "behavior": 70,
    "runs": 100,
}
FRESH = ("training", "glm9b", "behavior")  # on a GPU these begin another process, with nothing left in its memory
SMALL_BUDGET = 120  # on a CPU, whose shapes are tiny
LEAST = 12.0  # seconds under which no section is started


def main(argv: list[str] | None = None) -> int:
    """Run the sections, print the table. Returns: 1 where a check failed or a section did."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    options.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    options.add_argument("--minutes", type=float, default=9.5, help="after which no section runs on")
    options.add_argument("--output", type=Path, help="default on a GPU: benchmarks/results/gpu.json; on a CPU: none")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    names = [name for name in SECTIONS if name in given.only]
    if given.child is not None:
        import gpu_parts

        gpu_parts.run(names, given.device, given.child)
        return 0
    device = _device(given.device)
    output = given.output or (ROOT / "benchmarks" / "results" / "gpu.json" if device == "cuda" else None)
    report = Report(device, names, output)
    signal.signal(signal.SIGTERM, _stop)  # so that a child does not outlive this process
    deadline = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(names)
        while waiting:
            fresh = [at for at, name in enumerate(waiting) if at and name in FRESH and device == "cuda"]
            group = waiting[: min(fresh, default=len(waiting))]
            for event in events(group, device, deadline, Path(folder)):
                report.take(event)
                if event["event"] == "end":
                    waiting.remove(event["section"])
    report.finish()
    return int(any(row["ok"] is False for row in report.rows()))


def _device(wished: str) -> str:
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wished == "cuda" and found == "cpu":
        sys.exit("benchmarks/gpu.py: --device cuda: torch sees no GPU here; --device cpu runs the small form")
    return found if wished == "auto" else wished


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def row(name: str, value: str, ok: bool | None = None, limit: str = "", **figures: Any) -> dict[str, Any]:
    """A line of the table.

    Args:
        name: what was measured.
        value: as text, with its unit.
        ok: whether the limit was met; None: a measurement.
        limit: as text.
        figures: the numbers behind the text.
    """
    return {"name": name, "value": value, "ok": ok, "limit": limit, "figures": figures}


# ------------------------------------------------------------------------------------------------ processes


def events(names: Sequence[str], device: str, deadline: float, folder: Path) -> Iterator[dict[str, Any]]:
    """Run sections in one process and report what happens, until all have ended or one took the process with it.

    Args:
        names: of the sections.
        device: ``cuda`` or ``cpu``.
        deadline: of `time.monotonic`, at which a section is stopped whatever its budget.
        folder: for what the process writes.

    Yields:
        ``{"event": "row", "section", "row"}``, and for each section that is over ``{"event": "end", "section",
        "seconds"}``.
    """
    if deadline - time.monotonic() < LEAST:
        for name in names:
            text = "skipped: the time of this call was used up; run it by --only"
            yield {"event": "row", "section": name, "row": row("section", text)}
            yield {"event": "end", "section": name, "seconds": 0.0}
        return
    file, log = folder / f"{names[0]}.jsonl", folder / f"{names[0]}.log"
    words = [sys.executable, __file__, "--child", str(file), "--device", device, "--only", *names]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    read, ended, begun = 0, 0, time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        while ended < len(names):
            running = process.poll() is None
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
            for line in (line for line in lines[read:] if line.endswith("\n")):
                read += 1
                event = json.loads(line)
                ended += event["event"] == "end"
                begun = time.monotonic() if event["event"] == "end" else begun
                yield event
            if ended == len(names):
                break
            name, took = names[ended], time.monotonic() - begun
            budget = SECTIONS[name] if device == "cuda" else SMALL_BUDGET
            late = took > budget or time.monotonic() > deadline
            if late or not running:
                what = f"stopped after {took:.0f} s: out of its time" if late else _ending(process.returncode, log)
                yield {"event": "row", "section": name, "row": row("section", what, ok=False)}
                yield {"event": "end", "section": name, "seconds": round(took, 1)}
                return
            time.sleep(0.1)
    finally:
        _kill(process)


def _ending(code: int, log: Path) -> str:
    """How a process ended that should not have, with what it said last."""
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
    return f"the process ended with exit code {code}: {' / '.join(last)[-400:]}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ------------------------------------------------------------------------------------------------ results


class Report:
    """What was measured so far, in a file after every row.

    Args:
        device: ``cuda`` or ``cpu``.
        names: of the sections that are to run.
        output: the file; None: nothing is written.
    """

    def __init__(self, device: str, names: Sequence[str], output: Path | None) -> None:
        import kept

        self.output, self.started = output, time.monotonic()
        sections: dict[str, Any] = {
            name: {"budget_seconds": SECTIONS[name], "seconds": None, "rows": []} for name in names
        }
        self.values: dict[str, Any] = {"title": "GPU", "form": "full" if device == "cuda" else "small", **card()}
        self.values |= {"sections": sections, "provenance": kept.here(), "seconds": None}

    def take(self, event: dict[str, Any]) -> None:
        """Note an event; a row of a name that is there takes its place."""
        section = self.values["sections"][event["section"]]
        if event["event"] == "end":
            section["seconds"] = event["seconds"]
            print(f"==> {event['section']}: {event['seconds']:.0f} s", flush=True)
        else:
            new = event["row"]
            section["rows"] = [one for one in section["rows"] if one["name"] != new["name"]] + [new]
            mark = {True: "ok", False: "FAILED", None: ""}[new["ok"]]
            print(f"{event['section']}: {new['name']}: {new['value']} {new['limit']} {mark}".rstrip(), flush=True)
        self.values["seconds"] = round(time.monotonic() - self.started, 1)
        self._write()

    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return [one for section in self.values["sections"].values() for one in section["rows"]]

    def finish(self) -> None:
        """Print the table."""
        self._write()
        print(f"\n{markdown(self.values)}", flush=True)
        if self.output is not None:
            print(f"results: {self.output}, {self.output.with_suffix('.md')}")

    def _write(self) -> None:
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        texts = {self.output: json.dumps(self.values, ensure_ascii=False, indent=1)}
        texts[self.output.with_suffix(".md")] = markdown(self.values)
        for file, text in texts.items():
            whole = file.with_name(f"{file.name}.part")
            whole.write_text(text + "\n", encoding="utf-8")
            whole.replace(file)


def markdown(values: dict[str, Any]) -> str:
    """The table, ready for docs/performance.md."""
    versions = values["provenance"]["versions"]
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    rows, failed = [one for section in values["sections"].values() for one in section["rows"]], 0
    failed = sum(one["ok"] is False for one in rows)
    checks = sum(one["ok"] is not None for one in rows)
    commit = (values["provenance"].get("git_commit") or "unknown")[:10]
    lines = [
        f"{values['card']}; driver {values['driver']}; clock {values['clock']}; {made}; commit {commit}; "
        f"{values['form']} form, {values['seconds']} s; {checks - failed} of {checks} checks met "
        "(`python benchmarks/gpu.py`).",
        "",
        "| section | what | measured | limit | check |",
        "|---|---|---|---|---|",
    ]
    for name, section in values["sections"].items():
        for one in section["rows"]:
            check = {True: "met", False: "**not met**", None: ""}[one["ok"]]
            cells = (name, one["name"], one["value"], one["limit"], check)
            lines.append(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |")
    return "\n".join(lines)


def card() -> dict[str, str]:
    """Name, driver and clocks of the GPU, as nvidia-smi reports them."""
    asked = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total")
    try:
        words = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        found = [field.strip() for field in done.stdout.splitlines()[0].split(",")]
        name, driver, now, most, memory, power, size = found
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"card": "no GPU", "driver": "none", "clock": "none"}
    clock = f"{now} of at most {most} (idle), memory {memory}, power limit {power}"
    return {"card": f"{name}, {size}", "driver": driver, "clock": clock}


if __name__ == "__main__":
    sys.exit(main())
