"""finsa beside LLaMA-Factory, trl, transformers and ms-swift with a real model: CPU seconds and macro-F1.

    python benchmarks/peers.py --data <folder with train.jsonl and test.jsonl: text, label>
    python benchmarks/peers.py --data <folder> --only finsa trl_best    some arms; of the others the last measurement
    python benchmarks/peers.py --data <folder> --quick                  a few rows, to see that everything runs
    python benchmarks/peers.py --show                                   nothing is run: the table of the results

It needs the weights (``make weights``), and installs each peer from the package index into a virtual environment
below ``--work``. Without ``--data`` the rows are those of ``data=tfns``, from the hub. With the defaults it takes about
1.5 CPU hours; an arm that has finished on these rows is not run again unless ``--fresh`` is given.

Held equal: base weights, training and test rows (drawn once, in proportion to the classes, after finsa's cleaning), the
prompt (token ids are compared, and the results count how many are equal), LoRA (rank, alpha, targets, dropout), epochs,
batch size and so optimizer steps, learning rate, schedule, warm-up, weight decay, gradient norm, seed, one thread. All
arms compute in float32, except trl_shipped. finsa answers by scoring the label words. The peers answer as they ship, by
generating: greedily, 16 rows at a time, at most 8 tokens. finsa also validates, which its time includes; no peer does.

CPU and wall seconds are those of whole commands with start-up and loading; CPU seconds include all child processes.
Two rules read an answer: it equals a label word, or its first word is one. An answer that cannot be read is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kept
from peer_arms import ARMS, CHILD, MAX_LENGTH, PEERS, Settings, command, dataset_info, settings_of

from finsa.config import ROOT, RunConfig, compose
from finsa.data import dataset, tokenized
from finsa.errors import FinsaError
from finsa.evaluation import metrics, statistics, tables
from finsa.models import tokenizers

VALIDATION_ROWS = 48  # finsa's; no other arm validates
SHARED_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}


def main() -> None:
    """Prepare the rows, run the arms, print the table, write ``results/peers.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, help="a folder with train.jsonl and test.jsonl (text, label)")
    options.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2_135m", help="made by `make weights`")
    options.add_argument("--work", type=Path, default=ROOT / "outputs" / "peers", help="environments, rows, answers")
    options.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    options.add_argument("--train-rows", type=int, default=640)
    options.add_argument("--test-rows", type=int, default=240)
    options.add_argument("--fresh", action="store_true", help="run finished arms again")
    options.add_argument("--sample", type=int, metavar="STEPS", help="measure trl_shipped on so many steps, and scale")
    options.add_argument("--quick", action="store_true", help="32 training and 20 test rows; nothing is kept")
    options.add_argument("--show", action="store_true", help="run nothing")
    given = options.parse_args()
    if given.show:
        show(json.loads((kept.RESULTS / "peers.json").read_text(encoding="utf-8")))
        return
    if not (given.model / "config.json").is_file():
        raise SystemExit(f"{given.model}: there are no weights; run `make weights`, or name a folder with --model")
    work = given.work.absolute() / ("quick" if given.quick else "")
    data = given.data.absolute() if given.data else None
    rows = (32, 20) if given.quick else (given.train_rows, given.test_rows)
    try:
        cfg = composed(given.model.absolute(), data, work, *rows)
        job = tokenized.build(cfg, dataset.load(cfg.data), tokenizers.load_tokenizer(cfg.model))
    except FinsaError as error:
        raise SystemExit(f"error: {error}") from error
    settings, digest = prepare(cfg, job, work / "data")
    for name in given.only:
        file = work / "arms" / name / "result.json"
        if not given.fresh and finished(file, digest):
            print(f"{ARMS[name].title}: measured before; --fresh runs it again", flush=True)
            continue
        print(f"{ARMS[name].title} ...", flush=True)
        result = measure(
            name,
            job,
            settings,
            (work, given.work.absolute() / "environments"),
            given.sample if name == "trl_shipped" else None,
        )
        file.write_text(json.dumps({"digest": digest, **result}, ensure_ascii=False), encoding="utf-8")
        print("  ".join(cells(result)), flush=True)
    report = gather(job, settings, digest, work)
    show(report)
    if not given.quick:
        kept.write("peers", report)


