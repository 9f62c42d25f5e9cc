"""The stage as a user runs it: from run folders to tables, Markdown, CSV, figures and page."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from folders import answers, write_run
from matplotlib import image

from finsa.config import ROOT, ReportStage, RunConfig
from finsa.errors import ConfigError, RunError
from finsa.evaluation import finished_runs, report_figures
from finsa.evaluation import report as reports
from finsa.stages import report

GOLD = np.random.default_rng(0).integers(0, 3, 300)
FIGURES = (
    "calibration",
    "confusion_matrices",
    "f1",
    "label_distribution",
    "precision_recall",
    "risk_coverage",
    "training_curves",
)
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, config: Configure) -> Path:
    """A sweep of three methods, one of them with three seeds, and a job that failed."""
    folder = tmp_path_factory.mktemp("sweep")
    for number, (method, right) in enumerate([("zero_shot", 0.3), ("lora", 0.7)]):
        write_run(folder / str(number), config(f"method={method}"), GOLD, answers(GOLD, right, number))
    for seed in (1, 2, 3):
        cfg = config("method=lora_response", f"seed={seed}")
        write_run(folder / str(seed + 1), cfg, GOLD, answers(GOLD, 0.9, 10 + seed))
    write_run(folder / "5", config("method=lora"), GOLD, GOLD, status="failed", error="RunError: no room for text")
    return folder


@pytest.fixture(scope="module")
def written(sweep: Path, config: Configure) -> Path:
    result = report.run(config("stage=report", f"runs={sweep}", "published=aidf_ablation"))
    assert result.run_dir == sweep
    assert set(result.metrics) == {"zero_shot", "lora", "lora_response"}
    return sweep


def records(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def markdown(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The tables of ``report.md``: other cells by title and first cell."""
    tables: dict[str, dict[str, list[str]]] = {}
    title = ""
    for line in (folder / "report.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("| "):
            cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            tables.setdefault(title, {}).setdefault(cells[0], cells[1:])
    return tables


def test_markdown_has_the_numbers_of_the_csv(written: Path) -> None:
    rows, tables = records(written), markdown(written)
    for arm, row in rows.items():
        score = tables["Scores on the test split"][arm]
        spread = f" ± {row['macro_f1_sd']}" if row["macro_f1_sd"] else ""
        assert score[2] == f"{row['macro_f1']}{spread} ({row['macro_f1_low']}-{row['macro_f1_high']})"
        assert score[4:] == [row["macro_precision"], row["macro_recall"], row["calibration_error"]]
        cost = tables["Cost"][arm]
        expected = [row[name] or "-" for name in ("rows_per_second", "peak_memory_gib")]
        assert cost[:2] == expected
        assert cost[2].replace(",", "") == (row["trainable_parameters"] or "-")
        assert cost[3] == (row["seconds_to_best"] or "-")
    for arm in ("lora", "lora_response"):
        row, test = rows[arm], tables["Against zero_shot"][arm]
        assert test == [
            row["difference"],
            f"{row['difference_low']} to {row['difference_high']}",
            row["bootstrap_p_holm"],
            f"{row['fixed']} / {row['broken']}",
            row["mcnemar_p_holm"],
            row["verdict"],
        ]
    test = tables["Against the best, lora_response"]["lora"]
    assert test[:3] == [
        rows["lora"]["vs_best_difference"],
        f"{rows['lora']['vs_best_difference_low']} to {rows['lora']['vs_best_difference_high']}",
        rows["lora"]["vs_best_bootstrap_p_holm"],
    ]
    assert (rows["lora_response"]["best"], rows["lora"]["best"]) == ("yes", "no")
    assert "| **lora_response** |" in (written / "report.md").read_text(encoding="utf-8")
    assert "| **lora** |" not in (written / "report.md").read_text(encoding="utf-8")


def test_published_scores_are_shown_with_the_difference(written: Path) -> None:
    rows, table = records(written), markdown(written)["Comparison with the published table aidf_ablation"]
    assert rows["lora"]["published_macro_f1"] == "0.4373"  # of the confusion matrix that is printed as 0.44
    difference = float(rows["lora"]["macro_f1"]) - 0.4373
    assert float(rows["lora"]["macro_f1_minus_published"]) == pytest.approx(difference, abs=1e-4)
    assert table["lora"][3:5] == ["0.4373", rows["lora"]["macro_f1_minus_published"]]
    text = (written / "report.md").read_text(encoding="utf-8")
    assert (
        "differ from the published setup: data sample instead of aidf_news; 300 test rows instead of 908; model tiny"
        in text
    )


def test_a_failed_job_is_listed(written: Path) -> None:
    reasons = markdown(written)["Skipped"]
    assert reasons[str(written / "5")] == ["failed: RunError: no room for text"]


def test_every_figure_is_a_png(written: Path) -> None:
    assert tuple(sorted(file.stem for file in (written / "figures").iterdir())) == FIGURES
    for name in FIGURES:
        pixels = image.imread(written / "figures" / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05
        assert f"figures/{name}.png" in (written / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("matrices", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (50, 3)]
)
def test_the_grid_of_matrices_leaves_few_empty_cells(matrices: int, columns: int) -> None:
    assert report_figures._columns(matrices) == columns
    assert -matrices % columns <= 1


def test_the_terminal_shows_scores_tests_and_costs(
    sweep: Path, config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    options = config("stage=report", f"runs={sweep}", "stage.baseline=lora").stage
    assert isinstance(options, ReportStage)
    made = reports.build(finished_runs.find_folders(str(sweep)), options, None, {"method=lora": "error: no room"})
    reports.show(made, sweep, "again")
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "Scores on the test split",
        "Against lora",
        "Cost",
        "Skipped",
        "significantly better than every other",
        "worse",
    ):
        assert text in shown
    assert "to use another baseline: again stage.baseline=<configuration>" in shown
    assert "2 jobs or folders were skipped" in shown


def test_a_published_table_without_a_row_for_the_runs(
    sweep: Path, config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison would consist of dashes: the table itself is printed, and a sentence says how the setups differ."""
    runs = f"runs=[{sweep / '1'},{sweep / '2'}]"
    result = report.run(config("stage=report", runs, "published=english_sentiment", f"output_dir={tmp_path}"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Comparison with the published table" not in shown
    assert "fingpt_llama2_13b" in shown
    assert (
        "The published table english_sentiment has no row for these runs: data sample instead of fpb, fiqa, tfns, nwgi."
        in shown
    )
    assert result.run_dir is not None
    assert "english_sentiment: these runs beside published figures" in markdown(result.run_dir)
    cfg = config("method=lora", "data=fiqa")
    write_run(tmp_path / "fiqa", cfg, GOLD, answers(GOLD, 0.7, 1), ("negative", "neutral", "positive"))
    report.run(config("stage=report", f"runs={tmp_path / 'fiqa'}", "published=english_sentiment"))
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "The published table english_sentiment has no row for these runs: 300 test rows instead of 235; no "
        "configuration whose method and model have a row in the table." in shown
    )


def test_runs_on_several_data_sets_end_in_one_table(
    config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own scores are those of each run, published ones those of the file; the measures are kept apart."""
    names = ("negative", "neutral", "positive")
    for number, data in enumerate(("fpb", "tfns")):
        for method, right in (("zero_shot", 0.4), ("lora", 0.8)):
            cfg = config(f"method={method}", f"data={data}", "model=smollm2_135m")
            write_run(tmp_path / data / method, cfg, GOLD, answers(GOLD, right, number), names, data_fingerprint=data)
    where = config("method=lora", "data=tfns")  # an evaluation of a run on other rows
    write_run(tmp_path / "nwgi", where, GOLD[:99], answers(GOLD[:99], 0.5, 5), names, data="nwgi")
    done = report.run(config("stage=report", f"runs={tmp_path}", "published=english_sentiment"))
    assert done.run_dir == tmp_path
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["system"], row["measure"]): row for row in csv.DictReader(file)}
    for data in ("fpb", "tfns"):
        (run,), _ = finished_runs.load([tmp_path / data / "lora"])
        for measure in ("accuracy", "weighted_f1"):
            row = rows["lora", measure]
            assert float(row[data]) == pytest.approx(run.report[measure], abs=5e-5)
            assert float(row[f"{data}_low"]) == pytest.approx(run.report["intervals"][measure][0], abs=5e-5)
    assert (rows["lora", "accuracy"]["nwgi_n"], rows["lora", "accuracy"]["fiqa"]) == ("99", "")
    assert rows["findpo", "weighted_f1"]["nwgi"] == "0.8330"
    assert ("findpo", "accuracy") not in rows
    assert rows["finlora_lora", "accuracy"]["base"] == "Llama-3.1-8B-Instruct"
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "base models (smollm2_135m, tiny here, 6 to 13 billion parameters in the publications)",
        "fpb has 300 test rows here and 1,212 in the publications",
        "nwgi is scored by runs trained on tfns",
        "fpb: lora has the highest macro-F1",
    ):
        assert text in shown


