"""Sweeps and prediction on a real Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clusters
import commands
import interruptions
import polars as pl
import pytest

from finsa import cli
from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.runs import processes
from finsa.stages import predict

Compose = Callable[..., RunConfig]
Trained = Callable[..., Path]
ROWS, CHUNK = 1600, 50
SETTINGS = ("stage=predict", f"stage.chunk={CHUNK}", "train.threads=1")
NOWHERE = "127.0.0.1:9"  # nothing listens there


@pytest.fixture(scope="module")
def nodes() -> Iterator[clusters.Nodes]:
    """A cluster for this module; the last test kills its second node."""
    clusters.require_ray()
    with clusters.two_nodes() as running:
        yield running


@pytest.fixture(scope="module")
def table(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the sample, and three without a text."""
    texts = pl.read_csv(project / "data" / "sample" / "train.csv")["text"].to_list()[:ROWS]
    for place in (20, 90, 1500):
        texts[place] = ""
    file = tmp_path_factory.mktemp("input") / "rows.csv"
    pl.DataFrame({"id": range(ROWS), "text": texts}).write_csv(file)
    return file


def command(run: Path, source: Path | str, output: Path, address: str, *more: str) -> list[str]:
    engine = ("stage.engine=ray", f"stage.ray.address={address}")
    return [*SETTINGS, *engine, f"run={run}", f"input={source}", f"output={output}", *more]


def test_a_sweep_ends_in_the_report_of_joblib(nodes: clusters.Nodes, tmp_path: Path) -> None:
    """Its jobs run in processes of the cluster."""
    tables = {}
    for launcher, more in (("joblib", []), ("ray", [f"+hydra.launcher.ray.init.address={nodes.address}"])):
        words = [f"hydra/launcher={launcher}", *more, "method=majority,tfidf_lr", "tracking=none"]
        done = commands.run("-m", *words, f"output_dir={tmp_path / launcher}")
        assert done.returncode == 0, done.stderr
        assert "sweep of 2 jobs, test split" in done.stdout
        (report,) = (tmp_path / launcher).rglob("report.csv")
        (scores,) = (tmp_path / launcher).rglob("comparison.csv")
        rows = list(csv.DictReader(report.open(encoding="utf-8")))
        kept = ("arm", "runs", "macro_f1", "accuracy", "baseline", "bootstrap_p_holm")
        tables[launcher] = (
            [{name: row[name] for name in kept if name in row} for row in rows],
            scores.read_text("utf-8"),
        )
    assert len(tables["ray"][0]) == 2
    assert tables["ray"] == tables["joblib"]


def test_workers_that_do_not_fit_are_refused(
    nodes: clusters.Nodes, trained: Trained, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    run = trained("majority")
    for word, message in {
        "stage.ray.workers=3": "2 workers with 1 CPU",
        "stage.ray.cpus=2": "0 workers with 2 CPU",
    }.items():
        done = commands.run(*command(run, table, output, nodes.address, word))
        assert done.returncode == 2
        assert "error: stage.ray.workers: " in done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_node_costs_its_chunks_only(
    nodes: clusters.Nodes,
    config: Compose,
    trained: Trained,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers resume what one process has begun, and write the file of one process."""
    run, whole, output = trained("lora_response"), tmp_path / "whole.csv", tmp_path / "out.csv"
    predict.run(config(*SETTINGS, f"run={run}", f"input={table}", f"output={whole}"))
    interruptions.after_two_chunks(config(*SETTINGS, f"run={run}", f"input={table}", f"output={output}"), monkeypatch)
    folder = tmp_path / "out.csv.partial"
    begun = {file.name: file.stat().st_mtime_ns for file in folder.glob("chunk-*")}
    assert len(begun) == 2
    process = commands.Command(*command(run, table, output, nodes.address))
    deadline = time.monotonic() + 200
    while (done := len(list(folder.glob("chunk-*")))) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    nodes.kill_second()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("chunk-*") if file.name in begun}
    assert done < ROWS // CHUNK, "it was done before a node could be killed"
    assert process.wait(200) == 0, process.err
    assert kept == begun
    assert "resuming: 2 chunks" in process.out
    assert "a worker was lost; its chunks are predicted again" in process.out
    assert f"predicted {ROWS - 2 * CHUNK - 1:,} rows by 2 Ray workers" in process.out  # one of them has no text
    assert output.read_bytes() == whole.read_bytes()
    bad = [file.with_name(f"{file.name}.rejected.jsonl").read_bytes() for file in (output, whole)]
    assert bad[0] == bad[1]
    assert len(bad[0].splitlines()) == 3
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ errors


def test_a_cluster_that_cannot_be_reached_is_reported(trained: Trained, table: Path, tmp_path: Path) -> None:
    clusters.require_ray()
    done = commands.run(*command(trained("majority"), table, tmp_path / "out.csv", NOWHERE))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: stage.ray.address: no Ray cluster at {NOWHERE} (Connection refused). Start its head with: ray start "
        "--head --port=9"
    ]
    assert list(tmp_path.iterdir()) == []
    clear = "error: hydra.launcher.ray.init.address: no Ray cluster at"
    sweep = ["-m", "hydra/launcher=ray", "method=majority,tfidf_lr", f"+hydra.launcher.ray.init.address={NOWHERE}"]
    done = commands.run(*sweep, f"output_dir={tmp_path / 'sweep'}")
    assert (done.returncode, done.stderr.startswith(clear)) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_impossible_commands_are_refused_before_a_run_is_read(
    config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("stage=predict", "stage.engine=ray", f"run={tmp_path}")
    monkeypatch.setattr(predict, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="ray predicts files, not one text"):
        predict.run(config(*words, "text=a"))
    with pytest.raises(ConfigError, match="not a pipe"):
        predict.run(config(*words, "input=-", f"output={tmp_path / 'out.jsonl'}"))
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Ray is not installed: pip install 'finsa\[ray\]'"):
        predict.run(config(*words, "input=rows.csv", "output=out.csv"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="ray starts the workers itself, but 2 processes were started: leave out torchrun"
    ):
        processes.require(config(*words, "input=rows.csv", "output=out.csv"))


def test_an_address_is_checked_before_hydra_starts() -> None:
    with pytest.raises(ConfigError, match="stage.ray.address"):
        cli.prepare(["stage=predict", "run=some", "input=a.csv", "output=b.csv", "stage.ray.address=ray://head:10001"])