def composed(model: Path, data: Path | None, work: Path, train_rows: int, test_rows: int) -> RunConfig:
    """finsa's configuration: the one place that the settings of all arms come from."""
    counts = f"{{train:{train_rows},validation:{VALIDATION_ROWS},test:{test_rows}}}"
    words = ["model=smollm2_135m", f"model.path={model}", "model.dtype=float32", "method=lora_response", "data=tfns"]
    words += [f"data.max_length={MAX_LENGTH}", f"data.split.rows={counts}", f"data.cache={work / 'cache'}"]
    words += ["train.epochs=1", "train.batch_size=16", "seed=42", *([f"data.files={data}"] if data else [])]
    return compose.build(*compose.compose_values(words), words)


def prepare(cfg: RunConfig, job: tokenized.TokenizedDataset, folder: Path) -> tuple[Settings, str]:
    """Write the settings and the rows that every arm reads: as a table for finsa, as chats for the peers.

    Returns:
        The settings, and a hash of them and the rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = [
            {"id": one, "text": text, "label": job.dataset.labels.names[label]}
            for one, text, label in job.dataset.splits[split].select("id", "text", "label").iter_rows()
        ]
        job.prompts(split)
        write_lines(folder / f"{split}.jsonl", lines)
        rows = chats(cfg, job, split)
        write_lines(folder / "chats" / f"{split}.jsonl", [{"messages": row} for row in rows])
        (folder / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    if cut := sum(job.truncated().values()):
        raise SystemExit(
            f"data: {cut} texts do not fit into {MAX_LENGTH} tokens, and the peers would truncate them otherwise"
        )
    write_lines(folder / "questions" / "test.jsonl", [{"text": text} for text in job.texts("test")])
    settings = settings_of(cfg, len(job.gold("train")), folder)
    written = json.dumps(asdict(settings))
    (folder / "settings.json").write_text(written, encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(dataset_info()), encoding="utf-8")
    contents = [(folder / f"{split}.json").read_text(encoding="utf-8") for split in ("train", "test")]
    return settings, hashlib.sha256("".join([written, *contents]).encode()).hexdigest()[:16]


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def chats(cfg: RunConfig, job: tokenized.TokenizedDataset, split: str) -> list[list[dict[str, str]]]:
    """The rows of a split as chats: the system message of the chat template, the prompt, the answer."""
    found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", job.prompt.prefix, re.DOTALL)
    if found is None:
        raise SystemExit(
            "model: its chat template has no system message as SmolLM2's has; peers.py is written for that"
        )
    words = job.dataset.labels.words
    return [
        [
            {"role": "system", "content": found[1]},
            {"role": "user", "content": cfg.data.prompt.format(text=text, labels=" / ".join(words))},
            {"role": "assistant", "content": words[label]},
        ]
        for text, label in zip(job.texts(split), job.gold(split), strict=True)
    ]


class FailedError(Exception):
    """A command of a peer that failed; its last lines say why."""


def finished(file: Path, digest: str) -> bool:
    """Whether an arm was measured on these rows with these settings."""
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["digest"] == digest and "not_run" not in found


def measure(
    name: str, job: tokenized.TokenizedDataset, settings: Settings, places: tuple[Path, Path], sample: int | None
) -> dict[str, Any]:
    """Install the peer, compare its tokens with finsa's, train, answer, and read the answers.

    With a sample of steps the training loop's CPU seconds are scaled to all steps, and nothing is answered.
    """
    work, environments = places
    arm, folder = ARMS[name], work / "arms" / name
    changed = arm.changed | ({"max_steps": sample} if sample else {})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"title": arm.title, "settings": arm.changed, "why": arm.why}
    try:
        python = install(arm.peer, environments)
        facts["environment"] = "the project's" if python == Path(sys.executable) else "its own"
        facts["versions"] = versions(python, arm.peer)
        if arm.peer != "finsa":
            spend([str(python), str(CHILD), "tokens", arm.peer, str(folder)], folder / "tokens.log")
            facts["tokens"] = compare_tokens(job, json.loads((folder / "tokens.json").read_text(encoding="utf-8")))
        for part, train in (("training", True), ("answering", False))[: 1 if sample else 2]:
            words = command(arm.peer, settings, changed, python, folder, train)
            facts[part] = spend(words, folder / f"{part}.log")
    except FailedError as error:
        return {**facts, "not_run": str(error)}
    facts["trainer"] = trainer_facts(arm.peer, folder)
    if sample:
        loop, cost = facts["trainer"]["loop_cpu_seconds"], facts["training"]
        scaled = cost["cpu_seconds"] - loop + loop * settings.steps / sample
        return {**facts, "training": {"cpu_seconds": round(scaled, 1), "scaled_from_steps": sample, "measured": cost}}
    answers = answers_of(arm.peer, folder)
    return {**facts, **{rule: judged(job, answers, rule) for rule in RULES}, "answers": answers}


def install(peer: str, folder: Path) -> Path:
    """The Python of a peer; its environment is made on first use, with the project's torch build pinned.

    trl and transformers run in the project's environment, which has the versions that finsa is tested with.
    """
    one = PEERS[peer]
    if "==" not in one.package:
        return Path(sys.executable)
    place = folder / peer
    python, ready, log = place / "bin" / "python", place / ".ready", folder / f"{peer}.log"
    if ready.is_file() and ready.read_text(encoding="utf-8") == repr(one):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    print(f"  installing {one.package} into {place}", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    spend([sys.executable, "-m", "venv", "--clear", str(place)], log)
    torch = f"torch=={metadata.version('torch')}"  # with its local part, such as +cpu, so that no CUDA build is taken
    spend([*pip, torch], log)
    spend([*pip, "--no-deps", one.package], log)
    asked = "import sys; from importlib.metadata import requires; print('\\n'.join(requires(sys.argv[1]) or []))"
    listed = subprocess.run(
        [python, "-c", asked, one.package.split("==")[0]], capture_output=True, text=True, check=True
    )
    needed = [line for line in listed.stdout.splitlines() if needs(line, one.left_out)]
    spend([*pip, torch, *needed, *one.extras], log)
    (packages,) = place.glob("lib/python*/site-packages")
    for module in one.empty:
        text = f'"""Stands in for {module}, which {peer} imports and uses for other media than text."""\n'
        (packages / f"{module}.py").write_text(text, encoding="utf-8")
    ready.write_text(repr(one), encoding="utf-8")
    return python


def needs(requirement: str, left_out: Sequence[str]) -> bool:
    """Whether a requirement is installed: not those of extras, and not those that are left out."""
    found = re.match(r"[\w.-]+", requirement)
    return "extra ==" not in requirement and found is not None and found[0] not in (*left_out, "torch")


def spend(words: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command.

    Returns:
        CPU seconds of it and all its children, wall seconds, and the largest resident size of one of these processes.

    Raises:
        FailedError: where it ends with another exit code than 0.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SHARED_ENVIRONMENT
    if "pip" in words or "venv" in words:
        environment = dict(os.environ)
    if str(ROOT / "run.py") in words:
        environment["PYTHONPATH"] = str(ROOT)
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, words))}\n")
        file.flush()
        process = subprocess.Popen(
            words, cwd=log.parent, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise FailedError(f"{Path(words[0]).name} ended with exit code {process.returncode}: {lines[-1][:500]}")
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def versions(python: Path, peer: str) -> dict[str, str]:
    """Versions in an arm's environment."""
    names = sorted({PEERS[peer].package.split("==")[0], "torch", "transformers", "trl", "peft", "accelerate"})
    asked = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", asked, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def compare_tokens(job: tokenized.TokenizedDataset, rendered: dict[str, list[Any]]) -> dict[str, Any]:
    """Count the rows whose prompt has finsa's token ids, and note what ends an answer."""
    equal = total = answers = 0
    endings = set()
    for split, rows in rendered.items():
        for ours, label, (prompt, answer) in zip(job.prompts(split), job.gold(split), rows, strict=True):
            expected = [*job.renderer.answers[label], job.renderer.end]
            total, equal = total + 1, equal + (list(ours) == prompt)
            answers += answer[: len(expected)] == expected
            endings.add(tuple(answer[len(expected) :]))
    behind = [job.renderer.tokenizer.decode(list(one)) for one in sorted(endings)]
    return {"rows": total, "equal_prompts": equal, "equal_answers": answers, "learned_behind_the_end_token": behind}


