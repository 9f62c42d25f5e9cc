"""From a CSV of FinNF's size to splits and tokens: seconds, rows per second and peak memory, by number of rows.

Each size runs in a fresh process, twice: the first builds table and tokens, the second reads them from the cache.
Rows are drawn from generated texts, each made unique by figures; about 150 bytes a row, three labels, 1 % copies and
0.5 % conflicting copies planted, whose numbers the ledger has to find.

    python benchmarks/data_pipeline.py                         # 10 k, 100 k and 1.67 M rows
    python benchmarks/data_pipeline.py --tokenizer <folder>    # a real vocabulary instead of the embedded one
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LABELS = ("利空", "中性", "利好")


def write_table(file: Path, rows: int, seed: int = 7) -> None:
    """Write `rows` rows: unique texts, then 1 % copies with the same and 0.5 % with another label, in random order."""
    from finsa.synthetic import generator

    rng = random.Random(seed)
    texts = generator.generate(4000, seed)["text"].to_list()
    copies, conflicts = rows // 100, rows // 200
    unique = range(rows - copies - conflicts)
    own = [(f"{rng.choice(texts)}成交{rng.randrange(10**9)}手", rng.choice(LABELS)) for _ in unique]
    lines = own + own[:copies]
    lines += [(text, LABELS[LABELS.index(label) - 1]) for text, label in own[copies : copies + conflicts]]
    rng.shuffle(lines)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "text", "label"])
        writer.writerows((number, text, label) for number, (text, label) in enumerate(lines))


def measure(file: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """Load and tokenize in this process, as a run does it. Returns: seconds, memory, and what the ledger found."""
    from finsa.config import compose
    from finsa.data import dataset, tokenized
    from finsa.models import tokenizers

    overrides = ["data=finnf_news", f"data.files={file}", f"data.cache={cache}", f"model.tokenizer={tokenizer}"]
    cfg = compose.build(*compose.compose_values(overrides), overrides)
    words = tokenizers.load_tokenizer(cfg.model)
    started = time.perf_counter()
    data = dataset.load(cfg.data)
    read = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    job = tokenized.build(cfg, data, words)
    started = time.perf_counter()
    tokens = sum(int(job.prompts(split).lengths.sum()) for split in data.splits)
    return {
        "table_seconds": round(read, 2),
        "table_peak_gib": round(memory, 2),
        "token_seconds": round(time.perf_counter() - started, 2),
        "tokens": tokens,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "buckets": dict(data.ledger.buckets),
    }


def fresh(*arguments: str) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


def main() -> None:
    """Measure all sizes and write ``benchmarks/results/data_pipeline.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_673_267])
    parser.add_argument("--tokenizer", default=str(ROOT / "data" / "tiny"))
    parser.add_argument("--quick", action="store_true", help="1,000 rows; nothing is written")
    parser.add_argument("--one", nargs=3, metavar=("FILE", "TOKENIZER", "CACHE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*chosen.one), ensure_ascii=False))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in [1000] if chosen.quick else chosen.rows:
            file = Path(folder) / f"{rows}.csv"
            write_table(file, rows)
            size = file.stat().st_size / 2**20
            first, second = (fresh(str(file), chosen.tokenizer, f"{folder}/cache") for _ in range(2))
            result = {"rows": rows, "mib": round(size, 1), "first": first, "from_cache": second}
            result["table_microseconds_per_row"] = round(first["table_seconds"] / rows * 1e6, 1)
            result["tokenized_rows_per_second"] = round(rows / first["token_seconds"])
            results.append(result)
            print(json.dumps(result, ensure_ascii=False), flush=True)
            file.unlink()
    if not chosen.quick:
        keep(results, Path(chosen.tokenizer).name)


def keep(results: list[dict[str, Any]], tokenizer: str) -> None:
    """Write results beside those of other sizes, each with its own machine and commit."""
    import kept

    file = kept.RESULTS / "data_pipeline.json"
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else []
    measured = {result["rows"] for result in results}
    made = {"tokenizer": tokenizer, "provenance": kept.here()}
    together = [one for one in before if one["rows"] not in measured] + [result | made for result in results]
    kept.write("data_pipeline", {"results": sorted(together, key=lambda one: int(one["rows"]))})


if __name__ == "__main__":
    main()
