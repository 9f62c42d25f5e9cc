"""Two real processes give the losses and metrics of one, and a lost process ends the job."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import ranks

from finsa.config import ROOT, RunConfig
from finsa.errors import ConfigError
from finsa.runs import processes

Compose = Callable[..., RunConfig]
SIZES = {"train": 44, "valid": 21, "test": 37}  # steps of 8 leave 4 rows for the last one


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the sample, of all classes, that two processes cannot divide evenly."""
    folder = tmp_path_factory.mktemp("table")
    for name, size in SIZES.items():
        with (ROOT / "data" / "sample" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows[:: len(rows) // size][:size]])
    return folder


def words(table: Path, output: Path, *further: str) -> list[str]:
    """A short training run: eleven steps, the last one of each epoch half as large."""
    given = [
        "data=table",
        f"data.files={table}",
        "train=smoke",
        "tracking=none",
        f"output_dir={output}",
        "model.dtype=float32",
    ]
    given += ["train.batch_size=8", "train.epochs=2", "train.max_steps=11", "train.validate_every=4", "train.threads=1"]
    return [*given, "method.adapter.dropout=0.0", "stage.compare_base=false", "train.score_tokens=600", *further]


@pytest.fixture(scope="module")
def alone(config: Compose, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    done = commands.run(*words(table, output, "train.micro_batch_size=4"))
    assert done.returncode == 0, done.stderr
    return ranks.only_run(output)


def assert_same(run: Path, alone: Path) -> None:
    assert ranks.losses(run) == pytest.approx(ranks.losses(alone), rel=2e-6)
    assert len(ranks.losses(run)) == 11
    found, expected = ranks.metrics(run), ranks.metrics(alone)
    assert found["test"] == expected["test"]
    assert found["validation"].keys() == expected["validation"].keys()
    for name, value in expected["validation"].items():
        assert found["validation"][name] == pytest.approx(value, rel=1e-5), name
    lines = [(folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines() for folder in (run, alone)]
    answers = [[(record["id"], record["label"]) for record in map(json.loads, each)] for each in lines]
    assert answers[0] == answers[1]
    facts = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (run, alone)]
    for name in ("steps", "trainable_parameters", "data_fingerprint", "training_tokens"):
        assert facts[0][name] == facts[1][name], name


def test_fsdp_gives_the_losses_and_metrics_of_one_process(table: Path, alone: Path, tmp_path: Path) -> None:
    given = words(table, tmp_path, "train.micro_batch_size=4", "train.strategy=fsdp")
    process = ranks.started(2, *given, launcher="accelerate")
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told.count("run folder:") == 1
    assert_same(ranks.only_run(tmp_path), alone)


@pytest.fixture(scope="module")
def resumed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes: one is killed after the first checkpoint, the other one ends, and the run is resumed."""
    output = tmp_path_factory.mktemp("ddp")
    command = words(table, output, "train.micro_batch_size=4", "train.strategy=ddp")
    first, second = ranks.forked(2, *command)
    until = time.monotonic() + 200
    while not list(output.glob("*/checkpoints/checkpoint-4/trainer_state.json")) and time.monotonic() < until:
        time.sleep(0.01)
    second.signal(signal.SIGKILL)
    killed = time.monotonic()
    assert (first.wait(100), second.wait(1)) == (2, -signal.SIGKILL)
    assert time.monotonic() - killed < 60
    assert "process 0 of 2 lost the connection to another one" in first.err
    assert json.loads((ranks.only_run(output) / "run.json").read_text())["status"] != "complete"
    assert finished(ranks.forked(2, *command, "resume=true")).count("run folder:") == 1
    return ranks.only_run(output)


def finished(processes: list[commands.Command]) -> str:
    """Wait for the successful end of processes; the output of all."""
    assert [process.wait(300) for process in processes] == [0] * len(processes), [process.err for process in processes]
    return "".join(process.out for process in processes)


def test_ddp_ends_when_a_process_is_lost_and_resumes(resumed: Path, alone: Path) -> None:
    assert_same(resumed, alone)


def test_ddp_gives_the_same_bits_again_on_two_nodes(resumed: Path, tmp_path: Path) -> None:
    """Rerun without the kill, by a torchrun per node: losses, metrics, predictions and weights are equal."""
    words = ("stage=rerun", f"run={resumed}", f"output_dir={tmp_path}", "tracking=none")
    processes = ranks.on_two_nodes(*words)
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    output = "".join(out for out, _ in told)
    assert output.count("all results are bit-identical") == 1
    again = ranks.only_run(tmp_path)
    facts = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (resumed, again)]
    assert [fact["processes"] for fact in facts] == [2, 2]
    weights = [{n: d for n, d in fact["weights"].items() if n.endswith(".safetensors")} for fact in facts]
    assert weights[0] == weights[1] != {}
    assert ranks.losses(again) == ranks.losses(resumed)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("number", "given", "message"),
    [
        (2, ("method=lora",), "2 were started: add train.strategy=ddp, or start with python run.py"),
        (1, ("train.strategy=ddp",), "torchrun --nproc-per-node 2 run.py train.strategy=ddp"),
        (1, ("train.strategy=fsdp",), "torchrun --nproc-per-node 2 run.py train.strategy=fsdp"),
        (2, ("stage=inspect",), "inspect runs in one process, but 2 were started"),
        (2, ("stage=moe_joint",), "moe_joint runs in one process"),
    ],
)
def test_incompatible_numbers_of_processes_are_reported(
    number: int, given: tuple[str, ...], message: str, config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(number))
    with pytest.raises(ConfigError, match=message):
        processes.require(config(*given))


@pytest.mark.parametrize("given", [("stage=evaluate",), ("stage=predict", "run=some", "text=a"), ("stage=check",)])
def test_stages_without_training_need_no_strategy(
    given: tuple[str, ...], config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.require(config(*given))
    if given != ("stage=check",):
        monkeypatch.setenv("WORLD_SIZE", "2")
        processes.require(config(*given))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("batches", [0, 1, 2, 5, 6])
def test_shares_cover_every_batch_once_and_have_equal_size(
    number: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(number))
    monkeypatch.setattr(processes, "is_distributed", lambda: number > 1)
    given, shares = [[row] for row in range(batches)], []
    for rank in range(number):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.shard(given))
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == given