def test_a_report_of_single_folders_gets_a_separate_folder(sweep: Path, config: Configure, tmp_path: Path) -> None:
    result = report.run(config("stage=report", f"runs=[{sweep / '1'},{sweep / '2'}]", f"output_dir={tmp_path}"))
    assert result.run_dir is not None
    assert result.run_dir.parent == tmp_path
    assert list(records(result.run_dir)) == ["lora_response", "lora"]
    assert records(result.run_dir)["lora"]["baseline"] == "lora_response"  # none is without training: the best


def test_a_published_table_alone(config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = report.run(config("stage=report", "published=openfindata_intent", f"output_dir={tmp_path}"))
    assert result.run_dir is not None
    assert "Inconclusive: Claude-3.5-Sonnet (untuned)" in " ".join(capsys.readouterr().out.split())
    table = markdown(result.run_dir)["The published table openfindata_intent"]
    assert table["Qwen2.5-7B-Instruct tuned"][0:2] == ["66", "0.8800 (0.7874-0.9356)"]
    assert table["Qwen2.5-7B-Instruct tuned"][-3:] == ["0.7744", "0.7744", "inconclusive"]
    with (result.run_dir / "published.csv").open(encoding="utf-8") as file:
        (row,) = (row for row in csv.DictReader(file) if row["row"] == "Llama-3-8B-Instruct tuned")
    assert (row["fixed"], row["broken"], row["p_low"], row["verdict"]) == ("11", "2", "0.0225", "better")
    assert not (result.run_dir / "report.csv").exists()


def test_runs_name_their_published_table(config: Configure, tmp_path: Path) -> None:
    """As the runs of an experiment do; the report command need not name it again."""
    write_run(tmp_path / "0", config("method=lora", "published=aidf_ablation"), GOLD, answers(GOLD, 0.5, 1))
    report.run(config("stage=report", f"runs={tmp_path}"))
    assert records(tmp_path)["lora"]["published_row"] == "lora"


def test_incomparable_runs_are_refused(sweep: Path, config: Configure, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", config("method=lora"), GOLD[:100], GOLD[:100])
    with pytest.raises(
        RunError, match=r"cannot be compared in one report: test rows: .*\(300 rows\) against .*\(100 rows, "
    ):
        report.run(config("stage=report", f"runs=[{sweep},{other}]"))
    with pytest.raises(RunError, match="there is no run folder at or below"):
        report.run(config("stage=report", "runs=nowhere"))
    with pytest.raises(ConfigError, match="there is no configuration 'lore'"):
        report.run(config("stage=report", f"runs={sweep}", "stage.baseline=lore"))
    with pytest.raises(ConfigError, match="stage=report needs runs="):
        config("stage=report")
    with pytest.raises(ConfigError, match="runs is not used by stage=train"):
        config(f"runs={sweep}")


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    words = ["stage=report", "published=openfindata_intent", f"output={tmp_path}"]
    code = (
        "import sys, runpy, atexit; sys.argv = ['run.py', *sys.argv[1:]]; "
        "atexit.register(lambda: print('torch' in sys.modules)); runpy.run_path('run.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert f"report: {tmp_path}/report.html" in done.stdout


def test_a_report_of_the_embedded_default_is_called_a_demonstration(written: Path) -> None:
    said = "A demonstration: a tiny embedded model on generated rows. The scores say nothing about real texts."
    assert f"- {said}" in (written / "report.md").read_text(encoding="utf-8").splitlines()
    assert (written / "report.html").read_text(encoding="utf-8").count(said) == 1