def trainer_facts(peer: str, folder: Path) -> dict[str, Any]:
    """Optimizer steps, and the wall seconds of the training loop, as the arm's own trainer counts them."""
    if peer == "finsa":
        (file,) = folder.glob("trained/**/run.json")
        return {"steps": json.loads(file.read_text(encoding="utf-8"))["steps"]}
    if peer in ("trl", "transformers"):
        found: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        return found
    file = next(iter(sorted(folder.glob("trained/**/trainer_state.json"))))
    state = json.loads(file.read_text(encoding="utf-8"))
    return {"steps": state["global_step"]}


def answers_of(peer: str, folder: Path) -> list[str]:
    """The answers to the test rows, in their order."""
    if peer in ("trl", "transformers"):
        found: list[str] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        return found
    file, key = {
        "finsa": (folder / "answers.jsonl", "label"),
        "llamafactory": (folder / "answered" / "generated_predictions.jsonl", "predict"),
        "swift": (folder / "answered" / "answers.jsonl", "response"),
    }[peer]
    return [json.loads(line)[key] for line in file.read_text(encoding="utf-8").splitlines()]


def exact(answer: str, words: Sequence[str]) -> int | None:
    """The class whose word an answer is, but for white space around it; None: none's."""
    return {word: number for number, word in enumerate(words)}.get(answer.strip())


