"""The service on the embedded default: latency of single requests, throughput under many clients, and a soak.

The service is the command of the README in a process of its own; the clients are in this one, on the same cores, so
the figures are what one machine does with both. Texts are joined from the sample's test rows to about 100 tokens.

    python benchmarks/serving.py                   # trains the default first, where there is no run of it
    python benchmarks/serving.py --minutes 10      # also ten minutes of load: errors, memory
    python benchmarks/serving.py --run <folder>    # another run, or an export: one row more in the same file
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
CLIENTS = 64
CHARACTERS = 150  # of a text: about 100 tokens of the embedded tokenizer
TARGETS = {"p50_ms": 30.0, "p99_ms": 100.0, "texts_per_second": 150.0}


def texts(count: int) -> list[str]:
    """Texts of about 100 tokens."""
    rows = pl.read_csv(ROOT / "data" / "sample" / "test.csv")["text"].to_list()
    whole = "".join(rows)
    starts = np.random.default_rng(0).integers(0, len(whole) - CHARACTERS, count)
    return [whole[start : start + CHARACTERS] for start in starts.tolist()]


@contextmanager
def service(run: str, output_dir: str, words: list[str]) -> Iterator[tuple[str, int]]:
    """The command, from when it listens until it is told to stop: its address and process."""
    command = [sys.executable, "run.py", "stage=serve", f"run={run}", f"output_dir={output_dir}", "port=0", *words]
    with subprocess.Popen([*command, "tracking=none"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            url = re.search(r"^serving .* at (\S+)", line)
            if url:
                break
        else:
            sys.exit("the service did not start")
        try:
            yield url[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and tail in milliseconds."""
    p50, p90, p99 = np.percentile(1000 * np.array(seconds), [50, 90, 99]).tolist()
    return {"p50_ms": round(p50, 2), "p90_ms": round(p90, 2), "p99_ms": round(p99, 2)}


def single(url: str, asked: list[str]) -> dict[str, Any]:
    """Latencies of one request after the other: at the server as it says, and at the client."""
    at_server, at_client = [], []
    with httpx.Client(base_url=url, trust_env=False) as client:
        for number, text in enumerate(asked):
            started = time.perf_counter()
            answer = client.post("/predict", json={"text": text}).raise_for_status().json()
            if number >= 20:
                at_client.append(time.perf_counter() - started)
                at_server.append(answer["time_ms"] / 1000)
    return {"requests": len(at_server), "server": percentiles(at_server), "client": percentiles(at_client)}


async def load(url: str, asked: list[str], seconds: float, pid: int) -> dict[str, Any]:
    """Requests of many clients at once, each with one text, for so many seconds."""
    statuses, taken, memory = Counter[str](), list[float](), list[int]()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(*address(url))
        at = number
        while time.monotonic() < end:
            started = time.perf_counter()
            try:
                statuses[await ask(reader, writer, asked[at % len(asked)])] += 1
            except (OSError, EOFError, ValueError) as error:
                statuses[type(error).__name__] += 1
                reader, writer = await asyncio.open_connection(*address(url))
            taken.append(time.perf_counter() - started)
            at += CLIENTS
        writer.close()

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident(pid))
            await asyncio.sleep(min(5.0, max(0.1, seconds / 20)))

    started, cpu = time.monotonic(), counted(url, "process_cpu_seconds_total")
    calls, rows = counted(url, "finsa_batch_texts_count"), counted(url, "finsa_batch_texts_sum")
    await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))
    wall = time.monotonic() - started
    first, last = memory[len(memory) // 4], memory[-1]
    calls, rows = counted(url, "finsa_batch_texts_count") - calls, counted(url, "finsa_batch_texts_sum") - rows
    cpu = counted(url, "process_cpu_seconds_total") - cpu
    return {
        "clients": CLIENTS,
        "seconds": round(wall, 1),
        "texts_per_second": round(statuses["200"] / wall, 1),
        "texts_per_call": round(rows / calls, 2),
        "server_cpu_ms_per_text": round(1000 * cpu / rows, 2),
        "client": percentiles(taken),
        "statuses": dict(statuses),
        "memory_mib": {"after_a_quarter": first >> 20, "at_the_end": last >> 20, "most": max(memory) >> 20},
    }


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> str:
    """One request on an open connection, in as few steps as will do: the service shares the cores with its clients.

    Returns:
        The status.
    """
    body = json.dumps({"text": text}).encode()
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", answer)
    content = await reader.readexactly(int(length[1]) if length else 0)
    status = answer.split(b" ", 2)[1].decode()
    if status == "200" and json.loads(content)["input"] != text:
        return "another one's answer"
    return status


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def counted(url: str, name: str) -> float:
    """A number of ``/metrics``."""
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics", trust_env=False).text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def measure(run: str, output_dir: str, minutes: float, seconds: float, words: list[str]) -> dict[str, Any]:
    """All figures of one run."""
    asked = texts(2000)
    with service(run, output_dir, words) as (url, pid):
        model = httpx.get(f"{url}/model", trust_env=False).json()
        result: dict[str, Any] = {"served": model["name"], "settings": words, "load_average": os.getloadavg()[0]}
        result["single"] = single(url, asked[:320])
        result["load"] = asyncio.run(load(url, asked, seconds, pid))
        if minutes:
            result["soak"] = asyncio.run(load(url, asked, 60 * minutes, pid))
    return result


def main() -> None:
    """Measure, show against the targets, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="a run folder or an export")
    parser.add_argument("--output-dir", default="outputs", help="where the run of the defaults is, or will be")
    parser.add_argument("--minutes", type=float, default=0, help="of the soak; 0: none")
    parser.add_argument("--seconds", type=float, default=20, help="of the load")
    parser.add_argument("words", nargs="*", help="overrides, such as stage.batch=16")
    chosen = parser.parse_args()
    result = measure(chosen.run, chosen.output_dir, chosen.minutes, chosen.seconds, chosen.words)
    result |= {"cores": os.cpu_count(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    figures = {**result["single"]["server"], "texts_per_second": result["load"]["texts_per_second"]}
    for name, target in TARGETS.items():
        print(f"{name:18} {figures[name]:8.1f}   target {'>=' if 'texts' in name else '<'} {target:g}")
    print(json.dumps(result, ensure_ascii=False, indent=1))
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"targets": TARGETS, "rows": []}
    kept["rows"] = [row for row in kept["rows"] if (row["served"], row["settings"]) != (result["served"], chosen.words)]
    kept["rows"].append(result)
    RESULTS.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
