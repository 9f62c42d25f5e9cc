"""The page and the figures in a run folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from folders import answers, write_run
from matplotlib import image

from finsa.config import RunConfig
from finsa.evaluation import metrics, moe, run_results
from finsa.runs.run_folder import RunFolder
from finsa.stages import report

GOLD = np.random.default_rng(0).integers(0, 3, 120)
GRID = [{"step": n, "strength": c, "eval_macro_f1": 0.5 + n / 100} for n, c in enumerate((0.1, 1.0, 10.0), start=1)]
Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]


def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def write_log(folder: Path, records: list[dict[str, float]]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def test_a_trained_run_has_training_curves_and_a_page_with_its_scores(trained: Trained) -> None:
    folder = trained("lora_response")
    assert image.imread(folder / "training_curves.png")[..., :3].std() > 0.02
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    text = page(folder)
    low, high = found["test"]["intervals"]["macro_f1"]
    assert f"{found['test']['macro_f1']:.4f} ({low:.3f}-{high:.3f})" in text
    for label, one in found["test"]["per_class"].items():
        assert f"{label}</span></th>" in text
        assert f"{one['f1']:.4f}" in text
    assert re.findall(r'<figcaption><span class="en" lang="en">(.*?)</span>', text) == ["Training loss"]
    assert text.count("data:image/png;base64,") == 0
    assert text.count("<svg") == 1
    assert (folder / "confusion_matrix.png").is_file()
    assert "<script" not in text
    assert not list(folder.glob("penalties.png"))


def test_a_penalty_grid_is_drawn_over_its_penalties(trained: Trained) -> None:
    folder = trained("tfidf_lr")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    described = ", ".join(f"{one['strength']:g}: {one['eval_macro_f1']:.3f}" for one in log)
    assert f"Validation macro-F1 by C: {described}." in page(folder)
    assert (folder / "penalties.png").is_file()
    assert not (folder / "training_curves.png").exists()


def test_a_report_draws_penalty_grids_separately_from_training_curves(config: Configure, tmp_path: Path) -> None:
    grid = write_run(tmp_path / "0", config("method=tfidf_lr"), GOLD, answers(GOLD, 0.6, 1))
    write_log(grid, GRID)
    report.run(config("stage=report", f"runs={tmp_path}"))
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert "penalties" in names
    assert "training_curves" not in names
    write_run(tmp_path / "1", config("method=lora"), GOLD, answers(GOLD, 0.7, 2))
    report.run(config("stage=report", f"runs={tmp_path}"))
    assert {"penalties", "training_curves"} <= {file.stem for file in (tmp_path / "figures").iterdir()}


def test_a_mixture_has_a_router_figure(config: Configure, tmp_path: Path) -> None:
    cfg = config("stage=moe_joint")
    folder = write_run(tmp_path / "run", cfg, GOLD, answers(GOLD, 0.6, 1))
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    gates = np.random.default_rng(1).dirichlet((1, 1), len(GOLD))
    domains = ["news", "forum"] * (len(GOLD) // 2)
    found["router"] = moe.analyze_gates(gates, domains, ["news", "forum"])
    found["base"] = metrics.report(GOLD.tolist(), GOLD.tolist(), list(found["test"]["per_class"]))
    (folder / "metrics.json").write_text(json.dumps(found), encoding="utf-8")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    drawn = run_results.write_page(cfg, RunFolder(folder, facts), "lora mixture", "test")
    assert drawn == [folder / "training_curves.png", folder / "router.png"]
    assert all(file.is_file() for file in drawn)
    text = page(folder)
    assert "lora mixture: forum: news 0." in text
    assert "Router of lora mixture" in text
    assert "base model (zero-shot)" in text
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    assert run_results.write_page(cfg, RunFolder(again, facts), "lora mixture", "test") == [
        again / one.name for one in drawn
    ]
    assert not [entry for entry in again.iterdir() if entry.is_dir()]


def test_a_page_names_user_data_by_file(config: Configure, tmp_path: Path) -> None:
    cfg = config("method=tfidf_lr", "data=table", f"data.files={tmp_path / 'my_posts.csv'}")
    folder = write_run(tmp_path / "run", cfg, GOLD, answers(GOLD, 0.6, 1))
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run_results.write_page(cfg, RunFolder(folder, facts), "tfidf_lr", "test")
    assert "tfidf_lr, my_posts: run" in page(folder)
    assert ">table<" not in page(folder)