def first_word(answer: str, words: Sequence[str]) -> int | None:
    """The class whose word is the first one of an answer, in whatever case; None: none's."""
    found = re.search(r"[^\W\d_]+", answer)
    lowered = {word.lower(): number for number, word in enumerate(words)}
    return lowered.get(found[0].lower()) if found else None


RULES: dict[str, Callable[[str, Sequence[str]], int | None]] = {"exact": exact, "first_word": first_word}


def judged(job: tokenized.TokenizedDataset, answers: Sequence[str], rule: str) -> dict[str, Any]:
    """Macro-F1 with its 95 % bootstrap interval, and the number of answers that a rule cannot read."""
    labels = job.dataset.labels
    read = [RULES[rule](answer, labels.words) for answer in answers]
    found = metrics.report_parsed(job.gold("test"), read, labels.names)
    return {
        "macro_f1": round(found["macro_f1"], 4),
        "interval": [round(end, 4) for end in found["intervals"]["macro_f1"]],
        "accuracy": round(found["accuracy"], 4),
        "unread": sum(found["unparsable"].values()),
    }


def gather(job: tokenized.TokenizedDataset, settings: Settings, digest: str, work: Path) -> dict[str, Any]:
    """The report: what is held equal, and the last measurement of each arm on these rows."""
    arms, right = {}, {}
    words, gold = job.dataset.labels.words, job.gold("test")
    for name, arm in ARMS.items():
        file = work / "arms" / name / "result.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"digest": None}
        if found.pop("digest") != digest:
            continue
        answers = found.pop("answers", [])
        arms[name] = found | {"title": arm.title, "why": arm.why}
        if answers:
            read = [first_word(answer, words) for answer in answers]
            right[name] = [one == true for one, true in zip(read, gold, strict=True)]
            arms[name] |= {"answered": {word: read.count(number) for number, word in enumerate(words)}}
            arms[name] |= {"unread_examples": [one for one in answers if exact(one, words) is None][:3]}
    for name in set(right) - {"finsa"} if "finsa" in right else ():
        pairs = list(zip(right["finsa"], right[name], strict=True))
        ours, theirs = pairs.count((True, False)), pairs.count((False, True))
        p = statistics.mcnemar(ours, theirs)
        arms[name] |= {"beside_finsa": {"only_finsa_right": ours, "only_peer_right": theirs, "mcnemar_p": round(p, 4)}}
    here = asdict(settings) | {"model": Path(settings.model).name}
    del here["data"]
    return {
        "rows": {split: len(job.gold(split)) for split in ("train", "validation", "test")},
        "table_fingerprint": job.dataset.fingerprint,
        "dtype": "float32",
        "threads": 1,
        "settings": here,
        "arms": arms,
    }


def cells(arm: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "not_run" in arm:
        return [arm["title"], f"not run: {arm['not_run']}"]
    if "answering" not in arm:
        training = arm["training"]
        return [arm["title"], f"{training['cpu_seconds']:.0f}, scaled from {training['scaled_from_steps']} steps"]
    scores = [
        f"{one['macro_f1']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f}), {one['unread']} unread"
        for one in (arm["exact"], arm["first_word"])
    ]
    spent = [f"{arm[part]['cpu_seconds']:.0f} ({arm[part]['wall_seconds']:.0f})" for part in ("training", "answering")]
    return [arm["title"], *spent, *scores]


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.table import Table

    rows = report["rows"]
    shown = Table(title=f"{report['settings']['model']}, {rows['train']} training and {rows['test']} test rows")
    for name in ("arm", "training, CPU s (wall)", "answering, CPU s (wall)", "macro-F1, exact", "macro-F1, first word"):
        shown.add_column(name)
    for arm in report["arms"].values():
        shown.add_row(*cells(arm))
    tables.show(shown)


if __name__ == "__main__":
    main()
