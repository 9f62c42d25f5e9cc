"""A sweep as a user starts it: one process, one folder and one wandb run per job, one table at the end."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import commands
import pytest
import wandb_files
import yaml
from commands import run
from few import FEW
from safetensors.torch import load_file, save_file

from finsa.config import ROOT, RunConfig
from finsa.stages import report

METHODS = ["zero_shot", "lora", "lora_response_downsample"]
EXPERIMENT = ["experiment=aidf_ablation", "train=smoke", "train.max_steps=2", "model=tiny", "data=sample", FEW]
QUICK = [FEW, "tracking=none"]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """An experiment with a published table, as one process that counts what it loads."""
    folder = tmp_path_factory.mktemp("sweep")
    words = [*EXPERIMENT, f"method={','.join(METHODS)}", f"output_dir={folder}", "-m"]
    return run(*words, script="tests/counted.py"), folder


def run_folders(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.rglob("run.json"))


def test_every_job_has_a_complete_folder(sweep: tuple[Done, Path]) -> None:
    done, folder = sweep
    assert done.returncode == 0, done.stderr
    facts = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in run_folders(folder)]
    assert [fact["status"] for fact in facts] == ["complete"] * 3
    assert len({fact["config_hash"] for fact in facts}) == 3
    assert len({fact["pid"] for fact in facts}) == 1
    assert len({fact["data_fingerprint"] for fact in facts}) == 1


def test_the_table_compares_all_jobs(sweep: tuple[Done, Path]) -> None:
    done, folder = sweep
    assert "sweep of 3 jobs, test split" in done.stdout
    (table,) = folder.rglob("comparison.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["job"] for row in rows] == [f"method={method}" for method in METHODS]
    for row, folder in zip(rows, run_folders(folder), strict=True):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert float(row["macro_f1"]) == pytest.approx(metrics["test"]["macro_f1"], abs=1e-6)


def test_the_sweep_writes_its_report(sweep: tuple[Done, Path]) -> None:
    done, folder = sweep
    (table,) = folder.rglob("report.csv")
    rows = {row["arm"]: row for row in csv.DictReader(table.open(encoding="utf-8"))}
    assert list(rows) == METHODS
    assert {row["baseline"] for row in rows.values()} == {"zero_shot"}
    for method, run_folder in zip(METHODS, run_folders(folder), strict=True):
        metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
        assert rows[method]["macro_f1"] == f"{metrics['test']['macro_f1']:.4f}"
        assert f"| {metrics['test']['per_class']['利好']['recall']:.4f} |" in table.with_suffix(".md").read_text(
            "utf-8"
        )
    assert float(rows["lora"]["seconds_to_best"]) > 0
    assert rows["zero_shot"]["seconds_to_best"] == ""
    assert table.with_suffix(".html").stat().st_size > 100_000
    assert len(list((table.parent / "figures").glob("*.png"))) == 8
    assert f"stage=report runs={table.parent} stage.baseline=<configuration>" in done.stdout


def test_the_report_compares_an_experiment_with_its_published_table(sweep: tuple[Done, Path]) -> None:
    done, folder = sweep
    rows = {row["arm"]: row for row in csv.DictReader((newest(folder) / "report.csv").open(encoding="utf-8"))}
    assert rows["lora"]["published_row"] == "lora"
    assert float(rows["lora"]["published_macro_f1"]) == pytest.approx(0.4373, abs=1e-4)
    assert "Comparison with the published table aidf_ablation" in done.stdout
    assert "model tiny instead of qwen05b" in " ".join(done.stdout.split())


def test_jobs_share_base_and_tokens(sweep: tuple[Done, Path]) -> None:
    assert json.loads(sweep[0].stdout.splitlines()[-1]) == {"loaded": 1, "tokenized": [60, 60, 1203]}


def test_a_sweep_over_other_rows_ends_without_a_report(tmp_path: Path) -> None:
    """Its jobs cannot be compared: the difference is named, and their scores are shown and stored."""
    words = ["-m", "data=generated", "data.generator.rows=300,400", "method=majority", "tracking=none"]
    done = run(*words, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "no report: runs: " in done.stderr
    assert "cannot be compared in one report: test rows: data=generated data.generator.rows=300 (" in done.stderr
    (table,) = tmp_path.rglob("comparison.csv")
    assert len(list(csv.DictReader(table.open(encoding="utf-8")))) == 2
    assert list(tmp_path.rglob("report.html")) == []


def test_every_job_is_a_wandb_run_with_its_configuration(sweep: tuple[Done, Path]) -> None:
    _, folder = sweep
    files = [file for run in run_folders(folder) for file in run.glob("wandb/offline-run-*/run-*.wandb")]
    found = [wandb_files.run(file) for file in files]
    assert len({one["id"] for one in found}) == len(files) == 3
    (sweep_folder,) = (folder / "sweeps").iterdir()
    assert {(one["group"], one["type"]) for one in found} == {(sweep_folder.name, "train")}
    for one, method, run_folder in zip(found, METHODS, run_folders(folder), strict=True):
        written = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
        assert one["config"]["method"]["name"] == method
        assert {key: one["config"][key] for key in written} == written
        assert "confusion matrix" in one["logged"]
        assert ("loss" in one["logged"]) == (method != "zero_shot")
    (report,) = (wandb_files.run(file) for file in sweep_folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert (report["group"], report["type"]) == (sweep_folder.name, "report")
    assert {"table", "page"} < report["logged"]


def test_all_jobs_start_from_the_same_base(sweep: tuple[Done, Path]) -> None:
    _, folder = sweep
    metrics = [json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in run_folders(folder)]
    assert all(metric["base"] == metrics[0]["test"] for metric in metrics[1:])


def test_a_failing_job_is_reported_at_the_end_and_the_others_finish(tmp_path: Path) -> None:
    done = run("-m", "data.max_length=10,160", "method=zero_shot", *QUICK, f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "failed: data.max_length=10" in done.stderr.splitlines()[-2]
    assert "leaves no room for text" in done.stderr.splitlines()[-1]
    (table,) = tmp_path.rglob("comparison.csv")
    assert [row["job"] for row in csv.DictReader(table.open(encoding="utf-8"))] == ["data.max_length=160"]
    (report,) = tmp_path.rglob("report.md")
    skipped = report.read_text(encoding="utf-8").split("## Skipped")[1]
    assert "data.max_length=10" in skipped
    assert "leaves no room for text" in skipped


def test_a_sweep_over_maps_with_chinese_keys(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"第{row}条,{'利好利空'[row % 2 * 2 :][:2]}\n" for row in range(40))
    )
    maps = "data.labels={利好: 正面, 利空: 负面},{利空：跌，利好：涨}"
    words = ["-m", "stage=check", "method=majority", "data=table", f"data.files={tmp_path / 'rows.csv'}", maps]
    done = run(*words, "tracking=none", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    orders = [line.split("│")[2].strip() for line in done.stdout.splitlines() if "│ labels" in line]
    assert orders == ["利好, 利空", "利空, 利好"]


def test_a_reason_shared_by_all_jobs_is_reported_once(tmp_path: Path) -> None:
    words = ["-m", "method=majority", "seed=1,2,3", "data=table", f"data.files={tmp_path / 'nowhere.csv'}"]
    done = run(*words, "tracking=none", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"job 0 failed: error: data.files: no such file or folder: {tmp_path / 'nowhere.csv'}.",
        "job 1 failed for the same reason",
        "job 2 failed for the same reason",
        "failed: all 3 jobs",
    ]


def test_a_value_that_only_the_swept_methods_have() -> None:
    """Hydra composes the command without its sweep first, with the default method, which has no baseline."""
    done = run("-m", "stage=check", "method=textcnn,bilstm", "method.baseline.epochs=1", *QUICK)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"check: (\w+), sample", done.stdout) == ["textcnn", "bilstm"]
    assert done.stdout.count("1,203 rows, at most 25 steps of 50 rows") == 2  # one epoch


def comparison(folder: Path) -> str:
    return (folder / "comparison.csv").read_text(encoding="utf-8")


def newest(folder: Path) -> Path:
    return max((folder / "sweeps").iterdir())


def three_jobs(base: Path, output: Path) -> list[str]:
    """The command of a sweep without training, which reuses finished jobs in its output folder."""
    return ["-m", "method=majority,tfidf_lr,zero_shot", *QUICK, f"model.path={base}", f"output_dir={output}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed sweep: its base, and its output."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(ROOT / "data" / "tiny", folder / "base")
    done = run(*three_jobs(folder / "base", folder / "out"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_killed_sweep_resumes_and_gives_the_same_table(whole: Path, tmp_path: Path) -> None:
    command = three_jobs(whole / "base", tmp_path)
    started = commands.Command(*command)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("sweeps/*/1/run.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    started.signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    time.sleep(1.1)  # a sweep's folder is named by the second
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "job 0: finished before in" in again.stdout
    assert comparison(newest(tmp_path)) == comparison(newest(whole / "out"))
    scores = [
        [(row["arm"], row["macro_f1"], row["bootstrap_p_holm"]) for row in csv.DictReader(file.open(encoding="utf-8"))]
        for file in (newest(folder) / "report.csv" for folder in (tmp_path, whole / "out"))
    ]
    assert scores[0] == scores[1]
    third = run(*command)
    assert third.stdout.count("finished before in") == 3
    assert comparison(newest(tmp_path)) == comparison(newest(whole / "out"))


def test_the_report_of_a_sweep_folder(whole: Path, tmp_path: Path, config: Callable[..., RunConfig]) -> None:
    report.run(config("stage=report", f"runs={newest(whole / 'out')}", f"output={tmp_path}"))
    rows = list(csv.DictReader((tmp_path / "report.csv").open(encoding="utf-8")))
    assert [row["arm"] for row in rows] == ["tfidf_lr", "majority", "zero_shot"]  # by score


def test_fresh_repeats_finished_jobs(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole / "out", tmp_path / "out")
    again = run(*three_jobs(whole / "base", out), "fresh=true")
    assert again.returncode == 0, again.stderr
    assert "finished before" not in again.stdout
    assert len(run_folders(out)) == 3 + 3


def test_jobs_of_other_weights_or_versions_run_again(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole / "out", tmp_path / "out")
    earlier = run_folders(out)
    majority, _, zero_shot = earlier
    before = json.loads((zero_shot / "run.json").read_text(encoding="utf-8"))["base_weights"]["model"]
    _made_with_numpy("1.0", majority)
    with other_weights(whole / "base" / "model.safetensors"):
        again = run(*three_jobs(whole / "base", out))
    assert again.returncode == 0, again.stderr
    other = [folder for folder in run_folders(out) if folder not in earlier]
    assert len(other) == 2
    now = json.loads((other[1] / "run.json").read_text(encoding="utf-8"))["base_weights"]["model"]
    assert [name for name in before if before[name] != now[name]] == ["model.safetensors"]
    changed = f"model.safetensors of the model: {before['model.safetensors']}, now {now['model.safetensors']}"
    numpy = f"numpy: 1.0, now {version('numpy')}; with reuse_outdated=true it is reused anyway"
    assert f"{zero_shot} is not reused, because it was run with a different setup: {changed}\n" in again.stdout
    assert f"{majority} is not reused, because it was run with a different setup: {numpy}\n" in again.stdout
    assert re.findall(r"job (\d): finished before", again.stdout) == ["1"]


@contextmanager
def other_weights(file: Path) -> Iterator[None]:
    """Negate the weights in a file within this context."""
    kept = file.read_bytes()
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    try:
        yield
    finally:
        file.write_bytes(kept)


def _made_with_numpy(number: str, folder: Path) -> None:
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    facts["versions"]["numpy"] = number
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_separate_processes_end_in_one_report(launcher: str, tmp_path: Path) -> None:
    words = [f"hydra/launcher={launcher}", "method=majority,tfidf_lr", "seed=1", *QUICK]
    done = run("-m", *words, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    facts = [json.loads((one / "run.json").read_text(encoding="utf-8")) for one in run_folders(tmp_path)]
    assert len(facts) == 2
    assert len({fact["pid"] for fact in facts}) == 2
    rows = {row["arm"]: row for row in csv.DictReader((newest(tmp_path) / "report.csv").open(encoding="utf-8"))}
    assert set(rows) == {"majority", "tfidf_lr"}
    for one in run_folders(tmp_path):
        score = json.loads((one / "metrics.json").read_text(encoding="utf-8"))["test"]["macro_f1"]
        method = yaml.safe_load((one / "config.yaml").read_text(encoding="utf-8"))["method"]["name"]
        assert rows[method]["macro_f1"] == f"{score:.4f}"
