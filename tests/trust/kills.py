"""Kill commands at random moments, resume as a user would, and compare the results with uninterrupted commands.

Every attempt of a command is a separate process that runs ``run.py`` with its command line and is ended by SIGKILL. So
that attempts are short, they are forked from a process that has imported the libraries. A moment is drawn in processor
time between nothing and what the whole command takes, so that a busy machine does not move it.

    python tests/trust/kills.py 200 --minutes 60    200 kills, or as many as an hour allows
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from safetensors.numpy import load_file  # noqa: F401 - what lives need is imported once, here
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from trl import SFTTrainer  # noqa: F401

from finsa.config import compose
from finsa.data import cache
from finsa.evaluation import figures, report, run_results  # noqa: F401
from finsa.evaluation.reproduction import TIMED
from finsa.inference import predictor  # noqa: F401
from finsa.runs.files import digests
from finsa.runs.processes import QUIET
from finsa.stages import chain, check, evaluate, moe_joint, predict, train  # noqa: F401

LABELS = ("利空", "中性", "利好")
TICKS = os.sysconf("SC_CLK_TCK")
COMMON = ["tracking=none", "train.threads=1"]
FIT = ["train=smoke", "train.max_steps=6", "train.epochs=2", "train.batch_size=16", "train.micro_batch_size=8"]
FIT += ["train.validate_every=2", "train.log_every=2", "train.patience=3", "stage.compare_base=false"]
LORA = ["method=lora_response", "method.adapter.dropout=0.2", *FIT]


# ------------------------------------------------------------------------------------------------ attempts


def live(words: list[str], log: Path, until: float | None = None) -> tuple[int | None, float]:
    """Run a command line in a separate process.

    Args:
        words: the arguments of ``run.py``.
        log: file for its output.
        until: seconds of processor time after which it is killed; None: never.

    Returns:
        Its exit code, None if it was killed, and its processor time.
    """
    process = os.fork()
    if process == 0:
        _be(words, log)
    while until is not None:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), 0.0
        if _spent(process) >= until:
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.002)
    _, status, used = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code, used.ru_utime + used.ru_stime


def _be(words: list[str], log: Path) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        torch.set_num_threads(1)
        cache.MANY_BYTES = cache.MANY_TEXTS = 0  # tables of a few hundred rows are kept as well
        sys.argv = ["run.py", *words]
        runpy.run_path("run.py", run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _spent(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# ------------------------------------------------------------------------------------------------ kinds


@dataclass
class Kind:
    """A command that is killed.

    Args:
        name: for the table.
        words: the command line for a folder.
        resumes: whether ``resume=true`` resumes it, rather than the same command.
        results: the results in a folder that must be equal at the end.
        done: whether the command has finished its work in a folder, even if a kill cut off its last output.
    """

    name: str
    words: Callable[[Path], list[str]]
    resumes: bool
    results: Callable[[Path], Any]
    done: Callable[[Path], bool] = lambda place: False
    whole: Any = None
    seconds: float = 0.0
    tried: int = 0
    survived: int = 0
    faults: list[str] = field(default_factory=list)


def runs_of(place: Path) -> Any:
    """The results of finished runs, by their distinguishing settings, without times."""
    found = {}
    for record in sorted((place / "out").rglob("run.json")):
        facts = json.loads(record.read_text("utf-8"))
        if facts["status"] != "complete":
            continue
        folder = record.parent
        names = ("metrics.json", "predictions.jsonl", "ledger.json", "pairs.jsonl")
        texts = {name: _text(folder / name) for name in names}
        lines = [json.loads(line) for line in (_text(folder / "log.jsonl") or "").splitlines()]
        log = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
        weights = {
            f"{part}/{name}": digest
            for part in ("adapters", "baseline", "tokenizer")
            for name, digest in digests(folder / part).items()
            if not name.endswith("README.md")
        }
        kept = {key: facts.get(key) for key in ("steps", "best_validation", "training_tokens", "data_fingerprint")}
        # an evaluation's configuration names the folder of its run, which has another path in every place
        key = facts["stage"] if facts["stage"] == "evaluate" else facts["config_hash"]
        found[key] = {"texts": texts, "log": log, "weights": weights, "facts": kept}
    return found


def _text(file: Path) -> str | None:
    return file.read_text("utf-8") if file.is_file() else None


def kinds(base: Path) -> list[Kind]:
    """All kinds, on rows and on a trained run that are created in a folder."""
    rows, many = base / "rows.csv", base / "many.csv"
    _write_rows(rows, 60)
    _write_rows(many, 6000)
    data = ["data=table", f"data.files={rows}", f"data.labels=[{','.join(LABELS)}]", "data.cache=null"]
    training = Kind("training", lambda at: [*LORA, *data, *COMMON, f"output_dir={at}/out"], True, runs_of)
    undisturbed(training, base)
    (record,) = (base / "training" / "whole").rglob("run.json")
    trained = record.parent

    def out(place: Path) -> str:
        return f"output_dir={place}/out"

    def cached(place: Path) -> Any:
        return {entry.name: digests(entry) for entry in (place / "cache").iterdir() if not entry.name.startswith(".")}

    links = "stage.links={first: {stage: train}, second: {stage: evaluate, run: '@first'}}"
    chained = [word for word in [*LORA, *data, *COMMON] if not word.startswith("stage.")]
    joint = ["stage=moe_joint", "stage.missing=train", "stage.compare=false", "stage.warmup_steps=3", "stage.epochs=1"]
    joint += [word for word in LORA if not word.startswith("stage.")]
    started = [*data, *COMMON, f"method.init={trained}", "method.adapter.dropout=0.2", *FIT]
    pairs = ["method=dpo", "method.preference.folds=2", *started]
    predicted = ["stage=predict", f"run={trained}", f"input={rows}", "stage.chunk=4", *COMMON]
    return [
        training,
        Kind("preference", lambda at: [*pairs, out(at)], True, runs_of),
        Kind("reward", lambda at: ["method=expected_reward", *started, out(at)], True, runs_of),
        Kind("evaluation", lambda at: ["stage=evaluate", f"run={trained}", *COMMON, out(at)], True, runs_of),
        Kind(
            "prediction",
            lambda at: [*predicted, f"output={at}/answers.csv"],
            False,
            lambda at: _text(at / "answers.csv"),
            lambda at: (at / "answers.csv").is_file() and not (at / "answers.csv.partial").is_dir(),
        ),
        Kind(
            "sweep",
            lambda at: ["-m", "method=tfidf_lr,lora_response,majority", *FIT, *data, *COMMON, out(at)],
            False,
            runs_of,
        ),
        Kind("mixture", lambda at: [*joint, *data, *COMMON, out(at)], True, runs_of),
        Kind("chain", lambda at: ["stage=chain", links, *chained, out(at)], True, runs_of),
        Kind(
            "cache building",
            lambda at: ["stage=check", *data[:1], f"data.files={many}", data[2], f"data.cache={at}/cache", *COMMON],
            False,
            cached,
        ),
    ]


def _write_rows(file: Path, number: int) -> None:
    draw = random.Random(number)
    words = {"利空": "亏损下滑暴跌", "中性": "公告会议发布", "利好": "大涨盈利增长"}
    with file.open("w", encoding="utf-8") as stream:
        stream.write("id,text,label,domain\n")
        for row in range(number):
            label = LABELS[row % 3]
            text = "".join(draw.choices(words[label] + "公司今日市场股票年度", k=draw.randrange(8, 40)))
            stream.write(f"{row},第{row}条{text},{label},{('news', 'forum')[row // 3 % 2]}\n")


# ------------------------------------------------------------------------------------------------ kills


def undisturbed(kind: Kind, base: Path) -> None:
    """Record the results and the processor time of a command."""
    place = base / kind.name / "whole"
    place.mkdir(parents=True)
    code, kind.seconds = live(kind.words(place), place / "log")
    assert code == 0, f"{kind.name}: {(place / 'log').read_text('utf-8')[-2000:]}"
    kind.whole = kind.results(place)
    assert kind.whole


def disturbed(kind: Kind, base: Path, draw: random.Random, kills: int) -> None:
    """Kill a command several times in a row, let it finish, and compare."""
    place = base / kind.name / f"{len(kind.faults)} {kind.tried}"
    place.mkdir(parents=True)
    killed, code = 0, None
    while code is None:
        moment = draw.uniform(0, kind.seconds) if killed < kills else None
        code, _ = live([*kind.words(place), *_resume(kind, place)], place / "log", moment)
        killed += code is None
        if code not in (None, 0) and kind.done(place):
            code = 0
    kind.tried += killed
    found = kind.results(place) if code == 0 else f"exit code {code}: {(place / 'log').read_text('utf-8')[-1500:]}"
    if found == kind.whole:
        kind.survived += killed
        shutil.rmtree(place)
    else:
        kind.faults.append(f"{place}: {found if isinstance(found, str) else difference(kind.whole, found)}")


def difference(first: Any, second: Any, path: str = "") -> str:
    """Describe the first difference between two values."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return next(difference(first[key], second[key], f"{path}/{key}") for key in first if first[key] != second[key])
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return next(difference(one, other, f"{path}/{number}") for number, (one, other) in pairs if one != other)
    return f"{path}: {str(first)[:300]} against {str(second)[:300]}"


def _resume(kind: Kind, place: Path) -> Iterator[str]:
    """``resume=true`` if there is something to resume; otherwise the command would refuse it."""
    states = [json.loads(file.read_text("utf-8"))["status"] for file in (place / "out").rglob("run.json")]
    if kind.resumes and (kind.name == "chain" or any(state != "complete" for state in states)):
        yield "resume=true"


def table(measured: list[Kind]) -> str:
    """The results, one line per kind."""
    lines = [f"{'':16}{'survived':>9} / {'tried':<6}"]
    lines += [f"{kind.name:16}{kind.survived:>9} / {kind.tried:<6}" for kind in measured]
    tried, survived = (sum(getattr(kind, name) for kind in measured) for name in ("tried", "survived"))
    return "\n".join([*lines, f"{'all':16}{survived:>9} / {tried:<6}"])


def main() -> None:
    """Distribute the kills over the kinds, those with the fewest first."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "kills", type=int, help="how many, over all kinds; a command that was begun is brought to its end"
    )
    parser.add_argument("--minutes", type=float, default=600, help="end earlier after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "trust.json")
    parser.add_argument("--kinds", nargs="+", help="some of them; none given: all")
    given = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    compose.compose_values(LORA)  # Hydra's parser is slow until it has seen the grammar once
    gc.freeze()
    draw, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="finsa-trust-") as folder:
        base = Path(folder)
        measured = [kind for kind in kinds(base) if given.kinds is None or kind.name in given.kinds]
        for kind in measured:
            if kind.whole is None:
                undisturbed(kind, base)
            print(f"{kind.name}: {kind.seconds:.1f} s of processor time undisturbed", flush=True)
        while sum(kind.tried for kind in measured) < given.kills and time.monotonic() - began < 60 * given.minutes:
            kind = min(measured, key=lambda kind: kind.tried)
            disturbed(kind, base, draw, min(draw.randint(2, 5), max(1, given.kills // len(measured))))
            print(f"{time.monotonic() - began:6.0f} s  {kind.name}: {kind.survived} / {kind.tried}", flush=True)
            for fault in kind.faults[-1:]:
                print(fault, flush=True)
    print(table(measured))
    record = {kind.name: {"tried": kind.tried, "survived": kind.survived, "faults": kind.faults} for kind in measured}
    summary = {"seed": given.seed, "seconds": round(time.monotonic() - began), "kinds": record}
    given.output.write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(kind.faults for kind in measured))


if __name__ == "__main__":
    main()
